"""A CPU platform for verl, and the names by which users know verl's own platforms.

verl 0.9.1 has platforms for NVIDIA, Huawei and AMD and none for a machine without an accelerator; its documentation
tells users to set `VERL_PLATFORM=npu`, a name that its registry does not have (plugin/platform/README.md against
platform_npu.py:37: the key is `huawei`), so the run stops with "Unknown platform 'npu'".
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from verl_ascend_rollout.platforms.detect import detect

VARIABLE = "VERL_PLATFORM"
"""verl's own variable for the platform (verl 0.9.1, plugin/platform/platform_manager.py:90)."""

ALIASES = {"npu": "huawei", "ascend": "huawei", "cuda": "nvidia", "gpu": "nvidia", "rocm": "amd"}
"""The names that users (and verl's documentation) write, and the keys that verl 0.9.1 registers: the same names as
`platforms.detect` takes, so that a name which one of the two knows is known to the other."""


def register() -> str:
    """Make `VERL_PLATFORM=cpu`, `npu` and `cuda` work, once verl's platform module is imported.

    The CPU is only ever used where VERL_PLATFORM asks for it: a driver on a head node without a GPU must go on to be
    taken for a node of a GPU cluster, as verl does.
    """
    import wrapt

    wrapt.register_post_import_hook(_register_platforms, "verl.plugin.platform.platform_manager")
    wrapt.register_post_import_hook(_explain_missing_npu, "verl.plugin.platform.platform_manager")
    wrapt.register_post_import_hook(_keep_device_cpu, "verl.utils.device")
    if is_chosen():
        wrapt.register_post_import_hook(_use_one_gloo_group, "verl.utils.distributed")
        # verl's FSDP engine is registered for the devices cuda and npu; it runs on a CPU as it is.  This variable is
        # verl's own way to say which one to take (verl 0.9.1, workers/engine/base.py:402).
        os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")
    return "platforms cpu, npu (huawei), cuda (nvidia)"


def is_chosen() -> bool:
    """Whether VERL_PLATFORM asks for the CPU."""
    return os.environ.get(VARIABLE, "").strip().lower() == "cpu"


def _register_platforms(manager: Any) -> None:
    registry = manager.PlatformRegistry
    # Straight into the mapping where a name is already taken: register() would call that an override and say so.
    registry._platforms["cpu"] = _platform_class(manager.PlatformBase)
    for alias, name in ALIASES.items():
        known = registry.get(name)
        if known is not None and registry.get(alias) is None:
            # After verl's own names: verl probes the platforms in this order, and takes the first that is there.
            registry._platforms[alias] = known


def _explain_missing_npu(manager: Any) -> None:
    """Say what is missing where VERL_PLATFORM asks for an NPU and torch has none.

    verl 0.9.1 reads `torch.npu` unasked (plugin/platform/platform_npu.py:58), while it is imported by its entry point:
    "module 'torch' has no attribute 'npu'" below a traceback.
    """
    original = getattr(manager, "_create_platform", None)
    if original is None or getattr(original, "_ascend_safe_patched", False):
        return

    @functools.wraps(original)
    def _create_platform(name: str) -> Any:
        if ALIASES.get(name, name) == "huawei" and not hasattr(sys.modules["torch"], "npu"):
            _stop_without_npu(name)
        return original(name)

    _create_platform._ascend_safe_patched = True  # type: ignore[attr-defined]
    manager._create_platform = _create_platform


