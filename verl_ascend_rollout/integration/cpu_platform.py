"""A CPU platform for verl, and what is said where an NPU is asked for and torch has none.

verl 0.9.1 has platforms for NVIDIA, Huawei and AMD and none for a machine without an accelerator.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import types
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from verl_ascend_rollout.platforms.detect import OVERRIDE


def is_chosen() -> bool:
    """Whether VERL_PLATFORM asks for the CPU."""
    return os.environ.get(OVERRIDE, "").strip().lower() == "cpu"


def missing_npu(name: str = "npu") -> str | None:
    """Why torch has no `npu` in this process, as one sentence; `None` where it has, or is not imported."""
    torch = sys.modules.get("torch")
    if torch is None or hasattr(torch, "npu"):
        return None
    installed = importlib.util.find_spec("torch_npu") is not None
    return f"{OVERRIDE}={name} asks for an Ascend NPU, and torch has none here, since torch-npu " + (
        "cannot be imported: `python -c 'import torch_npu'` shows why"
        if installed
        else f"is not installed: install it (vllm-ascend's image has it), or set {OVERRIDE} to what this machine has"
    )


@functools.cache
def device_module() -> types.ModuleType:
    """`torch.cpu`, with the functions of `torch.cuda` that verl calls on a device module.

    Memory figures are the process's resident set and the machine's memory, in bytes: a CPU has no allocator with
    counters of its own.
    """
    import psutil
    import torch

    def resident(_device: Any = None) -> int:
        return int(psutil.Process().memory_info().rss)

    def mem_get_info(_device: Any = None) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return int(memory.available), int(memory.total)

    module = types.ModuleType("torch.cpu (as verl's device module)")
    module.__dict__.update(
        dict.fromkeys(("set_device", "synchronize", "empty_cache", "ipc_collect"), _nothing),
        **dict.fromkeys(("reset_peak_memory_stats", "set_per_process_memory_fraction"), _nothing),
        **dict.fromkeys(("memory_allocated", "memory_reserved"), resident),
        **dict.fromkeys(("max_memory_allocated", "max_memory_reserved"), resident),
        **dict.fromkeys(("manual_seed", "manual_seed_all"), torch.manual_seed),
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=_current_device,
        get_device_name=lambda _device=None: "cpu",
        mem_get_info=mem_get_info,
        get_rng_state=lambda _device=None: torch.get_rng_state(),
        set_rng_state=lambda state, _device=None: torch.set_rng_state(state),
        stream=torch.cpu.stream,
        current_stream=torch.cpu.current_stream,
        Stream=torch.cpu.Stream,
    )
    return module


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _current_device() -> Any:
    # verl moves tensors with `.to(get_device_id())`, and torch takes a bare index for an accelerator's.
    import torch

    return torch.device("cpu")


def platform_class(base: Any) -> type[Any]:
    """Return the class, made late because its base is verl's."""

    class PlatformCPU(base):
        """verl's platform interface on a CPU: gloo, no IPC, and Ray's logical GPUs as slots for workers."""

        device_name = "cpu"
        vendor_name = "cpu"

        @property
        def device_module(self) -> types.ModuleType:
            return device_module()

        def is_available(self) -> bool:
            return True

        def is_platform_available(self, use_smi_check: bool = False) -> bool:
            return is_chosen()

        def device_count(self) -> int:
            return 1

        current_device = staticmethod(_current_device)
        set_device = synchronize = set_allocator_settings = empty_cache = _nothing
        profiler_start = profiler_stop = cudart = _nothing

        def manual_seed(self, seed: int) -> None:
            device_module().manual_seed(seed)

        manual_seed_all = manual_seed

        def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
            return None, None

        def communication_backend_name(self) -> str:
            return "gloo"

        def visible_devices_envvar(self) -> str:
            # Ray sets this one for the resource GPU; on a machine without a GPU it is only a list of slots.
            return "CUDA_VISIBLE_DEVICES"

        def nvtx_range(self, msg: str) -> AbstractContextManager[None]:
            return nullcontext()

        def ray_resource_name(self) -> str:
            # Logical: `ray.init(num_gpus=n)` offers n slots, and verl asks for one for each worker.
            return "GPU"

        def ray_noset_envvars(self) -> list[str]:
            return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

        def is_ipc_supported(self) -> bool:
            return False

    return PlatformCPU
