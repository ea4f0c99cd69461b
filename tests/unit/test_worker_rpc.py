"""An error in a worker is an answer like any other, and whoever asked raises it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from verl_ascend_rollout.engine import workers
from verl_ascend_rollout.worker import worker_rpc


def boom() -> None:
    raise KeyError("layer 3")


def test_values_and_errors_come_back() -> None:
    assert worker_rpc.unwrap(
        "ask", [worker_rpc.capture(lambda: 7, "ask"), worker_rpc.capture(lambda: None, "ask")]
    ) == [
        7,
        None,
    ]


def test_every_failure_is_in_one_message() -> None:
    replies = [
        worker_rpc.capture(boom, "init"),
        worker_rpc.capture(lambda: 1, "init"),
        worker_rpc.capture(boom, "init"),
    ]
    with pytest.raises(
        worker_rpc.WorkerError, match=r"^init failed: worker 0: KeyError: 'layer 3'; worker 2: KeyError"
    ):
        worker_rpc.unwrap("init", replies)


def test_the_only_worker_is_not_counted() -> None:
    with pytest.raises(worker_rpc.WorkerError, match=r"^init failed: KeyError: 'layer 3'$"):
        worker_rpc.unwrap("init", [worker_rpc.capture(boom, "init")])


def ask(engine: Any) -> list[Any]:
    return asyncio.run(workers.ask(engine, "ascend_safe_memory", {"kv_asleep": True}, 5.0))


def test_one_shard_is_asked_through_vllm() -> None:
    asked: list[Any] = []

    async def collective_rpc(method: str, timeout: float, args: tuple[Any, ...]) -> list[Any]:
        asked.append((method, timeout, args))
        return [worker_rpc.capture(lambda: "first", "ask")]

    core = SimpleNamespace(core_engines=["one"])
    assert ask(SimpleNamespace(collective_rpc=collective_rpc, engine_core=core)) == ["first"]
    assert asked == [("ascend_safe_call", 5.0, ("ascend_safe_memory", {"kv_asleep": True}))]


def test_an_error_on_the_second_shard_is_not_lost() -> None:
    """vLLM's own collective_rpc returns the first shard's answers alone."""

    async def call(method: str, *arguments: Any, engine: str) -> list[Any]:
        assert (method, *arguments) == (
            "collective_rpc", "ascend_safe_call", 5.0, ("ascend_safe_memory", {"kv_asleep": True}), {},
        )  # fmt: skip
        return [worker_rpc.capture(boom if engine == "two" else lambda: engine, "ask")]

    core = SimpleNamespace(core_engines=["one", "two"], _call_utility_async=call)
    with pytest.raises(worker_rpc.WorkerError, match="worker 1: KeyError: 'layer 3'"):
        ask(SimpleNamespace(engine_core=core))
    core.core_engines = ["one", "three"]
    assert ask(SimpleNamespace(engine_core=core)) == ["one", "three"]
