"""verl's platforms: a CPU, and the names by which users know verl's own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from verl_ascend_rollout.integration import cluster, cpu_platform
from verl_ascend_rollout.integration.patch import Patch, patch_of
from verl_ascend_rollout.platforms.detect import NAMES, OVERRIDE, detect

PATCHES: list[Patch] = []
CPU_PATCHES: list[Patch] = []
"""Of a process that VERL_PLATFORM=cpu puts on a CPU."""


@patch_of(PATCHES, "verl.plugin.platform.platform_manager:PlatformRegistry", once=True)
def add_platform_names(registry: Any) -> Any:
    """Register the platform `cpu`, and verl's own by every name that users write.

    Without the patch VERL_PLATFORM=npu and cpu stop a run with "Unknown platform": verl's documentation says `npu`
    (plugin/platform/README.md), its registry `huawei` (plugin/platform/platform_npu.py:37), and neither has a CPU.
    Remove when verl has a platform for CPUs, and the names that its documentation says.

    The CPU is only ever used where VERL_PLATFORM asks for it: a driver on a head node without a GPU must go on to be
    taken for a node of a GPU cluster, as verl does.
    """
    # Straight into the mapping where a name is already taken: register() would call that an override and say so.
    known = registry._platforms
    known.setdefault("cpu", cpu_platform.platform_class(sys.modules[registry.__module__].PlatformBase))
    for name, (_, key) in NAMES.items():
        if key in known:
            # After verl's own names: verl probes the platforms in this order, and takes the first that is there.
            known.setdefault(name, known[key])
    return registry


@patch_of(PATCHES, "verl.plugin.platform.platform_manager:_create_platform", "name", required=False)
def explain_missing_npu(original: Callable[..., Any], name: str) -> Any:
    """Let a process without an NPU know that the job has them, where VERL_PLATFORM says so and torch has no `npu`.

    Without the patch that is "module 'torch' has no attribute 'npu'", also for a driver on a head node, and for actors
    that need no device: verl reads `torch.npu` unasked while it is imported (plugin/platform/platform_npu.py:58).
    Remove when verl's PlatformNPU can be made where torch has no npu.
    """
    sentence = cpu_platform.missing_npu(name) if NAMES.get(name, ("",))[0] == "npu" else None
    if sentence is None:
        return original(name)
    if not _is_part_of_a_cluster():
        print(f"ascend_safe: {sentence}", file=sys.stderr)
        raise SystemExit(2)
    from verl.plugin.platform import PlatformRegistry

    return _without_device(PlatformRegistry.get(name), sentence)


def _is_part_of_a_cluster() -> bool:
    """Whether other nodes may have what this one has not: in an actor, and in a driver that names a cluster."""
    named = any("ray_init.address=" in argument for argument in sys.argv)
    return named or "RAY_RAYLET_PID" in os.environ or cluster.joined(None, os.environ) is not None


def _without_device(platform: type[Any], sentence: str) -> Any:
    """Return a platform of this kind that has no device here, and says so where one is used."""

    class WithoutDevice(platform):
        @property
        def device_module(self) -> Any:
            raise RuntimeError(sentence)

        def is_available(self) -> bool:
            return False

        def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
            return None, None

    return WithoutDevice()


@patch_of(PATCHES, "verl.utils.device:auto_set_device", "config")
def keep_device(original: Callable[..., Any], config: Any) -> Any:
    """Let `trainer.device=cpu` or `npu` in the config be enough for the driver, without an exported VERL_PLATFORM.

    Without the patch a job that is set up for `npu` or `cpu` is set to cuda in a driver that has no device: verl finds
    its platform before it reads its config, falls back to NVIDIA, and writes that over the config's
    (utils/device.py:151).  Remove when verl leaves trainer.device alone where it finds no device.
    """
    wanted = config.get("trainer", {}).get("device") if config is not None else None
    # Where there is an accelerator verl's own way stays: it takes the accelerator, whatever the config says.
    if wanted in ("cpu", "npu") and not os.environ.get(OVERRIDE) and detect().name == "cpu":
        from verl.plugin.platform import PlatformRegistry, set_platform

        os.environ[OVERRIDE] = wanted
        set_platform(PlatformRegistry.get(wanted)())
    return original(config)


@patch_of(CPU_PATCHES, "verl.utils.distributed:initialize_global_process_group_ray", "timeout_second", "backend")
def use_one_gloo_group(original: Callable[..., Any], timeout_second: Any = None, backend: Any = None) -> Any:
    """Ask for one gloo group.

    Without the patch torch refuses the process group, "Duplicate device type cpu": verl asks for the backend
    "cpu:gloo,<device>:<backend>", which on this platform is "cpu:gloo,cpu:gloo" (utils/distributed.py:89).  Remove when
    verl asks for one backend where the device is a CPU.
    """
    return original(timeout_second=timeout_second, backend=backend or "gloo")
