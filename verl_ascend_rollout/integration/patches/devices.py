"""A CPU for a verl that has no platforms: 0.7.1 and 0.8.0, which ask these functions instead (utils/device.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from verl_ascend_rollout.integration import cpu_platform
from verl_ascend_rollout.integration.patch import Patch, patch_of

CPU_PATCHES: list[Patch] = []
"""Of a process that VERL_PLATFORM=cpu puts on a CPU."""


@patch_of(CPU_PATCHES, "verl.utils.device:get_device_name")
def name_cpu(_original: Callable[..., str]) -> str:
    """Answer `cpu`.

    Without the patch VERL_PLATFORM=cpu is not heard beside a GPU: verl 0.8.0 takes the accelerator that is there
    (utils/device.py:69).  Remove when verl 0.8.0 is served no more.
    """
    return "cpu"


@patch_of(CPU_PATCHES, "verl.utils.device:get_torch_device")
def take_cpu_module(_original: Callable[..., Any]) -> Any:
    """Answer with a device module that has what verl calls on one.

    Without the patch the trainer ends in an AttributeError: `torch.cpu`, which verl 0.8.0 answers with, has no
    empty_cache (utils/device.py:88).  Remove when verl 0.8.0 is served no more.
    """
    return cpu_platform.device_module()


@patch_of(CPU_PATCHES, "verl.utils.device:get_resource_name")
def take_slots(_original: Callable[..., str]) -> str:
    """Answer with the resource that stands for a worker's slot.

    Without the patch Ray waits for NPUs: verl 0.8.0 asks for them wherever there is no CUDA (utils/device.py:48).
    Remove when verl 0.8.0 is served no more.
    """
    return "GPU"


@patch_of(
    CPU_PATCHES,
    "verl.single_controller.ray.base:RayResourcePool.get_placement_groups",
    "strategy",
    "name",
    "device_name",
)
def reserve_slots(
    original: Callable[..., Any], self: Any, strategy: str = "STRICT_PACK", name: str | None = None, **_: Any
) -> Any:
    """Reserve the slots by their name in Ray.

    Without the patch Ray waits for a resource `cpu`: verl 0.8.0 has a name in Ray for cuda and npu only
    (single_controller/ray/base.py:138).  Remove when verl 0.8.0 is served no more.
    """
    return original(self, strategy, name, device_name="cuda")


@patch_of(CPU_PATCHES, "verl.single_controller.ray.base:RayClassWithInitArgs.__call__", "device_name")
def take_slot(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Let a worker take one of them.

    Without the patch a worker has no slot, and no number: verl 0.8.0 asks Ray for one for cuda and npu only
    (single_controller/ray/base.py:401).  Remove when verl 0.8.0 is served no more.
    """
    return original(self, *args, **{**kwargs, "device_name": "cuda"})


@patch_of(CPU_PATCHES, "verl.utils.device:is_support_ipc")
def share_no_device_memory(_original: Callable[..., bool]) -> bool:
    """Answer that no handle of device memory goes to another process.

    Without the patch weights would go by CUDA IPC beside a GPU: verl 0.8.0 answers for the machine
    (utils/device.py:291).  Remove when verl 0.8.0 is served no more.
    """
    return False


@patch_of(CPU_PATCHES, "verl.workers.rollout.vllm_rollout.utils:get_device_uuid", "device_id")
def name_device(_original: Callable[..., str], device_id: Any) -> str:
    """Answer with a name for the CPU.

    Without the patch the trainer's worker does not start: vLLM's CPU platform raises NotImplementedError, and verl
    0.8.0 asks for the name (workers/rollout/vllm_rollout/vllm_rollout.py:97).  Remove when verl asks no more.
    """
    return f"CPU-{device_id}"


@patch_of(CPU_PATCHES, "verl.workers.engine.base:EngineRegistry.get_engine_cls", once=True)
def take_cuda_engine(original: Any) -> Any:
    """Take the trainer's engine for CUDA, which runs on a CPU as it is.

    Without the patch the trainer ends with "Unknown device: cpu": verl 0.8.0 registers its engines for cuda and npu
    (workers/engine/base.py:318), and has not the variable VERL_ENGINE_DEVICE yet.  Remove when verl 0.8.0 is served no
    more.
    """
    choose = original.__func__

    def get_engine_cls(cls: Any, model_type: str, backend: str) -> Any:
        for engines in cls._engines.get(model_type, {}).values():
            if "cuda" in engines:
                engines.setdefault("cpu", engines["cuda"])
        return choose(cls, model_type, backend)

    return classmethod(get_engine_cls)


@patch_of(CPU_PATCHES, "verl.workers.fsdp_workers:ActorRolloutRefWorker.__init__", "self")
def join_gloo_first(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """Let the trainer of before join its process group by the one function that knows of a CPU.

    Without the patch torch refuses the group, "Duplicate device type cpu": verl 0.7.1 asks for "cpu:gloo,cpu:nccl" in
    there (workers/fsdp_workers.py:158), where there is no group yet.  Remove when verl 0.7.1 is served no more.
    """
    from verl.utils.distributed import initialize_global_process_group_ray

    initialize_global_process_group_ray()
    original(self, *args, **kwargs)


@patch_of(CPU_PATCHES, "verl.utils.attention_utils:_get_attention_functions")
def unpad_in_torch(_original: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    """Take the padding off in torch, as verl does it on an NPU.

    Without the patch the trainer ends with "No module named 'flash_attn'", which is for CUDA: verl 0.8.0 takes the
    padding off also with use_remove_padding=false (utils/attention_utils.py:30).  Remove when verl 0.8.0 is served no
    more.
    """
    from einops import rearrange
    from verl.utils.npu_flash_attn_utils import index_first_axis, pad_input, unpad_input

    return index_first_axis, pad_input, rearrange, unpad_input
