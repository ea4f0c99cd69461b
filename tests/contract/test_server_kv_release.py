"""The server's orders of free, sleep, wake-up and init, over vLLM's sleep mode.

vLLM's engine and executor are stood in for by what they keep count of; our server and worker code is the real one.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_ascend_rollout.engine.lifecycle import Lifecycle, Request
from verl_ascend_rollout.worker.kv_cache import Probe
from verl_ascend_rollout.worker.lifecycle import AscendSafeLifecycle

TAGS = {"weights", "kv_cache"}


class Worker(AscendSafeLifecycle):
    """Memory by tag, which may be unmapped, or mapped, only when it is not so already (cumem aborts otherwise)."""

    def __init__(self, method: Any) -> None:
        self.device = torch.device("cpu")
        self.model_runner = SimpleNamespace(kv_caches=[torch.zeros(64)])
        self._ascend_safe_probe = Probe(method)
        self.away: set[str] = set()

    def _unmap(self, tags: set[str]) -> None:
        assert not tags & self.away, f"{tags} unmapped twice"
        self.away |= tags

    def discard(self, tags: tuple[str, ...]) -> None:
        self._unmap(set(tags))

    def sleep(self, level: int) -> None:
        self._unmap(TAGS)

    def wake_up(self, tags: list[str]) -> None:
        assert set(tags) <= self.away, f"{tags} mapped twice"
        self.away -= set(tags)


class Engine:
    """`AsyncLLM`: its executor counts which tags sleep, and a wake-up of the last lets the scheduler go on (vllm 0.28,
    v1/executor/abstract.py, v1/engine/core.py)."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.sleeping, self.paused = worker, set[str](), False

    async def sleep(self, level: int = 1) -> None:
        self.paused = True
        if not self.sleeping:
            self.worker.sleep(level)
            self.sleeping = set(TAGS)

    async def wake_up(self, tags: list[str]) -> None:
        if self.sleeping and set(tags) <= self.sleeping:
            self.worker.wake_up(tags)
            self.sleeping -= set(tags)
        if not self.sleeping:
            self._go_on()

    def _go_on(self) -> None:
        assert not self.worker.away, "the scheduler runs on memory that is not there"
        self.paused = False

    async def is_paused(self) -> bool:
        return self.paused

    async def pause_generation(self, **_: Any) -> None:
        self.paused = True

    async def resume_generation(self) -> None:
        self._go_on()

    vllm_config = SimpleNamespace(kv_transfer_config=None)

    async def reset_prefix_cache(self, reset_connector: bool = False) -> bool:
        return True

    async def collective_rpc(self, method: str, timeout: float | None, args: tuple[Any, ...]) -> list[Any]:
        return [getattr(self.worker, method)(*args)]


def server_of(method: str) -> Any:
    from verl.workers.rollout.replica import RolloutMode

    from verl_ascend_rollout.integration.server import AscendSafeHttpServer

    server: Any = object.__new__(AscendSafeHttpServer)
    server.config = SimpleNamespace(free_cache_engine=True)
    server.rollout_mode, server.node_rank, server.replica_rank = RolloutMode.COLOCATED, 0, 0
    server._life, server._changed, server._step = Lifecycle(), asyncio.Event(), asyncio.Lock()
    server._kv_release, server._engine_sleeps, server._workers = method, False, []
    server.engine, server._watch = Engine(Worker(method)), None
    return server


@pytest.mark.parametrize("method", ["kv_only", "sleep"])
@settings(deadline=None)  # the first imports verl
@given(requests=st.lists(st.sampled_from(get_args(Request)), max_size=8))
def test_memory_is_where_the_state_says_in_every_order(method: str, requests: list[Request]) -> None:
    async def run() -> None:
        server = server_of(method)
        worker: Worker = server.engine.worker
        for request in requests:
            await server._change(request)
            state = server._life.state
            assert worker.away == {"awake": set(), "weights_only": {"kv_cache"}, "asleep": TAGS}[state]
            assert server.engine.paused == (state != "awake")
            (memory,) = await server.memory()
            assert (memory["kv_bytes"] == 0) == ("kv_cache" in worker.away)

    asyncio.run(run())


def test_the_kv_only_release_leaves_the_weights_alone() -> None:
    async def run() -> list[str]:
        server = server_of("kv_only")
        worker, calls = server.engine.worker, []
        for name in ("discard", "sleep", "wake_up"):
            real = getattr(worker, name)
            setattr(worker, name, lambda tags, name=name, real=real: (calls.append(f"{name} {tags}"), real(tags)))
        (freed,) = await server.free_cache_engine()
        (made,) = await server.init_cache_engine()
        assert (freed["kv_release"], freed["bytes_before"], freed["bytes_after"]) == ("kv_only", 256, 0)
        assert (made["changed"], made["bytes_after"]) == (True, 256)
        return calls

    assert asyncio.run(run()) == ["discard ('kv_cache',)", "wake_up ['kv_cache']"]


@pytest.mark.parametrize("method", ["kv_only", "sleep"])
@pytest.mark.parametrize("broken", ["discard", "sleep", "wake_up"])
def test_a_step_that_failed_half_way_can_be_mended(method: str, broken: str) -> None:
    async def run() -> None:
        from verl_ascend_rollout.engine.lifecycle import EngineNotReadyError

        for request in ("free", "sleep"):
            server = server_of(method)
            worker: Any = server.engine.worker
            real = getattr(worker, broken)

            def fail(*_: Any, **__: Any) -> None:
                raise RuntimeError("broken")

            setattr(worker, broken, fail)
            try:
                await server._change(request)
                await server._change("wake_all")
            except EngineNotReadyError:
                assert server._life.state == "dirty" and server.engine.paused
            setattr(worker, broken, real)
            await server._change("wake_all")
            assert server._life.state == "awake" and not worker.away and not server.engine.paused

    asyncio.run(run())
