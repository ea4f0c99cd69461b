"""An engine's death is noticed at its processes, ends what waits for it, and leaves nothing of it alive.

The engine is fake: real processes that sleep, and the few attributes of vLLM's `AsyncLLM` that are read.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from verl_ascend_rollout.engine import causes
from verl_ascend_rollout.engine.death import EngineDiedError, Watch

HERE = socket.gethostname()


@pytest.fixture
def parts() -> Any:
    """An EngineCore, which is this process's child, and a worker, whose exit code nobody here is told."""
    core = multiprocessing.get_context("spawn").Process(
        target=time.sleep, args=(60,), daemon=True, name="EngineCore_DP0"
    )
    core.start()
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield core, worker
    core.kill()
    worker.kill()
    worker.wait()


def watch_over(worker: int, host: str = HERE, errored: bool = False) -> Watch:
    watch = Watch(engine=SimpleNamespace(errored=errored))
    watch.follow([{"pid": worker, "host": host}])
    return watch


async def dies(worker: int, kill: int) -> tuple[str, float, bool]:
    """Kill while a call waits without end: the error, the seconds until it came, and whether the call was ended."""
    watch = watch_over(worker)
    watching = asyncio.create_task(watch.watch())
    ended = False

    async def waits_for_ever() -> None:
        nonlocal ended
        try:
            await asyncio.Event().wait()
        finally:
            ended = True

    call = asyncio.create_task(watch.while_alive(waits_for_ever()))
    await asyncio.sleep(0.1)
    assert not call.done()
    started = time.perf_counter()
    os.kill(kill, signal.SIGKILL)
    with pytest.raises(EngineDiedError) as error:
        await call
    seconds = time.perf_counter() - started
    await watching
    begun = []

    async def begins() -> None:
        begun.append(True)

    with pytest.raises(EngineDiedError):
        await watch.while_alive(begins())
    assert not begun, "no part of a call is for the next engine"
    return str(error.value), seconds, ended


@pytest.mark.parametrize("part", ["EngineCore", "worker 0"])
def test_a_call_that_waits_ends_when_a_part_is_killed_and_the_other_goes_too(parts: Any, part: str) -> None:
    core, worker = parts
    killed = core.pid if part == "EngineCore" else worker.pid
    said, seconds, ended = asyncio.run(dies(worker.pid, killed))
    assert f"its {part} (process {killed})" in said
    if part == "EngineCore":
        assert "ended by SIGKILL, as the kernel does it when memory runs out" in said
    assert seconds < 2 and ended
    core.join(5)
    assert worker.wait(5) == core.exitcode == -signal.SIGKILL


def test_the_cause_is_the_engine_core_where_its_worker_was_gone_first(parts: Any) -> None:
    """One of ten kills of an EngineCore was seen so: the kernel takes a while to clear a large process away."""
    core, worker = parts

    async def both() -> str:
        watch = watch_over(worker.pid)
        assert not watch.look()
        watching = asyncio.create_task(watch.watch())
        worker.kill()
        worker.wait()
        assert watch.look() and "its worker 0" in watch.cause.result()
        core.kill()
        return await watching

    said = asyncio.run(both())
    assert said == f"its EngineCore (process {core.pid}) ended by SIGKILL, as the kernel does it when memory runs out"


class Log(causes.Printed):
    """What an EngineCore prints as it ends because a worker has."""

    def lines(self) -> Iterator[str]:
        yield "(EngineCore pid=9) ERROR 11-30 07:41:27 [core.py:1348] EngineCore encountered a fatal error.\n"
        yield "(EngineCore pid=9) ERROR 11-30 07:41:27 [core.py:1348] RuntimeError: Executor failed.\n"


@pytest.mark.parametrize("first", ["worker", "EngineCore", "vLLM"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_after_an_engine_core_has_given_up_is_no_cause(parts: Any, first: str, number: int) -> None:
    """vLLM sends them itself: SIGTERM, and after 5 s SIGKILL.  The worker that ended before is the cause."""
    core, worker = parts

    async def both() -> str:
        watch = watch_over(worker.pid)
        watch.printed = Log()
        assert not watch.look()
        watch.engine.errored = first == "vLLM"
        if first != "EngineCore":
            watching = asyncio.create_task(watch.watch())
            if first == "worker":
                worker.kill()
                worker.wait()
            assert watch.look()
        os.kill(core.pid, number)
        worker.kill()
        worker.wait()
        core.join(5)
        return await (watch.watch() if first == "EngineCore" else watching)

    said = asyncio.run(both())
    named = f"its worker 0 (process {worker.pid}) ended without being asked to"
    assert said == (named if first == "worker" else f"its EngineCore (process {core.pid}) and {named}")


def test_the_coordinator_of_engines_is_looked_at_as_well(parts: Any) -> None:
    core, worker = parts
    coordinator = multiprocessing.get_context("spawn").Process(
        target=time.sleep, args=(60,), daemon=True, name="VLLM_DP_Coordinator"
    )
    coordinator.start()
    said, _, _ = asyncio.run(dies(worker.pid, coordinator.pid))
    assert f"its DP coordinator (process {coordinator.pid}) ended by SIGKILL" in said
    assert not core.is_alive()


def test_control_while_the_engine_lives_calls_answer_and_fail_as_they_are(parts: Any) -> None:
    async def calls() -> None:
        watch = watch_over(parts[1].pid)
        watching = asyncio.create_task(watch.watch())
        assert await watch.while_alive(asyncio.sleep(0.6, "answer")) == "answer"
        with pytest.raises(TimeoutError):
            await watch.while_alive(asyncio.wait_for(asyncio.Event().wait(), 0.1))
        assert not watch.died
        watching.cancel()

    asyncio.run(calls())


def test_a_call_that_vllm_fails_has_the_cause_all_the_same(parts: Any) -> None:
    """vLLM fails calls before the processes of its engine are gone."""

    async def fails() -> None:
        raise RuntimeError("EngineCore encountered an issue")

    async def call() -> None:
        watch = watch_over(os.getpid(), host="another", errored=True)
        watching = asyncio.create_task(watch.watch())
        with pytest.raises(EngineDiedError, match="vLLM reported that its EngineCore failed"):
            await watch.while_alive(fails())
        await watching

    asyncio.run(call())
