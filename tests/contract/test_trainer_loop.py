"""A trainer's loop ends when a rollout server says that its engine is dead, wherever it waits: in real Ray actors.

The server and the replica are fake; what ends the loop, the loop's waits and the driver's exception are real.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

SENTENCE = "The rollout engine of replica 0 died while it was awake: for the test"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    import ray

    # A process that has run the engine's tests keeps their Ray until its end.
    starts = not ray.is_initialized()
    if starts:
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield ray
    if starts:
        ray.shutdown()


def trainer_and_server(ray: Any) -> tuple[Any, Any]:
    @ray.remote(max_concurrency=10)
    class Server:
        async def engine_death(self, after: float = 1.0) -> str:
            import asyncio

            await asyncio.sleep(after)
            return SENTENCE

        async def never(self) -> None:
            import asyncio

            await asyncio.Event().wait()

    @ray.remote
    class Trainer:
        def fit(self, server: Any, where: str) -> str:
            import asyncio
            import contextlib
            import threading
            import time

            from verl_ascend_rollout.integration import engine_death

            class Replica(SimpleNamespace):
                __hash__ = object.__hash__

            replica = Replica(servers=[server])
            engine_death.follow(replica)
            with engine_death.ends_the_job():
                if where == "ray.get":
                    ray.get(server.never.remote())
                elif where == "asyncio":
                    asyncio.run(asyncio.Event().wait())
                elif where == "lock":
                    threading.Event().wait()
                elif where == "a call that failed":
                    time.sleep(1.2)
                    raise RuntimeError("EngineCore encountered an issue")
                elif where == "swallowed":
                    while True:
                        with contextlib.suppress(BaseException):
                            time.sleep(0.1)
                elif where == "ends before":
                    return "trained"
                while True:
                    time.sleep(0.1)

    return Trainer.remote(), Server.remote()


@pytest.mark.parametrize("where", ["polling", "ray.get", "asyncio", "lock", "a call that failed"])
def test_wherever_the_loop_waits_it_ends_with_the_sentence(cluster: Any, where: str) -> None:
    from verl_ascend_rollout.engine.death import EngineDiedError

    trainer, server = trainer_and_server(cluster)
    started = time.perf_counter()
    with pytest.raises(EngineDiedError, match=SENTENCE) as error:
        cluster.get(trainer.fit.remote(server, where), timeout=60)
    assert str(error.value).strip().endswith(SENTENCE), "the cause is in the last line"
    assert time.perf_counter() - started < 20


def test_a_loop_that_swallows_everything_is_ended_with_its_process(cluster: Any) -> None:
    trainer, server = trainer_and_server(cluster)
    with pytest.raises(cluster.exceptions.ActorDiedError):
        cluster.get(trainer.fit.remote(server, "swallowed"), timeout=60)


def test_a_server_that_is_killed_ends_the_loop_as_well(cluster: Any) -> None:
    from verl_ascend_rollout.engine.death import EngineDiedError

    trainer, server = trainer_and_server(cluster)
    # An engine that lives, until then.
    running = trainer.fit.remote(server, "ray.get")
    time.sleep(0.2)
    cluster.kill(server)
    with pytest.raises(
        EngineDiedError, match="A rollout server, .*Server.*, died, and its engine with it: .+|" + SENTENCE
    ):
        cluster.get(running, timeout=60)


def test_a_worker_that_is_killed_ends_the_loop_that_would_wait_for_it(cluster: Any) -> None:
    from verl_ascend_rollout.integration.engine_death import WorkerDiedError

    @cluster.remote
    class AgentLoopWorker:
        def process(self) -> int:
            return os.getpid()

    @cluster.remote
    class Trainer:
        def fit(self, workers: list[Any]) -> None:
            from verl_ascend_rollout.integration import engine_death

            with engine_death.ends_the_job(workers):
                while True:
                    time.sleep(0.1)

    workers = [AgentLoopWorker.remote() for _ in range(2)]
    process = cluster.get(workers[1].process.remote())
    running = Trainer.remote().fit.remote(workers)
    assert cluster.wait([running], timeout=4)[0] == [], "workers that live end nothing"
    os.kill(process, signal.SIGKILL)
    sentence = rf"AgentLoopWorker \(process {process} on \S+\) of this job died, .*: \S+"
    with pytest.raises(WorkerDiedError, match=sentence):
        cluster.get(running, timeout=60)


def test_control_a_loop_that_ends_before_is_left_alone(cluster: Any) -> None:
    trainer, server = trainer_and_server(cluster)
    assert cluster.get(trainer.fit.remote(server, "ends before"), timeout=60) == "trained"


def test_a_server_that_cannot_be_reached_just_now_is_not_dead(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl_ascend_rollout.integration import engine_death

    def unavailable(_: object) -> None:
        raise cluster.exceptions.ActorUnavailableError("a network that is away for a moment", None)

    monkeypatch.setattr(cluster, "get", unavailable)
    assert engine_death._death_of_server(None) is None
    assert engine_death._death_of_worker(None) is None


@pytest.mark.parametrize("how", ["waits", "ends by itself", "waits for ever in a call"])
def test_an_asynchronous_loop_does_not_end_as_if_it_had_trained(cluster: Any, how: str) -> None:
    from verl_ascend_rollout.engine.death import EngineDiedError

    @cluster.remote
    class Rollouter:
        async def fit(self, server: Any, how: str) -> str:
            import asyncio

            from verl_ascend_rollout.integration import engine_death

            class Replica(SimpleNamespace):
                __hash__ = object.__hash__

            async def part() -> None:
                if how == "waits":
                    await asyncio.Event().wait()
                elif how == "waits for ever in a call":
                    await server.never.remote()
                raise RuntimeError("EngineCore encountered an issue")

            async def loop() -> str:
                """As verl's: what a part raises is the end of the samples."""
                await asyncio.gather(part(), return_exceptions=True)
                return "trained"

            replica = Replica(servers=[server])
            engine_death.follow(replica)
            return await engine_death.end_with_the_engines(loop())

    _, server = trainer_and_server(cluster)
    with pytest.raises(EngineDiedError, match=SENTENCE):
        cluster.get(Rollouter.remote().fit.remote(server, how), timeout=60)


