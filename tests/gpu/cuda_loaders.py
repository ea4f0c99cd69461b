"""vLLM's CUDA wheel on a machine without a GPU: what its layers do with weights that are loaded again, by each path.

    cuda_loaders.py FOLDER

Real are vLLM's model, the attention and MoE back ends that it chooses for an H200, its loaders and its processing of
loaded weights, none of which need a GPU to run: the tensors lie in host memory.  A stand-in for the driver says that an
H200 is there, and computes nothing, so no engine can be started.  Writes FOLDER/found.json; exit status 1 where a sync
of ours is not byte for byte a fresh load, moves a parameter, or takes a stream that is no model; and where verl's own
sequence, the control, takes none.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

DRIVER = """
int cuGetProcAddress_v2(const char *name, void **found) { *found = 0; return 500; }
#define ABSENT(name) int name() { return 100; }
ABSENT(cuInit) ABSENT(cuDriverGetVersion) ABSENT(cuCtxGetCurrent) ABSENT(cuCtxSetCurrent) ABSENT(cuDeviceGetAttribute)
ABSENT(cuDevicePrimaryCtxRetain) ABSENT(cuGetErrorString) ABSENT(cuMemAddressFree) ABSENT(cuMemAddressReserve)
ABSENT(cuMemCreate) ABSENT(cuMemGetAllocationGranularity) ABSENT(cuMemMap) ABSENT(cuMemRelease) ABSENT(cuMemSetAccess)
ABSENT(cuMemUnmap) ABSENT(cuPointerGetAttribute) ABSENT(cuTensorMapEncodeTiled)
"""
"""libcuda.so.1: what vLLM's and torch's libraries name of it; there is no device (100)."""

MANAGEMENT = """
#include <string.h>
#define FINE(name) int name() { return 0; }
FINE(nvmlInitWithFlags) FINE(nvmlInit_v2) FINE(nvmlShutdown)
const char *nvmlErrorString(int error) { return "not in the stand-in"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *)1; return 0; }
int nvmlDeviceGetName(void *device, char *name, unsigned size) { strncpy(name, "NVIDIA H200", size); return 0; }
int nvmlDeviceGetUUID(void *device, char *name, unsigned size) { strncpy(name, "GPU-0", size); return 0; }
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) { *major = 9; *minor = 0; return 0; }
int nvmlDeviceGetMemoryInfo(void *device, unsigned long long *bytes)
{ bytes[0] = bytes[1] = 150000000000ULL; bytes[2] = 0; return 0; }
"""
"""libnvidia-ml.so.1: one H200, which is how vLLM takes this for a machine with CUDA (platforms/__init__.py)."""


def with_stand_in(folder: Path) -> None:
    """Build the stand-ins, and start this script again with them: the loader reads its path once."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise SystemExit("a C compiler is needed for the stand-in of the driver: install gcc")
    for name, source in (("libcuda.so.1", DRIVER), ("libnvidia-ml.so.1", MANAGEMENT)):
        command = [compiler, "-w", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), "-x", "c", "-"]
        subprocess.run(command, input=source, text=True, check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), "VERL_PLATFORM": "cuda", "CUDA_LOADERS": "1"}
    os.execve(sys.executable, [sys.executable, __file__, str(folder)], environment)


