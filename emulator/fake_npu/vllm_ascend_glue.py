"""What vllm-ascend needs on the stand-in CANN besides torch-npu's operators.

Stands in for: triton-ascend, as far as a plain decode step goes; torchair, as far as its names are imported; and the
kernels of vllm-ascend's own library (operators/vllm_ascend_library.py).
Leaves out: every other Triton kernel, compiled graphs.  Both raise NotImplementedError, with their name.

vLLM calls `register` in each of its processes, through the entry point group vllm.general_plugins.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from .operators import registry, vllm_ascend_library

FILE = "emulator/fake_npu/vllm_ascend_glue.py"


def register() -> None:
    """Apply every patch of this module.  Idempotent."""
    if importlib.util.find_spec("vllm_ascend") is None:
        return
    provide_torchair_names()
    skip_torchair_patch()
    name_missing_triton_kernels()
    if not vllm_ascend_library.install():
        skip_meta_registration()
    replace_slot_mapping_kernel()


# --- torchair ---------------------------------------------------------------------------------------------------------


def provide_torchair_names() -> None:
    """Let `import torchair` and `from torchair.x import y` succeed.  Idempotent.

    torch-npu's torchair loads GE's C++ libraries when it is imported.  vllm-ascend imports it also for eager mode: 0.11
    spec_decode/mtp_proposer.py, 0.18 compilation/passes/base_pattern.py, 0.23 to 0.30 there, without npugraph_ex.
    """
    if any(isinstance(finder, FakeTorchairFinder) for finder in sys.meta_path):
        return
    for name in [name for name in sys.modules if name == "torchair" or name.startswith("torchair.")]:
        del sys.modules[name]
    sys.meta_path.insert(0, FakeTorchairFinder())


class FakeTorchairName:
    """A name of torchair: it can be imported and its attributes read, and raises when it is called."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __getattr__(self, name: str) -> FakeTorchairName:
        if name.startswith("__"):
            raise AttributeError(name)
        return FakeTorchairName(f"{self._path}.{name}")

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"{self._path} is left out of the stand-in CANN (eager mode only): see {FILE}")


class FakeTorchairModule(types.ModuleType):
    """A module of torchair whose every public name is a FakeTorchairName."""

    def __getattr__(self, name: str) -> FakeTorchairName:
        if name.startswith("__"):
            raise AttributeError(name)
        return FakeTorchairName(f"{self.__name__}.{name}")


class FakeTorchairFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torchair and all below it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "torchair" or fullname.startswith("torchair."):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return FakeTorchairModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def skip_torchair_patch() -> None:
    """Leave out the patch module that rewrites torchair itself.  Idempotent.

    vllm-ascend 0.18 and 0.23 patch/worker/patch_npugraph_ex_triton.py reload modules of torchair, of which there is
    nothing to reload here.
    """
    name = "vllm_ascend.patch.worker.patch_npugraph_ex_triton"
    sys.modules.setdefault(name, types.ModuleType(name))


# --- vllm-ascend's library --------------------------------------------------------------------------------------------


def skip_meta_registration() -> None:
    """Tell vllm-ascend that its custom operators are on, without its enable_custom_op.  Idempotent.

    Where vllm_ascend_C holds the sleep-mode allocator alone, enable_custom_op (utils.py) goes on to import
    meta_registration.py, which looks up operators that only the full library defines.
    """
    utilities = importlib.import_module("vllm_ascend.utils")
    utilities._CUSTOM_OP_ENABLED = True


# --- Triton -----------------------------------------------------------------------------------------------------------