def test_control_an_asynchronous_loop_whose_engines_live_ends_as_it_does(cluster: Any) -> None:
    @cluster.remote
    class Rollouter:
        async def fit(self, fails: bool) -> str:
            import asyncio

            from verl_ascend_rollout.integration import engine_death

            async def loop() -> str:
                await asyncio.sleep(0.1)
                if fails:
                    raise KeyError("of the trainer's")
                return "trained"

            engine_death.PATIENCE = 0.1
            return await engine_death.end_with_the_engines(loop())

    rollouter = Rollouter.remote()
    assert cluster.get(rollouter.fit.remote(False), timeout=60) == "trained"
    with pytest.raises(KeyError, match="of the trainer's"):
        cluster.get(rollouter.fit.remote(True), timeout=60)


def test_the_loops_of_verls_asynchronous_trainers_are_ours(cluster: Any) -> None:
    """The classes behind Ray's, as verl makes actors of them."""
    from verl.experimental.fully_async_policy import fully_async_rollouter
    from verl.experimental.one_step_off_policy.ray_trainer import OneStepOffRayTrainer

    from verl_ascend_rollout import PATCHED

    rollouter = fully_async_rollouter.FullyAsyncRollouter.__ray_metadata__.modified_class
    assert getattr(rollouter.fit, PATCHED, ()) == ("death.end_fully_async_with_the_engine",)
    assert getattr(OneStepOffRayTrainer.fit, PATCHED, ()) == ("death.end_one_step_off_with_the_engine",)
    # Ray awaits no method that is not a coroutine function; and verl's own is behind it.
    assert inspect.iscoroutinefunction(rollouter.fit)
    with pytest.raises(ValueError, match="MessageQueue client not set"):
        asyncio.run(rollouter.fit(SimpleNamespace(message_queue_client=None)))
