"""The real engine that a bench measures."""

from __future__ import annotations

import os
from typing import Any

WORKER = "verl_ascend_rollout.tools.bench.worker.BenchWorker"


def start(model: str, kv_bytes: int, **arguments: Any) -> Any:
    """Start vLLM on a checkpoint's config.json, eager, with random weights and `BenchWorker` in its worker."""
    # What vLLM and its processes print belongs to nobody who reads a table.
    for name, value in {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "ASCEND_SAFE_LOGGING_LEVEL": "WARNING",
        "VLLM_ASCEND_ENABLE_NZ": "0",
    }.items():
        os.environ.setdefault(name, value)
    from vllm import LLM

    return LLM(
        model,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=True,
        max_num_seqs=4,
        kv_cache_memory_bytes=kv_bytes,
        worker_extension_cls=WORKER,
        enable_prefix_caching=False,
        **arguments,
    )


def call(engine: Any, method: str, *arguments: Any) -> Any:
    """Call a method of the engine's worker, the first where there are several."""
    return engine.collective_rpc(method, args=arguments)[0]