def _stop_without_npu(name: str) -> None:
    installed = importlib.util.find_spec("torch_npu") is not None
    sentence = f"{VARIABLE}={name} asks for an Ascend NPU, and torch has none here, since torch-npu " + (
        "cannot be imported: `python -c 'import torch_npu'` shows why"
        if installed
        else f"is not installed: install it (vllm-ascend's image has it), or set {VARIABLE} to what this machine has"
    )
    # An actor that exits takes its reason with it; an exception reaches the driver.
    if "RAY_RAYLET_PID" in os.environ:
        raise RuntimeError(sentence)
    print(f"ascend_safe: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def _keep_device_cpu(device: Any) -> None:
    """Let `trainer.device=cpu` in the config be enough for the driver, without an exported VERL_PLATFORM.

    verl's driver finds its platform before it reads its config, and falls back to NVIDIA where nothing is found; then
    `auto_set_device` would write that platform's device over the config's (verl 0.9.1, utils/device.py).
    """
    original = device.auto_set_device
    if getattr(original, "_ascend_safe_patched", False):
        return

    @functools.wraps(original)
    def auto_set_device(config: Any) -> Any:
        asks_for_cpu = config is not None and config.get("trainer", {}).get("device") == "cpu"
        # Where there is an accelerator verl's own way stays: it takes the accelerator, whatever the config says.
        if asks_for_cpu and not os.environ.get(VARIABLE) and detect().name == "cpu":
            from verl.plugin.platform import PlatformRegistry, set_platform

            os.environ[VARIABLE] = "cpu"
            set_platform(PlatformRegistry.get("cpu")())
        return original(config)

    auto_set_device._ascend_safe_patched = True  # type: ignore[attr-defined]
    device.auto_set_device = auto_set_device


def _use_one_gloo_group(distributed: Any) -> None:
    """Ask for one gloo group.

    verl 0.9.1 (utils/distributed.py:89) asks for the backend "cpu:gloo,<device>:<backend>", which on this platform is
    "cpu:gloo,cpu:gloo": torch refuses it, "Duplicate device type cpu".
    """
    original = distributed.initialize_global_process_group_ray
    if getattr(original, "_ascend_safe_patched", False):
        return

    @functools.wraps(original)
    def initialize_global_process_group_ray(timeout_second: Any = None, backend: Any = None) -> Any:
        return original(timeout_second=timeout_second, backend=backend or "gloo")

    initialize_global_process_group_ray._ascend_safe_patched = True  # type: ignore[attr-defined]
    distributed.initialize_global_process_group_ray = initialize_global_process_group_ray


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

    def nothing(*_: Any, **__: Any) -> None:
        return None

    module = types.ModuleType("torch.cpu (as verl's device module)")
    module.__dict__.update(
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=_current_device,
        set_device=nothing,
        synchronize=nothing,
        empty_cache=nothing,
        ipc_collect=nothing,
        get_device_name=lambda _device=None: "cpu",
        memory_allocated=resident,
        memory_reserved=resident,
        max_memory_allocated=resident,
        max_memory_reserved=resident,
        reset_peak_memory_stats=nothing,
        set_per_process_memory_fraction=nothing,
        mem_get_info=mem_get_info,
        get_rng_state=lambda _device=None: torch.get_rng_state(),
        set_rng_state=lambda state, _device=None: torch.set_rng_state(state),
        manual_seed=torch.manual_seed,
        manual_seed_all=torch.manual_seed,
        stream=torch.cpu.stream,
        current_stream=torch.cpu.current_stream,
        Stream=torch.cpu.Stream,
    )
    return module


def _current_device() -> Any:
    # verl moves tensors with `.to(get_device_id())`, and torch takes a bare index for an accelerator's.
    import torch

    return torch.device("cpu")


def _platform_class(base: Any) -> type[Any]:
    """The class, made late because its base is verl's."""

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

        def current_device(self) -> Any:
            return _current_device()

        def device_count(self) -> int:
            return 1

        def set_device(self, device_index: int) -> None:
            return None

        def synchronize(self, device_index: int | None = None) -> None:
            return None

        def manual_seed(self, seed: int) -> None:
            device_module().manual_seed(seed)

        def manual_seed_all(self, seed: int) -> None:
            device_module().manual_seed(seed)

        def set_allocator_settings(self, settings: str) -> None:
            return None

        def empty_cache(self) -> None:
            return None

        def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
            return None, None

        def communication_backend_name(self) -> str:
            return "gloo"

        def visible_devices_envvar(self) -> str:
            # Ray sets this one for the resource GPU; on a machine without a GPU it is only a list of slots.
            return "CUDA_VISIBLE_DEVICES"

        @contextmanager
        def nvtx_range(self, msg: str) -> Iterator[None]:
            yield

        def profiler_start(self) -> None:
            return None

        def profiler_stop(self) -> None:
            return None

        def ray_resource_name(self) -> str:
            # Logical: `ray.init(num_gpus=n)` offers n slots, and verl asks for one for each worker.
            return "GPU"

        def ray_noset_envvars(self) -> list[str]:
            return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

        def is_ipc_supported(self) -> bool:
            return False

        def cudart(self) -> None:
            return None

    return PlatformCPU
