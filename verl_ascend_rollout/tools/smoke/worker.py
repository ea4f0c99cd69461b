"""`SmokeWorker`: smoke's part inside vLLM's worker process, where the tensors are.

vLLM imports this module when it makes its worker, before the worker does anything (v1/worker/worker_base.py of 0.11 and
0.28: `worker_extension_cls`).  So this is where the layouts of the model's weights begin to be recorded, also on a vLLM
to which our plug-in is not installed, and where the worker's own steps begin to be timed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from verl_ascend_rollout import PATCHED
from verl_ascend_rollout.integration.patches.vllm import RECORD_LAYOUTS
from verl_ascend_rollout.worker import kv_cache
from verl_ascend_rollout.worker.lifecycle import AscendSafeLifecycle
from verl_ascend_rollout.worker.weights import layout, sync

STEPS = ("load_model", "determine_available_memory", "initialize_from_config", "compile_or_warm_up_model")
"""What every vLLM worker does between its start and its first request (0.11 to 0.28, v1/worker/*_worker.py)."""

CAPTURE = "capture_model"

MARK_VARIABLE = "ASCEND_SAFE_STEP_MARK"
"""The environment variable by which smoke says what to print before a step's name, for its progress display."""

STAND_IN_VARIABLE = "ASCEND_STAND_IN"
"""The environment variable by which a runtime that stands in for an accelerator's own says what it is; unset on
hardware.  The doctor shows it among the variables that matter."""

_seconds: dict[str, float] = {}
_running: set[str] = set()


def timed(name: str, method: Any) -> Any:
    """Wrap a method so that it adds its seconds to `name`; what it calls of the same name is part of it."""

    @functools.wraps(method)
    def step(*args: Any, **kwargs: Any) -> Any:
        if name in _running:
            return method(*args, **kwargs)
        if mark := os.environ.get(MARK_VARIABLE):
            print(f"{mark}{name}", file=sys.stderr, flush=True)
        runner = getattr(args[0], "model_runner", None) if args else None
        if name in STEPS and runner is not None:
            _time(runner, (CAPTURE,))
        _running.add(name)
        started = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            _running.discard(name)
            _seconds[name] = _seconds.get(name, 0.0) + time.perf_counter() - started

    setattr(step, PATCHED, ("smoke",))
    return step


def _time(owner: Any, names: Sequence[str]) -> None:
    for name in names:
        method = vars(owner).get(name) if isinstance(owner, type) else getattr(owner, name, None)
        if callable(method) and not hasattr(method, PATCHED):
            setattr(owner, name, timed(name, method))


def watch_steps(base: type) -> None:
    """Time the steps of every worker class that there is.  A second call changes nothing."""
    classes = [base]
    for found in classes:
        classes += found.__subclasses__()
        _time(found, STEPS)


RECORD_LAYOUTS.apply(importlib.import_module(RECORD_LAYOUTS.module))
watch_steps(importlib.import_module("vllm.v1.worker.worker_base").WorkerBase)


class SmokeWorker(AscendSafeLifecycle):
    """Our lifecycle, with what smoke asks of it."""

    def ascend_safe_smoke_facts(self) -> dict[str, Any]:
        """Return what this worker is and has: times in seconds, sizes in bytes; `None` for what could not be found."""
        runner = self.model_runner
        config = runner.vllm_config
        model = sync.unwrapped(runner)
        device = kv_cache.device_of(self)
        on_cpu = device.type == "cpu"
        available, total = kv_cache.memory(self)
        accelerator = functools.partial(torch.get_device_module, device)
        counter = functools.partial(importlib.import_module, "vllm.compilation.counter")
        cache = getattr(runner, "kv_cache_config", None)
        groups = len(getattr(cache, "kv_cache_groups", None) or ()) or 1
        blocks, block_size = getattr(cache, "num_blocks", None), config.cache_config.block_size
        compilation = config.compilation_config
        return {
            "seconds": dict(_seconds),
            "compile_seconds": _found(lambda: float(compilation.compilation_time)),
            "weight_bytes": weight_bytes(model),
            "kv_bytes": kv_cache.kv_bytes(self),
            "kv_tokens": blocks // groups * block_size if blocks is not None else None,
            "device_total": total,
            "device_free": available,
            # Of a CPU nothing: the process at the prompt knows its name.
            "device": None if on_cpu else _found(lambda: accelerator().get_device_name(device.index or 0)),
            "driver_toolkit": _toolkit(device.type),
            "stand_in": os.environ.get(STAND_IN_VARIABLE, ""),
            "isa": _isa() if on_cpu else [],
            "threads": torch.get_num_threads() if on_cpu else None,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "quantization": config.model_config.quantization or "",
            "eager": bool(config.model_config.enforce_eager),
            "graph_mode": _graph_mode(config),
            # vLLM's own count, in which vllm-ascend's graphs are too (0.28, compilation/acl_graph.py:261).
            "graphs_captured": _found(lambda: int(counter().compilation_counter.num_cudagraph_captured)),
            "attention_backend": _attention_backend(compilation),
            "moe_backend": _moe_backend(model),
            "max_model_len": config.model_config.max_model_len,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "block_size": block_size,
            "prefix_caching": config.cache_config.enable_prefix_caching,
            "chunked_prefill": _chunked_prefill(config.scheduler_config),
            "tensor_parallel": config.parallel_config.tensor_parallel_size,
            "pipeline_parallel": config.parallel_config.pipeline_parallel_size,
            "data_parallel": config.parallel_config.data_parallel_size,
            "expert_parallel": bool(config.parallel_config.enable_expert_parallel),
            "model_class": type(model).__name__,
        }


def weight_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of parameters and buffers, each storage once.

    A weight that a kernel packed into a form of its own, and that vLLM emptied (vLLM 0.28 on a CPU, linear.py:202),
    counts as what it was before: the packed form has as many bytes or more.
    """
    tensors = (tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers()))
    storages = {storage.data_ptr(): storage.nbytes() for storage in tensors}
    emptied = (
        math.prod(weight.shape) * weight.dtype.itemsize
        for _, layer, record in layout.recorded_layers(model)
        for name, weight in record.weights.items()
        if isinstance(now := getattr(layer, name, None), torch.Tensor) and now.numel() == 0
    )
    return sum(storages.values()) + sum(emptied)


def _found(look: Callable[[], Any]) -> Any:
    """Return what was looked for; `None` where this release, or this machine, has it not."""
    with contextlib.suppress(Exception):
        return look()
    return None


def _chunked_prefill(config: Any) -> bool | None:
    values = (getattr(config, name, None) for name in ("enable_chunked_prefill", "chunked_prefill_enabled"))
    return next((bool(value) for value in values if value is not None), None)


def _toolkit(kind: str) -> str | None:
    """CUDA's version, as torch was built with it, or CANN's, as torch_npu asks it."""
    if kind == "cuda":
        return torch.version.cuda or getattr(torch.version, "hip", None)
    utils = "torch_npu.npu.utils"
    version = _found(lambda: importlib.import_module(utils).get_cann_version("CANN")) if kind == "npu" else None
    return str(version) if version else None


def _isa() -> list[str]:
    """Return the instruction sets of this CPU that vLLM's kernels are chosen by (vLLM 0.28, csrc/cpu)."""
    text: str = _found(lambda: Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")) or ""
    lines = (line for line in text.splitlines() if line.startswith(("flags", "Features")))
    flags = next(lines, "").partition(":")[2].split()
    wanted = {"amx_tile": "amx", "avx512_bf16": "avx512_bf16", "avx512f": "avx512", "avx2": "avx2", "asimd": "neon"}
    return [name for flag, name in wanted.items() if flag in flags]


def _graph_mode(config: Any) -> str | None:
    if config.model_config.enforce_eager:
        return "NONE"
    mode = getattr(config.compilation_config, "cudagraph_mode", None)
    return getattr(mode, "name", None) or (str(mode) if mode is not None else None)


def _attention_backend(compilation: Any) -> str | None:
    layers = (getattr(compilation, "static_forward_context", None) or {}).values()
    implementations = (getattr(layer, "impl", None) for layer in layers)
    return next((type(found).__name__ for found in implementations if found is not None), None)


def _moe_backend(model: torch.nn.Module) -> str | None:
    """Return the method that runs the experts, and the kernel where it has one by itself."""
    layers = (layer for layer in model.modules() if hasattr(layer, "w13_weight"))
    method = next((layer.quant_method for layer in layers if getattr(layer, "quant_method", None)), None)
    kernel = getattr(method, "moe_kernel", None)
    if method is None or kernel is None:
        return None if method is None else type(method).__name__
    return f"{type(method).__name__} ({type(getattr(kernel, 'fused_experts', None) or kernel).__name__})"
