"""Steps are counted where they pass through the server actor, for verl's trackers and for Prometheus."""

from __future__ import annotations

import asyncio
import inspect
import logging
import types
from typing import Any

import pytest
from prometheus_client import REGISTRY, generate_latest

from verl_ascend_rollout.engine.metrics import PROMETHEUS_NAME, StepMetrics, step_of
from verl_ascend_rollout.integration import tracking
from verl_ascend_rollout.integration.actor import AscendSafeServerActor


class Server:
    """A rollout server that does nothing, at the same pace as the real one's interface."""

    def __init__(self, prometheus: bool, node_rank: int = 0) -> None:
        self.replica_rank, self.node_rank, self.restarts = 3, node_rank, 0
        self.config = types.SimpleNamespace(prometheus=types.SimpleNamespace(enable=prometheus))

    async def sleep(self) -> str:
        return "slept"

    async def wake_up(self, tags: list[str] | None = None) -> None:
        raise RuntimeError("no memory")

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> None: ...

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = getattr(self, method)(*args, **kwargs)
        return await result if inspect.isawaitable(result) else result

    def get_master_address(self) -> tuple[str, int]:
        return ("localhost", 1)

    def take_routing(self) -> dict[str, int]:
        return {}

    async def memory(self) -> list[dict[str, int]]:
        return [{"kv_bytes": 1 << 30, "device_used": 0, "rss": 2, "pid": 1}]


def actor_of(monkeypatch: pytest.MonkeyPatch, **kwargs: Any) -> Any:
    monkeypatch.setattr("verl_ascend_rollout.integration.actor.server_class", lambda: Server)
    return AscendSafeServerActor(**kwargs)


def test_each_step_is_counted_once_and_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    actor = actor_of(monkeypatch, prometheus=False)

    async def steps() -> list[dict[str, Any]]:
        assert await actor.sleep() == "slept"
        with pytest.raises(RuntimeError, match="no memory"):
            await actor.wake_up(tags=["weights"])
        await actor.collective_rpc(method="update_weights_from_ipc")
        await actor.collective_rpc("something_else")
        assert await actor.get_master_address() == ("localhost", 1)
        return [await actor.step_metrics(), await actor.step_metrics()]

    first, second = asyncio.run(steps())
    assert sorted(first["seconds"]) == ["sleep", "sync", "wake_up"], "a step that failed has taken its time too"
    assert all(0 <= seconds < 60 for seconds in first["seconds"].values())
    assert second["seconds"] == {}
    assert first["memory"] == [{"kv_bytes": 1 << 30, "device_used": 0, "rss": 2, "pid": 1}]


def test_a_server_without_an_engine_is_not_asked_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    actor = actor_of(monkeypatch, prometheus=False, node_rank=1)
    assert asyncio.run(actor.step_metrics()) == {"seconds": {}, "memory": [], "restarts": 0, "routing": {}}


def test_prometheus_has_the_steps_where_verl_has_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    off = actor_of(monkeypatch, prometheus=False)
    asyncio.run(off.sleep())
    assert f'{PROMETHEUS_NAME}_count{{replica="3",step="sleep"}}' not in generate_latest(REGISTRY).decode()
    on = actor_of(monkeypatch, prometheus=True)
    asyncio.run(on.sleep())
    asyncio.run(on.sleep())
    text = generate_latest(REGISTRY).decode()
    assert f'{PROMETHEUS_NAME}_count{{replica="3",step="sleep"}} 2.0' in text
    assert f'{PROMETHEUS_NAME}_sum{{replica="3",step="sleep"}}' in text


def test_a_second_replica_in_one_process_counts_into_the_same_metric() -> None:
    StepMetrics(8, prometheus=True).add("sync", 0.5)
    StepMetrics(9, prometheus=True).add("sync", 0.25)
    text = generate_latest(REGISTRY).decode()
    assert f'{PROMETHEUS_NAME}_sum{{replica="8",step="sync"}} 0.5' in text
    assert f'{PROMETHEUS_NAME}_sum{{replica="9",step="sync"}} 0.25' in text


@pytest.mark.parametrize(
    ("method", "arguments", "keywords", "step"),
    [
        ("sleep", (), {}, "sleep"),
        ("release_kv_cache", (), {}, "sleep"),
        ("resume_kv_cache", (), {}, "wake_up"),
        ("abort_all_requests", (), {}, "abort"),
        ("collective_rpc", ("update_weights_from_ipc",), {}, "sync"),
        ("collective_rpc", (), {"method": "update_weights_from_ipc"}, "sync"),
        ("collective_rpc", (), {"method": "monkey_patch_model"}, None),
        ("collective_rpc", (), {}, None),
        ("generate", (), {}, None),
    ],
)
def test_which_calls_are_steps(
    method: str, arguments: tuple[Any, ...], keywords: dict[str, Any], step: str | None
) -> None:
    assert step_of(method, arguments, keywords) == step


def test_numbers_that_cannot_be_had_do_not_end_a_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(calls: list[Any], timeout: float) -> list[Any]:
        raise TimeoutError("the server is busy")

    asked: list[int] = []

    class Handle:
        step_metrics = types.SimpleNamespace(remote=lambda: asked.append(1))

    class Replica:
        servers = [Handle()]

    class Again:
        """The same replica, that came to this process by pickle."""

        servers = Replica.servers

    monkeypatch.setattr(tracking, "_replicas", {Replica(), Again()})
    monkeypatch.setattr("ray.get", refuse)
    # Importing vLLM's server raises the level of every handler of the root logger.
    with caplog.at_level(logging.WARNING):
        assert tracking.rollout_metrics() == {}
    assert "the server is busy" in caplog.text
    assert asked == [1], "a server is asked once"
