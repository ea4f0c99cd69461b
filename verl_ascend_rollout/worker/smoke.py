"""`SmokeWorker`: smoke's part inside vLLM's worker process, where the tensors are.

vLLM imports this module when it makes its worker, before the worker does anything (v1/worker/worker_base.py of 0.11 and
0.28: `worker_extension_cls`).  So this is where the layouts of the model's weights begin to be recorded, also on a vLLM
to which our plug-in is not installed, and where the worker's own steps begin to be timed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from verl_ascend_rollout.worker import kv_cache
from verl_ascend_rollout.worker.lifecycle import AscendSafeLifecycle
from verl_ascend_rollout.worker.weights import bracket, layout

STEPS = ("load_model", "determine_available_memory", "initialize_from_config", "compile_or_warm_up_model")
"""What every vLLM worker does between its start and its first request (0.11 to 0.28, v1/worker/*_worker.py)."""

CAPTURE = "capture_model"

MARK_VARIABLE = "ASCEND_SAFE_STEP_MARK"
"""The environment variable by which smoke says what to print before a step's name, for its progress display."""

_seconds: dict[str, float] = {}
_running: set[str] = set()


def timed(name: str, method: Any) -> Any:
    """The method, which adds its seconds to `name`; what it calls of the same name is part of it."""

    @functools.wraps(method)
    def step(*args: Any, **kwargs: Any) -> Any:
        if name in _running:
            return method(*args, **kwargs)
        _running.add(name)
        mark = os.environ.get(MARK_VARIABLE)
        if mark:
            print(f"{mark}{name}", file=sys.stderr, flush=True)
        if name in STEPS and args:
            _watch_capture(args[0])
        started = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            _running.discard(name)
            _seconds[name] = _seconds.get(name, 0.0) + time.perf_counter() - started

    step._ascend_safe_timed = True  # type: ignore[attr-defined]
    return step


def watch_steps(base: type) -> None:
    """Time the steps of every worker class that there is.  A second call changes nothing."""
    classes = [base]
    for found in classes:
        classes += found.__subclasses__()
    for found in classes:
        for name in STEPS:
            method = vars(found).get(name)
            if callable(method) and not hasattr(method, "_ascend_safe_timed"):
                setattr(found, name, timed(name, method))


def _watch_capture(worker: Any) -> None:
    runner = getattr(worker, "model_runner", None)
    method = getattr(runner, CAPTURE, None)
    if callable(method) and not hasattr(method, "_ascend_safe_timed"):
        runner.capture_model = timed(CAPTURE, method)  # type: ignore[union-attr]


def _begin() -> None:
    layout.watch_new_models(importlib.import_module("vllm.model_executor.model_loader.base_loader"))
    watch_steps(importlib.import_module("vllm.v1.worker.worker_base").WorkerBase)


_begin()


class SmokeWorker(AscendSafeLifecycle):
    """Our lifecycle, with what smoke asks of it."""

    def ascend_safe_smoke_facts(self) -> dict[str, Any]:
        """What this worker is and has: times in seconds, sizes in bytes; `None` for what could not be found."""
        runner = self.model_runner
        config = runner.vllm_config
        model = bracket.unwrapped(runner)
        device = getattr(self, "device", None) or torch.device("cpu")
        available, total = kv_cache.memory(self)
        cache = runner.kv_cache_config if hasattr(runner, "kv_cache_config") else None
        groups = len(getattr(cache, "kv_cache_groups", None) or ()) or 1
        blocks, block_size = getattr(cache, "num_blocks", None), config.cache_config.block_size
        compilation = config.compilation_config
        return {
            "seconds": dict(_seconds),
            "compile_seconds": _number(getattr(compilation, "compilation_time", None)),
            "weight_bytes": weight_bytes(model),
            "kv_bytes": kv_cache.kv_bytes(self),
            "kv_tokens": blocks // groups * block_size if blocks is not None else None,
            "device_total": total,
            "device_free": available,
            "device": _device_name(device),
            "driver_toolkit": _toolkit(device.type),
            "stand_in": stand_in(Path("/proc/self/maps")),
            "isa": _isa() if device.type == "cpu" else [],
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "quantization": config.model_config.quantization or "",
            "eager": bool(config.model_config.enforce_eager),
            "graph_mode": _graph_mode(config),
            "graphs_captured": _graphs_captured(),
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
            "worker": type(self).__name__,
            "pid": os.getpid(),
        }

    def ascend_safe_smoke_reload(self, files: list[str], changed: bool) -> dict[str, Any]:
        """Load every weight again from a checkpoint's files, as a weight sync of the rollout does.

        Args:
            files: the checkpoint's, in safetensors.
            changed: load other values: each tensor turned by one place along its last axis, so that sizes and
                magnitudes stay.

        Returns:
            `tensors`, `bytes`, `seconds`.
        """
        from safetensors import safe_open

        def tensors(file: str) -> Iterator[tuple[str, torch.Tensor]]:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - a safetensors file is no mapping
                    tensor = opened.get_tensor(name)
                    yield name, tensor.roll(1, -1) if changed and tensor.dim() else tensor

        def receive(load: bracket.Loader) -> None:
            for file in files:
                load(tensors(file))

        return self._ascend_safe_reload(receive)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once.

    A weight that a kernel packed into a form of its own, and that vLLM emptied (vLLM 0.28 on a CPU, linear.py:202),
    counts as what it was before: the packed form has as many bytes or more.
    """
    storages: dict[int, int] = {}
    emptied = 0
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    for _, layer, record in layout.recorded_layers(model):
        for name, weight in record.weights.items():
            now = getattr(layer, name, None)
            if isinstance(now, torch.Tensor) and now.numel() == 0:
                elements = 1
                for size in weight.shape:
                    elements *= size
                emptied += elements * weight.dtype.itemsize
    return sum(storages.values()) + emptied


def stand_in(maps: Path) -> str:
    """What stands in for the hardware's runtime, told by the library that this process has loaded; empty: nothing.

    The stand-in for CANN that this project's tests run on (tests/npu_emulator) exports functions of its own beside
    CANN's, which Huawei's does not have.
    """
    with contextlib.suppress(OSError):
        for line in maps.read_text(encoding="utf-8", errors="replace").splitlines():
            path = line.partition("/")[2]
            if path.endswith("/libascendcl.so"):
                with contextlib.suppress(OSError):
                    if hasattr(ctypes.CDLL(f"/{path}"), "fake_cann_fail"):
                        return "a stand-in CANN (fake_cann, on host memory)"
                return ""
    return ""


def _chunked_prefill(config: Any) -> bool | None:
    for name in ("enable_chunked_prefill", "chunked_prefill_enabled"):
        value = getattr(config, name, None)
        if value is not None:
            return bool(value)
    return None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _device_name(device: torch.device) -> str | None:
    if device.type == "cpu":
        return None  # the process at the prompt knows it
    with contextlib.suppress(Exception):
        return str(torch.get_device_module(device).get_device_name(device.index or 0))
    return None


def _toolkit(kind: str) -> str | None:
    """CUDA's version, as torch was built with it, or CANN's, as torch_npu asks it."""
    if kind == "cuda":
        return torch.version.cuda or getattr(torch.version, "hip", None)
    if kind == "npu":
        with contextlib.suppress(Exception):
            found = importlib.import_module("torch_npu.npu.utils").get_cann_version("CANN")
            return str(found) or None
    return None


def _isa() -> list[str]:
    """The instruction sets of this CPU that vLLM's kernels are chosen by (vLLM 0.28, csrc/cpu)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return []
    flags = next(
        (line.partition(":")[2].split() for line in text.splitlines() if line.startswith(("flags", "Features"))), []
    )
    wanted = {"amx_tile": "amx", "avx512_bf16": "avx512_bf16", "avx512f": "avx512", "avx2": "avx2", "asimd": "neon"}
    return [name for flag, name in wanted.items() if flag in flags]


def _graph_mode(config: Any) -> str | None:
    if config.model_config.enforce_eager:
        return "NONE"
    mode = getattr(config.compilation_config, "cudagraph_mode", None)
    return getattr(mode, "name", None) or (str(mode) if mode is not None else None)


def _graphs_captured() -> int | None:
    """vLLM's own count, in which vllm-ascend's graphs are too (0.28, compilation/acl_graph.py:261)."""
    with contextlib.suppress(ImportError, AttributeError):
        return int(importlib.import_module("vllm.compilation.counter").compilation_counter.num_cudagraph_captured)
    return None


def _attention_backend(compilation: Any) -> str | None:
    for layer in (getattr(compilation, "static_forward_context", None) or {}).values():
        implementation = getattr(layer, "impl", None)
        if implementation is not None:
            return type(implementation).__name__
    return None


def _moe_backend(model: torch.nn.Module) -> str | None:
    """The method that runs the experts, and the kernel where it has one by itself."""
    for layer in model.modules():
        if not hasattr(layer, "w13_weight"):
            continue
        method = getattr(layer, "quant_method", None)
        if method is None:
            continue
        kernel = getattr(method, "moe_kernel", None)
        experts = getattr(kernel, "fused_experts", None)
        name = type(method).__name__
        return f"{name} ({type(experts or kernel).__name__})" if kernel is not None else name
    return None