def run(folder: Path) -> int:
    """Sync by each path of ours, write what was found, and return the exit status."""
    import kit_worker  # noqa: F401 - from here on the layouts of new models are recorded
    import weight_paths
    from vllm.platforms import current_platform
    from weight_state import state_of

    checkpoints = [weight_paths.make_checkpoint(folder / f"checkpoint{number}", number) for number in (0, 1)]
    config = engine_config(checkpoints[0], {**weight_paths.arguments(on_gpu=True), "worker_extension_cls": ""}, folder)
    fresh = [state_of(load(checkpoint, config)) for checkpoint in checkpoints]
    found: dict[str, Any] = {"device": current_platform.get_device_name(), "paths": {}}
    ours = our_paths()
    for path, reload in {**ours, "verl": verls}.items():
        model = load(checkpoints[0], config)
        found.update(attention_backend=_attention_backend(config), moe_backend=_moe_backend(model))
        wrong, taken = syncs(model, config, reload, checkpoints, fresh, folder / path)
        found["paths"][path] = {"syncs": len(weight_paths.ORDER), "wrong": wrong, "taken": taken}
        (folder / "found.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(path, found["paths"][path], flush=True)
    failed = [path for path in ours if found["paths"][path]["wrong"] or found["paths"][path]["taken"]]
    # verl's sequence has no manifest: if it took no malformed stream, these would show nothing.
    return int(bool(failed) or not found["paths"]["verl"]["taken"])


def engine_config(checkpoint: Path, arguments: Mapping[str, Any], folder: Path) -> Any:
    """vLLM's configuration of an engine on an H200, and this process as its only rank, with tensors in host memory."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    class Stream:
        """vLLM makes one for each layer of experts, and uses it where it computes."""

        def __init__(self, *_: Any, **__: Any) -> None: ...

    torch.cuda.Stream = Stream
    config = EngineArgs(model=str(checkpoint), **arguments).create_engine_config()
    load_general_plugins()
    with set_current_vllm_config(config):
        parallel_state.init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, backend="gloo")
        parallel_state.ensure_model_parallel_initialized(1, 1, backend="gloo")
    config.device_config.device = torch.device("cpu")
    config.load_config.device = "cpu"
    return config


def load(checkpoint: Path, config: Any) -> Any:
    """A new model with those weights, through vLLM's own loading and processing."""
    import torch
    from safetensors.torch import load_file
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class Loader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None: ...

        def load_weights(self, model: Any, model_config: Any) -> None:
            model.load_weights(iter(load_file(checkpoint / "model.safetensors").items()))

    for name in ("static_forward_context", "static_all_moe_layers"):
        getattr(config.compilation_config, name, []).clear()
    with set_current_vllm_config(config), torch.no_grad():
        return Loader(config.load_config).load_model(vllm_config=config, model_config=config.model_config)


def syncs(
    model: Any, config: Any, reload: Any, checkpoints: list[Path], fresh: list[Any], folder: Path
) -> tuple[list[str], list[str]]:
    """Ten syncs, then each malformed stream after a whole one, then a whole one.

    Returns:
        What was wrong after a whole one (tensors that differ from a fresh load, parameters that moved), and the
        malformed streams that were taken, or refused without the name.
    """
    import torch
    import weight_paths
    from safetensors.torch import load_file, save_file
    from vllm.config import set_current_vllm_config
    from weight_state import state_of

    from verl_ascend_rollout.worker.weights.manifest import Manifest
    from verl_ascend_rollout.worker.weights.plan import Plan

    plan = Plan()
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}

    def sync(checkpoint: Path) -> None:
        with (
            torch.no_grad(),
            set_current_vllm_config(config),
            reload(model, config.model_config, Manifest(compare=True), plan) as feed,
        ):
            for file in sorted(checkpoint.glob("*.safetensors")):
                feed(load_file(file).items())

    wrong: list[str] = []
    for number in weight_paths.ORDER:
        sync(checkpoints[number])
        wrong += weight_paths.differing(state_of(model), fresh[number])
        wrong += [f"{name} moved" for name, now in model.named_parameters() if now.data_ptr() != before[name]]
    taken = []
    for case, (files, name) in weight_paths.malformed(load_file(checkpoints[0] / "model.safetensors")).items():
        sync(checkpoints[0])
        place = folder / case.replace(" ", "-")
        place.mkdir(parents=True)
        for number, tensors in enumerate(files):
            save_file(tensors, place / f"{number}.safetensors")
        try:
            sync(place)
            taken.append(case)
        except Exception as error:
            taken += [] if name in str(error) else [f"{case}: not by name"]
    sync(checkpoints[0])
    return wrong + weight_paths.differing(state_of(model), fresh[0]), taken


@contextlib.contextmanager
def verls(model: Any, model_config: Any, manifest: Any, plan: Any) -> Iterator[Any]:
    """Load as verl 0.9.1 does (workers/rollout/vllm_rollout/utils.py:292-353), in the form of our paths."""
    import torch
    from verl.utils.vllm.patch import patch_vllm_moe_model_weight_loader
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    patch_vllm_moe_model_weight_loader(model)
    yield lambda weights: model.load_weights(iter(weights))
    process_weights_after_loading(model, model_config, torch.device("cpu"))


def our_paths() -> dict[str, Any]:
    """Our weight paths, by the value of the option."""
    from verl_ascend_rollout.worker.weights import layerwise, sync

    return {"by_layout": sync.reload, "layerwise": layerwise.reload}


def _attention_backend(config: Any) -> str:
    layers = config.compilation_config.static_forward_context.values()
    return ", ".join(sorted({type(layer.impl).__name__ for layer in layers if hasattr(layer, "impl")}))


def _moe_backend(model: Any) -> str:
    methods = [layer.quant_method for layer in model.modules() if hasattr(layer, "w13_weight")]
    return ", ".join(sorted({method.unquantized_backend.name for method in methods}))


if __name__ == "__main__":
    place = Path(sys.argv[1]).resolve()
    if os.environ.get("CUDA_LOADERS") != "1":
        with_stand_in(place)
    sys.exit(run(place))