class FakeSlotMappingKernel:
    """`_compute_slot_mapping_kernel`: the one Triton kernel on the way of a plain step (vllm-ascend 0.23 to 0.30).

    vllm-ascend 0.23 worker/block_table.py takes it from vllm.v1.worker.block_table; 0.28 and 0.30 have their own in
    ops/triton/compute_slot_mapping.py.  Earlier releases compute slots with numpy.
    """

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self.launch, grid[0] - 1)  # a program for each request, and one for the padding

    def launch(
        self,
        requests: int,
        num_tokens: int,
        max_num_tokens: int,
        query_start_loc: torch.Tensor,
        positions: torch.Tensor,
        block_table: torch.Tensor,
        block_table_stride: int,
        block_size: int,
        slot_mapping: torch.Tensor,
        *,
        TOTAL_CP_WORLD_SIZE: int,
        PAD_ID: int,
        IS_CIRCULAR: bool = False,
        **tuning: int,
    ) -> None:
        """Write the slot of each token: its block's number in block_table (requests, blocks) times block_size plus its
        place; PAD_ID from num_tokens to max_num_tokens.  query_start_loc (requests + 1,), positions (tokens,)."""
        if TOTAL_CP_WORLD_SIZE != 1 or IS_CIRCULAR:
            raise NotImplementedError(
                f"_compute_slot_mapping_kernel: TOTAL_CP_WORLD_SIZE={TOTAL_CP_WORLD_SIZE}, IS_CIRCULAR={IS_CIRCULAR} "
                f"is left out of the stand-in CANN: add it in {FILE}"
            )
        registry.CALLS["triton::_compute_slot_mapping_kernel"] += 1
        starts = query_start_loc[: requests + 1].tolist()
        for request, (start, end) in enumerate(itertools.pairwise(starts)):
            position = positions[start:end].long()
            block = block_table[request][position // block_size].long()
            slot_mapping[start:end] = (block * block_size + position % block_size).to(slot_mapping.dtype)
        slot_mapping[num_tokens:max_num_tokens] = PAD_ID


def replace_slot_mapping_kernel() -> None:
    """Put FakeSlotMappingKernel where vllm-ascend launches the Triton kernel, if this release does.  Idempotent."""
    module = importlib.import_module("vllm_ascend.worker.block_table")
    if hasattr(module, "_compute_slot_mapping_kernel"):
        module._compute_slot_mapping_kernel = FakeSlotMappingKernel()
    if hasattr(module, "compute_slot_mapping_fused_groups"):  # 0.28: several groups of caches (hybrid models)
        module.compute_slot_mapping_fused_groups = functools.partial(
            _missing_triton_kernel, "compute_slot_mapping_fused_groups"
        )


def name_missing_triton_kernels() -> None:
    """Make the launch of a Triton kernel without Triton name the kernel.  Idempotent.

    Without Triton, vLLM's placeholder leaves a decorated kernel a plain function, whose launch, `kernel[grid](...)`,
    says only that a function is not subscriptable.  Modules imported before this call keep that.
    """
    triton_utils = importlib.import_module("vllm.triton_utils")
    if triton_utils.HAS_TRITON or triton_utils.triton.jit is fake_triton_jit:
        return
    triton_utils.triton.jit = fake_triton_jit


def fake_triton_jit(function: Callable[..., Any] | None = None, **options: object) -> Any:
    """`triton.jit`: the decorated function as a FakeTritonKernel."""
    return FakeTritonKernel(function) if function is not None else FakeTritonKernel


class FakeTritonKernel:
    """A Triton kernel without Triton: NotImplementedError with its name when it is launched."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)

    def __getitem__(self, grid: object) -> Callable[..., NoReturn]:
        return functools.partial(_missing_triton_kernel, self.__wrapped__.__qualname__)  # type: ignore[attr-defined]

    def __call__(self, *args: object, **kwargs: object) -> Any:
        return self.__wrapped__(*args, **kwargs)  # type: ignore[attr-defined]


def _missing_triton_kernel(name: str, *args: object, **kwargs: object) -> NoReturn:
    raise NotImplementedError(
        f"Triton kernel {name} has no reference version in the stand-in CANN: add one to {FILE} (or run on a path "
        f"without Triton)"
    )
