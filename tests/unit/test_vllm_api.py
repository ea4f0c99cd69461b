"""Calls of vLLM's engine that mean the same on each of its releases."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from verl_ascend_rollout.engine import vllm_api


@pytest.mark.parametrize("without_connector", [False, True], ids=["0.18", "0.23"])
@pytest.mark.parametrize("connected", [False, True])
@pytest.mark.parametrize("free", [False, True])
def test_a_reset_fails_only_where_a_request_holds_blocks(without_connector: bool, connected: bool, free: bool) -> None:
    """Which of the two answers a release gives that is asked for a connector and has none does not matter."""
    asked = []

    async def reset_prefix_cache(reset_connector: bool) -> bool:
        asked.append(reset_connector)
        return free and (not reset_connector or connected or without_connector)

    config: Any = SimpleNamespace(kv_transfer_config=object() if connected else None)
    engine = SimpleNamespace(vllm_config=config, reset_prefix_cache=reset_prefix_cache)
    assert asyncio.run(vllm_api.reset_prefix_cache(engine)) is free
    assert asked == [connected]


class OldEngine:
    """As much of `AsyncLLM` of vLLM 0.11 as is completed: requests by name, and what is asked of it."""

    def __init__(self) -> None:
        self.did: list[str] = []
        self.output_processor = SimpleNamespace(request_states={"inside": object()})
        self.output_processor.has_unfinished_requests = lambda: bool(self.output_processor.request_states)

    async def add_request(self, name: str) -> str:
        self.did.append(f"add {name}")
        return name

    async def abort(self, names: list[str]) -> None:
        self.did += [f"abort {name}" for name in names]
        self.output_processor.request_states.clear()

    async def reset_prefix_cache(self, device: object = None) -> None:
        self.did.append("reset")

    async def reset_mm_cache(self) -> None: ...

    async def sleep(self, level: int = 1) -> None:
        self.did.append(f"sleep {level}")


def test_an_engine_that_knows_no_pause_holds_requests_until_it_is_resumed() -> None:
    async def story() -> list[str]:
        engine: Any = OldEngine()
        vllm_api.complete(engine)
        vllm_api.complete(engine)
        assert not await engine.is_paused()
        assert await vllm_api.reset_prefix_cache(engine) is False  # a request is inside
        await vllm_api.sleep(engine, 2)
        assert await engine.is_paused()
        assert await vllm_api.reset_prefix_cache(engine) is True
        late = asyncio.create_task(engine.add_request("late"))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not late.done()
        await engine.resume_generation()
        assert await late == "late"
        return list(engine.did)

    assert asyncio.run(story()) == ["reset", "abort inside", "reset", "sleep 2", "reset", "add late"]


@pytest.mark.parametrize("keeps", [False, True], ids=["0.13", "0.18"])
def test_requests_in_flight_are_held_where_the_engine_can(keeps: bool) -> None:
    asked: list[dict[str, Any]] = []

    async def old(*, wait_for_inflight_requests: bool = False, clear_cache: bool = True) -> None:
        asked.append({"clear_cache": clear_cache})

    async def new(*, mode: str = "abort", clear_cache: bool = True) -> None:
        asked.append({"clear_cache": clear_cache, "mode": mode})

    asyncio.run(vllm_api.hold(SimpleNamespace(pause_generation=new if keeps else old)))
    assert asked == [{"clear_cache": False, "mode": "keep"} if keeps else {"clear_cache": False}]


def test_features_of_images_that_cannot_be_forgotten_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    for multimodal in (False, True, True):
        config = SimpleNamespace(model_config=SimpleNamespace(is_multimodal_model=multimodal))
        asyncio.run(vllm_api.reset_encoder_cache(SimpleNamespace(vllm_config=config)))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
