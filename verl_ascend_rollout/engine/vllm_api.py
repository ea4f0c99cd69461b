"""Calls of vLLM's engine whose meaning differs between its releases (`AsyncLLM`, v1/engine/async_llm.py)."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import types
from typing import Any

logger = logging.getLogger("verl_ascend_rollout.server")


def complete(engine: Any) -> None:
    """Give an engine of before 0.12 what later ones have: `pause_generation`, `resume_generation` and `is_paused`.

    As in 0.13: requests in flight are aborted, those that come wait, also if they come by vLLM's own HTTP server.
    """
    if hasattr(engine, "pause_generation"):
        return
    runs = asyncio.Event()
    runs.set()
    add_request = engine.add_request

    async def add_request_once_resumed(*args: Any, **kwargs: Any) -> Any:
        while not runs.is_set():
            await runs.wait()
        return await add_request(*args, **kwargs)

    async def pause_generation(self: Any, *, clear_cache: bool = True) -> None:
        runs.clear()
        await self.abort(list(self.output_processor.request_states))
        if clear_cache:
            await self.reset_prefix_cache()
            await self.reset_mm_cache()

    async def resume_generation(self: Any) -> None:
        runs.set()

    async def is_paused(self: Any) -> bool:
        return not runs.is_set()

    engine.add_request = add_request_once_resumed
    for function in (pause_generation, resume_generation, is_paused):
        setattr(engine, function.__name__, types.MethodType(function, engine))


def _takes(function: Any, parameter: str) -> bool:
    return parameter in inspect.signature(function).parameters


async def hold(engine: Any) -> None:
    """Pause the scheduler.  Requests in flight stay, and go on later; vLLM before 0.18 can only abort them."""
    keep = {"mode": "keep"} if _takes(engine.pause_generation, "mode") else {}
    await engine.pause_generation(clear_cache=False, **keep)


async def sleep(engine: Any, level: int) -> None:
    """Abort the requests in flight, pause the scheduler, and give the memory back.

    vLLM before 0.18 only does the last of that.
    """
    if not _takes(engine.sleep, "mode"):
        await engine.pause_generation(clear_cache=True)
    await engine.sleep(level=level)


async def reset_encoder_cache(engine: Any) -> None:
    """Forget the features of images.  vLLM 0.11 and 0.13 have no call for that, and one WARNING says so."""
    if hasattr(engine, "reset_encoder_cache"):
        await engine.reset_encoder_cache()
    elif engine.vllm_config.model_config.is_multimodal_model:
        _warn_of_old_features()


@functools.cache  # once a process
def _warn_of_old_features() -> None:
    logger.warning(
        "This vLLM cannot forget the features of images that it has computed with the weights of before a sync: an "
        "image that comes again may be answered for with old ones; freeze the vision tower, or take vLLM 0.18 or later"
    )


async def reset_prefix_cache(engine: Any) -> bool:
    """Forget the cached blocks, also those that a KV connector keeps elsewhere.

    A connector is only named where there is one: without, vLLM 0.18 answers that the reset has failed, also where it
    has not (v1/core/sched/scheduler.py:1882), and 0.23 that it has not.

    Args:
        engine: vLLM's `AsyncLLM`.

    Returns:
        False where a request still holds blocks.
    """
    if not _takes(engine.reset_prefix_cache, "reset_connector"):
        # vLLM 0.11 does not say.  Aborts come before this to the scheduler, which gives their blocks back at once.
        held = engine.output_processor.has_unfinished_requests()
        await engine.reset_prefix_cache()
        return not held
    connected = engine.vllm_config.kv_transfer_config is not None
    return bool(await engine.reset_prefix_cache(reset_connector=connected))
