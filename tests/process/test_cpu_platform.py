"""verl on a CPU, and the names by which users know verl's own platforms: with the real verl, in fresh processes."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fresh_process import FreshProcesses

from verl_ascend_rollout.integration import cpu_platform
from verl_ascend_rollout.platforms import detect

CLEAN: dict[str, str | None] = dict.fromkeys(
    ("VERL_PLATFORM", "VERL_ENGINE_DEVICE", "VERL_USE_EXTERNAL_PLUGINS", "VERL_USE_EXTERNAL_MODULES", "RAY_RAYLET_PID")
)

NO_CLUSTER: dict[str, str | None] = {"RAY_ADDRESS": None, "RAY_TMPDIR": "/no/such/folder"}


@pytest.fixture
def with_verl(fresh_process: FreshProcesses) -> Callable[..., Any]:
    """Call a function under some environment, and give back what it returned."""

    def call(function: Callable[..., Any], *arguments: Any, **environ: str | None) -> Any:
        answer = fresh_process(function, *arguments, **{**CLEAN, **environ})
        assert answer.status == 0, answer.stderr
        return answer.value

    return call


# VERL_PLATFORM=cpu


def as_verl_sees_it() -> dict[str, Any]:
    import torch
    import verl  # noqa: F401
    from verl.plugin.platform import get_platform
    from verl.utils import device

    platform = get_platform()
    where = device.get_device_id()
    return {
        "class": type(platform).__name__,
        "device_name": device.get_device_name(),
        "vendor": device.get_vendor(),
        "backend": device.get_nccl_backend(),
        "resource": device.get_resource_name(),
        "options": platform.ray_resource_options(1),
        "visible": device.get_visible_devices_keyword(),
        "capability": device.get_device_capability(),
        "ipc": platform.is_ipc_supported(),
        "available": platform.is_available(),
        "count": platform.device_count(),
        # verl moves tensors by `.to(get_device_id())`, and torch takes a bare index for an accelerator's.
        "is_device": where == torch.device("cpu"),
        "moved_to": str(torch.ones(2).to(where).device),
        "module_device": str(device.get_torch_device().current_device()),
        "engine_device": os.environ["VERL_ENGINE_DEVICE"],
    }


@pytest.mark.parametrize("name", ["cpu", " CPU "])
def test_verl_platform_cpu(name: str, with_verl: Callable[..., Any]) -> None:
    assert with_verl(as_verl_sees_it, VERL_PLATFORM=name) == {
        "class": "PlatformCPU",
        "device_name": "cpu",
        "vendor": "cpu",
        "backend": "gloo",
        "resource": "GPU",
        "options": {"num_gpus": 1},
        "visible": "CUDA_VISIBLE_DEVICES",
        "capability": [None, None],
        "ipc": False,
        "available": True,
        "count": 1,
        "is_device": True,
        "moved_to": "cpu",
        "module_device": "cpu",
        "engine_device": "cuda",
    }


def test_the_users_engine_device_stays(with_verl: Callable[..., Any]) -> None:
    assert with_verl(as_verl_sees_it, VERL_PLATFORM="cpu", VERL_ENGINE_DEVICE="npu")["engine_device"] == "npu"


ARGUMENTS: dict[str, list[Any]] = {
    "apply_model_patches": ["qwen2_moe"],
    "check_smi_command": ["no-such-smi"],
    "get_device_uuid": [0],
    "manual_seed": [1],
    "manual_seed_all": [1],
    "nvtx_range": ["name"],
    "ray_resource_options": [0.5],
    "set_allocator_settings": ["expandable_segments:True"],
    "set_device": [0],
}
"""What the methods of verl's PlatformBase want that can't do without."""


def call_every_method(arguments: dict[str, list[Any]]) -> list[str]:
    import verl  # noqa: F401
    from verl.plugin.platform import PlatformBase, get_platform

    platform = get_platform()
    assert isinstance(platform, PlatformBase)
    called = []
    for name in dir(PlatformBase):
        if not name.startswith("_"):
            found = getattr(platform, name)
            if callable(found):
                found(*arguments.get(name, []))
            called.append(name)
    with platform.nvtx_range("name"):
        pass
    return called


def test_every_method_of_verls_interface_works(with_verl: Callable[..., Any]) -> None:
    """A method that a new verl adds fails here with its name: in this call, or as an abstract method before it."""
    called = with_verl(call_every_method, ARGUMENTS, VERL_PLATFORM="cpu")
    assert set(ARGUMENTS) < set(called)


def test_the_device_module_has_what_verl_calls_on_one() -> None:
    spec = importlib.util.find_spec("verl")
    assert spec is not None and spec.origin is not None
    called = {
        name
        for file in Path(spec.origin).parent.rglob("*.py")
        for name in re.findall(r"(?:get_torch_device\(\)|\bdevice_module)\.(\w+)", file.read_text(encoding="utf-8"))
    }
    assert {"empty_cache", "mem_get_info", "set_rng_state"} <= called, "the search finds nothing"
    called.remove("Event")  # utils/kernel/kernels.py: Triton kernels for GPUs
    module = cpu_platform.device_module()
    assert {name for name in called if not callable(getattr(module, name, None))} == set()


def test_the_device_module_tells_the_truth_about_memory_and_random_numbers() -> None:
    import torch

    module = cpu_platform.device_module()
    free, total = module.mem_get_info()
    assert 0 < module.memory_allocated() < total
    assert 0 < free <= total
    state = module.get_rng_state()
    first = torch.rand(3)
    module.set_rng_state(state, "cpu")
    assert torch.equal(torch.rand(3), first)
    with module.stream(module.current_stream()):
        module.synchronize()


# The names


def names_in_the_registry(names: list[str]) -> dict[str, str]:
    import verl  # noqa: F401
    from verl.plugin.platform import PlatformRegistry

    return {name: PlatformRegistry.get(name).__name__ for name in names}


def test_every_name_that_we_know_is_known_to_verl(with_verl: Callable[..., Any]) -> None:
    found = with_verl(names_in_the_registry, list(detect.NAMES))
    classes = {"cpu": "PlatformCPU", "nvidia": "PlatformCUDA", "amd": "PlatformROCm", "huawei": "PlatformNPU"}
    assert found == {name: classes[verl_name] for name, (_, verl_name) in detect.NAMES.items()}


def chosen_platform() -> list[str]:
    import verl  # noqa: F401
    from verl.plugin.platform import get_platform
    from verl.utils import distributed

    patched = hasattr(distributed.initialize_global_process_group_ray, "__wrapped__")
    return [type(get_platform()).__name__, get_platform().device_name, *(["one gloo group"] if patched else [])]


@pytest.mark.parametrize("name", ["cuda", "CUDA", "nvidia", "gpu"])
def test_cuda_by_its_names(name: str, with_verl: Callable[..., Any]) -> None:
    assert with_verl(chosen_platform, VERL_PLATFORM=name) == ["PlatformCUDA", "cuda"]


def platform_with_torch_npu(how: str) -> list[str]:
    import types

    import torch

    sys.modules.pop("torch_npu", None)
    if hasattr(torch, "npu"):
        del torch.npu
    if how == "works":
        torch.npu = types.SimpleNamespace(is_available=lambda: True)  # type: ignore[attr-defined]
    elif how == "missing":
        sys.modules["torch_npu"] = None  # type: ignore[assignment]
    try:
        return chosen_platform()
    except RuntimeError as error:
        return [str(error)]


@pytest.mark.parametrize("name", ["npu", "huawei", "ascend"])
def test_npu_by_its_names(name: str, with_verl: Callable[..., Any]) -> None:
    assert with_verl(platform_with_torch_npu, "works", VERL_PLATFORM=name) == ["PlatformNPU", "npu"]


@pytest.mark.parametrize("name", ["npu", "huawei"])
def test_npu_without_torch_npu_is_one_sentence(name: str, fresh_process: FreshProcesses) -> None:
    answer = fresh_process(platform_with_torch_npu, "missing", **{**CLEAN, **NO_CLUSTER, "VERL_PLATFORM": name})
    assert answer.status == 2
    assert answer.stderr.splitlines()[-1] == (
        f"ascend_safe: VERL_PLATFORM={name} asks for an Ascend NPU, and torch has none here, since torch-npu is not "
        "installed: install it (vllm-ascend's image has it), or set VERL_PLATFORM to what this machine has"
    )
    assert "Traceback" not in answer.stderr


def test_npu_with_a_broken_torch_npu_is_one_sentence(tmp_path: Path, fresh_process: FreshProcesses) -> None:
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libascendcl.so: not found')\n", encoding="utf-8")
    environ = {**CLEAN, **NO_CLUSTER, "VERL_PLATFORM": "npu"}
    answer = fresh_process(platform_with_torch_npu, "broken", path=str(tmp_path), **environ)
    assert answer.status == 2
    assert "torch-npu cannot be imported: `python -c 'import torch_npu'` shows why" in answer.stderr
    assert "Traceback" not in answer.stderr


def on_a_node_without_an_npu() -> dict[str, Any]:
    _, device = platform_with_torch_npu("missing")
    from verl.plugin.platform import get_platform

    platform = get_platform()
    try:
        platform.device_module  # noqa: B018
    except RuntimeError as error:
        used = str(error)
    return {
        "device": device,
        "resource": platform.ray_resource_name(),
        "capability": platform.get_device_capability(),
        "available": platform.is_available(),
        "used": used,
    }


@pytest.mark.parametrize("how", [{"RAY_RAYLET_PID": "1"}, {"RAY_ADDRESS": "10.0.0.1:6379"}])
def test_a_node_without_an_npu_knows_that_the_job_has_them(how: dict[str, str], with_verl: Callable[..., Any]) -> None:
    """A head node: its driver, and the actors there that need no device.  Using one is an error that says why."""
    seen = with_verl(on_a_node_without_an_npu, VERL_PLATFORM="npu", **how)
    assert seen.pop("used").startswith(
        "VERL_PLATFORM=npu asks for an Ascend NPU, and torch has none here, since torch-"
    )
    assert seen == {"device": "npu", "resource": "NPU", "capability": [None, None], "available": False}


# Users of stock verl


def detected() -> list[str | None]:
    import verl  # noqa: F401
    from verl.plugin.platform import get_platform, platform_manager

    name = platform_manager._detect_platform_name()
    return [name, type(get_platform()).__name__, os.environ.get("VERL_ENGINE_DEVICE")]


def test_where_nobody_asks_verl_finds_the_platform_that_it_finds_without_us(with_verl: Callable[..., Any]) -> None:
    """On a machine without an accelerator that is `nvidia`: the head node of a GPU cluster looks like one."""
    stock = with_verl(detected, VERL_USE_EXTERNAL_PLUGINS="none")
    assert with_verl(detected) == stock
    if detect.detect({}).name == "cpu":
        assert stock == ["nvidia", "PlatformCUDA", None]


# trainer.device


def device_after_auto_set(device: str) -> list[str | None]:
    import verl  # noqa: F401
    from omegaconf import OmegaConf
    from verl.plugin.platform import get_platform
    from verl.utils.device import auto_set_device

    get_platform()  # as verl's entry point does, before it has read a config
    config = OmegaConf.create({"trainer": {"device": device}})
    auto_set_device(config)
    return [config.trainer.device, type(get_platform()).__name__, os.environ.get("VERL_PLATFORM")]


def test_trainer_device_cpu_is_enough(with_verl: Callable[..., Any]) -> None:
    """The variable is for the workers: those of a Ray that the driver starts inherit it."""
    assert with_verl(device_after_auto_set, "cpu") == ["cpu", "PlatformCPU", "cpu"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_platform_by_name_goes_before_trainer_device(device: str, with_verl: Callable[..., Any]) -> None:
    assert with_verl(device_after_auto_set, device, VERL_PLATFORM="cuda") == ["cuda", "PlatformCUDA", "cuda"]


def test_trainer_device_cuda_stays_with_verl(with_verl: Callable[..., Any]) -> None:
    stock = with_verl(device_after_auto_set, "cuda", VERL_USE_EXTERNAL_PLUGINS="none")
    assert with_verl(device_after_auto_set, "cuda") == stock


# The process group


def one_rank_group() -> dict[str, Any]:
    import torch
    import verl  # noqa: F401
    from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group_ray

    initialize_global_process_group_ray(timeout_second=60)
    tensor = torch.ones(3)
    torch.distributed.all_reduce(tensor)
    answer = {
        "backend": torch.distributed.get_backend(),
        "size": torch.distributed.get_world_size(),
        "sum": tensor.tolist(),
    }
    destroy_global_process_group()
    return answer


def test_one_gloo_group(tmp_path: Path, with_verl: Callable[..., Any]) -> None:
    answer = with_verl(one_rank_group, VERL_PLATFORM="cpu", DIST_INIT_METHOD=f"file://{tmp_path}/rendezvous")
    assert answer == {"backend": "gloo", "size": 1, "sum": [1.0, 1.0, 1.0]}


def group_of_stock_verl() -> str:
    import verl  # noqa: F401
    from verl.utils.distributed import initialize_global_process_group_ray

    try:
        initialize_global_process_group_ray.__wrapped__(timeout_second=60)
    except ValueError as error:
        return str(error)
    return "worked"


def test_the_patch_of_the_group_is_still_needed(tmp_path: Path, with_verl: Callable[..., Any]) -> None:
    answer = with_verl(group_of_stock_verl, VERL_PLATFORM="cpu", DIST_INIT_METHOD=f"file://{tmp_path}/rendezvous")
    assert "Duplicate device type cpu" in answer, "verl makes this group by itself now: the patch can go"
