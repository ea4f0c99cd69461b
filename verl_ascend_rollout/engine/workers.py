"""Asking vLLM's workers: every worker of every shard, and an error as an answer (see `worker_rpc`)."""

from __future__ import annotations

import asyncio
from typing import Any

from verl_ascend_rollout.worker import worker_rpc


async def ask(engine: Any, method: str, keywords: dict[str, Any], timeout: float | None = None) -> list[Any]:
    """Call `method` of our worker extension on all workers.

    Args:
        engine: vLLM's `AsyncLLM`.
        method: the method's name.
        keywords: its arguments.
        timeout: seconds to wait; `None` waits.

    Returns:
        What each worker returned, by rank, shard after shard.

    Raises:
        WorkerError: it failed on a worker.
    """
    arguments = (method, keywords)
    core: Any = getattr(engine, "engine_core", None)
    shards = getattr(core, "core_engines", None) or ()
    if len(shards) > 1 and hasattr(core, "_call_utility_async"):
        # vLLM calls all data-parallel shards and returns the first one's answers (0.28, core_client.py:1524): an error
        # that is a value on another would be lost.
        parts = await asyncio.gather(
            *(
                core._call_utility_async("collective_rpc", "ascend_safe_call", timeout, arguments, {}, engine=shard)
                for shard in shards
            )
        )
        return worker_rpc.unwrap(method, [answer for part in parts for answer in part])
    return worker_rpc.unwrap(method, await engine.collective_rpc("ascend_safe_call", timeout=timeout, args=arguments))
