"""A rollout server of the verl that comes first on the path, over an engine that only keeps what is asleep and paused.

All of verl's server and of ours is real, from `__init__` to `generate`; the engines stand in for vLLM's `AsyncLLM` of
0.23 and later, of 0.13, and of 0.11.  Called in a fresh process (see `fresh_process`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.metadata
import random
import sys
import time
import types
from collections.abc import AsyncIterator, Iterable
from types import SimpleNamespace
from typing import Any, Literal

from packaging.version import Version

REPORT = {
    "kv_release": "sleep",
    "kv_bytes": 1,
    "obstacles": [],
    "weight_path": "verl",
    "weight_path_obstacles": [],
    "experts": "apart",
    "pid": 1,
    "host": "another",
}
MEMORY = {"kv_bytes": 1, "rss": 1, "pid": 1, "device_used": 1}


class Engine011:
    """vLLM 0.11: weights and KV cache that are there or away, and requests, which an engine runs as long as it has any.

    Neither a sleep nor a wake-up knows of requests.
    """

    def __init__(self) -> None:
        self.asleep: set[str] = set()
        self.levels: list[int] = []
        self.reached_asleep: list[str] = []
        self.states: dict[str, Any] = {}
        self.output_processor = SimpleNamespace(
            request_states=self.states,
            has_unfinished_requests=lambda: bool(self.states),
            abort_requests=self._abort,
        )
        self.engine_core = SimpleNamespace(abort_requests_async=self.abort)
        self.errored = False
        self.fails_to_abort = False
        self.vllm_config = SimpleNamespace(
            kv_transfer_config=None, model_config=SimpleNamespace(is_multimodal_model=False)
        )

    def _abort(self, names: Iterable[str]) -> None:
        for name in list(names):
            if name in self.states:
                self.states.pop(name).aborted = True

    async def abort(self, names: Iterable[str]) -> None:
        if self.fails_to_abort:
            raise RuntimeError("no answer from the core")
        self._abort(names)

    async def sleep(self, level: int) -> None:
        assert not self.asleep, "vLLM lets nothing fall asleep twice"
        self.asleep = {"weights", "kv_cache"}
        self.levels.append(level)

    async def wake_up(self, tags: list[str] | None = None) -> None:
        await asyncio.sleep(0)
        self.asleep -= set(tags or ("weights", "kv_cache"))

    async def reset_prefix_cache(self, device: Any = None) -> None: ...

    async def reset_mm_cache(self) -> None: ...

    async def collective_rpc(self, method: str, timeout: float | None = None, args: Any = (), **rest: Any) -> list[Any]:
        if method in ("sleep", "wake_up"):  # past everything, as the adapter of verl 0.7.1 does it
            self.asleep = {"weights", "kv_cache"} if method == "sleep" else set()
            return [None]
        assert method == "ascend_safe_call", method
        answers = {"ascend_safe_configure": REPORT, "ascend_safe_memory": MEMORY}
        return [{"ascend_safe_value": answers.get(args[0])}]

    async def add_request(self, name: str) -> Any:
        self.states[name] = SimpleNamespace(
            aborted=False, make_request_output=lambda *_, **__: None, queue=SimpleNamespace(put=lambda _: None)
        )
        if self.asleep:
            self.reached_asleep.append(name)
        return self.states[name]

    def holds(self) -> bool:
        """Return whether the scheduler makes no step for a request that is inside."""
        return False

    async def generate(self, *, request_id: str, **_: Any) -> AsyncIterator[Any]:
        state = await self.add_request(request_id)
        try:
            for step in range(20):
                await asyncio.sleep(0.001)
                while self.holds() and not state.aborted:
                    await asyncio.sleep(0.001)
                assert state.aborted or not self.asleep, "a step over memory that is not there"
                reason = "abort" if state.aborted else "length" if step == 19 else None
                output = SimpleNamespace(token_ids=[7], logprobs=None, finish_reason=reason, routed_experts=None)
                # verl 0.9.1 counts a request as admitted from the first output on.
                yield SimpleNamespace(outputs=[output], metrics=None, prompt_logprobs=None)
                if state.aborted:
                    break
        finally:
            self.states.pop(request_id, None)


class Engine013(Engine011):
    """vLLM 0.13: a pause aborts what is inside, and holds what comes until it ends."""

    def __init__(self) -> None:
        super().__init__()
        self.paused = False

    async def is_paused(self) -> bool:
        return self.paused

    async def pause_generation(self, *, wait_for_inflight_requests: bool = False, clear_cache: bool = True) -> None:
        await asyncio.sleep(0)
        if not self.paused:
            self.paused = True
            await self.abort(self.states)

    async def resume_generation(self) -> None:
        assert not self.asleep, "requests would come to memory that is not there"
        self.paused = False

    async def reset_prefix_cache(  # type: ignore[override]
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        return not reset_connector

    async def add_request(self, name: str) -> Any:
        while self.paused:
            await asyncio.sleep(0.001)
        return await super().add_request(name)


class Engine(Engine013):
    """vLLM 0.23 and later: a scheduler that runs or is paused, and is so after a sleep and until a whole wake-up."""

    async def pause_generation(  # type: ignore[override]
        self, *, mode: str = "abort", wait_for_inflight_requests: bool | None = None, clear_cache: bool = True
    ) -> None:
        await asyncio.sleep(0)
        if self.fails_to_abort:
            raise RuntimeError("no answer from the core")
        self.paused = True
        if mode == "abort":
            self._abort(self.states)

    async def sleep(self, level: int, mode: str = "abort") -> None:
        await self.pause_generation(mode=mode)
        await super().sleep(level)

    async def wake_up(self, tags: list[str] | None = None) -> None:
        await super().wake_up(tags)
        if not self.asleep:
            self.paused = False

    async def reset_encoder_cache(self) -> None: ...

    async def add_request(self, name: str) -> Any:
        return await Engine011.add_request(self, name)

    def holds(self) -> bool:
        return self.paused


class MortalEngine(Engine):
    """One that can die: then nothing that it was asked is ever answered, and vLLM says that it has failed."""

    def __init__(self) -> None:
        super().__init__()
        self.sync = 0

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name in ("is_paused", "pause_generation", "resume_generation", "sleep", "wake_up", "collective_rpc"):

            @functools.wraps(found)
            async def call(*args: Any, **kwargs: Any) -> Any:
                await asyncio.sleep(0.002)
                answer = await found(*args, **kwargs)
                await self.lives()
                return answer

            return call
        return found

    async def lives(self) -> None:
        if self.errored:
            await asyncio.Event().wait()

    async def collective_rpc(self, method: str, timeout: float | None = None, args: Any = (), **_: Any) -> list[Any]:
        if args[0] == "ascend_safe_load_snapshot":
            self.sync = args[1]["snapshot"]["sync"]
        elif args[0] == "update_weights_from_ipc":
            assert "weights" not in self.asleep
            self.sync = args[1]["sync"]
        elif args[0] == "ascend_safe_configure":
            return [{"ascend_safe_value": {**REPORT, "weight_path": "by_layout"}}]
        return await super().collective_rpc(method, timeout, args)

    async def generate(self, *, request_id: str, **rest: Any) -> AsyncIterator[Any]:
        async for output in super().generate(request_id=request_id, **rest):
            await self.lives()
            output.outputs[0].token_ids = [self.sync]
            yield output

    def shutdown(self) -> None: ...


ENGINES = {"0.11": Engine011, "0.13": Engine013, "": Engine}
"""By the release of vLLM; the last for those since."""


async def start(
    checkpoint: str,
    vllm: str = "",
    mode: str = "HYBRID",
    take: Literal["right", "gate", "verl's"] = "right",
    make: type[Engine011] | None = None,
    options: dict[str, Any] | None = None,
) -> tuple[Any, Any]:
    """Make the server as verl does, and give it the engine where verl would start vLLM's.

    Args:
        vllm: a key of ENGINES.
        take: which class of server: the one for this verl, the one that relies on verl's gate, or verl's own.
        make: the engine, each time that verl would; by default one of ENGINES.
        options: of ours.
    """
    import ray

    from verl_ascend_rollout import plugin

    plugin.require_registered()  # as the driver's hydra plug-in does, for a verl without entry points
    old = importlib.metadata.version("verl") in ("0.7.1", "0.8.0")
    if old:
        # It imports of its vLLM what later ones have elsewhere, for a quantization that no engine of this test has.
        quantized = types.ModuleType("verl.utils.vllm.vllm_fp8_utils")
        vars(quantized).update(dict.fromkeys(("apply_vllm_fp8_patches", "is_fp8_model", "load_quanted_weights")))
        sys.modules[quantized.__name__] = quantized
    from verl.workers.config import HFModelConfig, RolloutConfig
    from verl.workers.rollout.replica import RolloutMode
    from verl.workers.rollout.vllm_rollout import vllm_async_server

    from verl_ascend_rollout.engine import message_queues
    from verl_ascend_rollout.integration import actor, server
    from verl_ascend_rollout.platforms.detect import planned

    async def run_server(self: Any, args: Any) -> None:
        self.engine = (make or ENGINES[vllm])()
        self._server_task = asyncio.create_task(asyncio.sleep(0))
        self._server_address, self._server_port = "127.0.0.1", 8000

    verls = vllm_async_server.vLLMHttpServer
    verls.run_server = run_server
    if vllm:
        vllm_async_server._VLLM_VERSION = Version(f"{vllm}.0")
    # Of a platform whose level, 1, is not verl's own answer here.
    server.detect = lambda: planned("npu", "A2", {"vllm": "0.23.0", "vllm_ascend": "0.23.0", "torch_npu": "2.10.0"})
    message_queues.unlink = lambda: None
    ray.get_runtime_context = lambda: SimpleNamespace(get_job_id=lambda: "1", get_node_id=lambda: "node")
    ray.util.get_node_ip_address = lambda: "127.0.0.1"
    rollout = RolloutConfig(name="ascend_safe", prompt_length=64, response_length=16, enable_chunked_prefill=True)
    rollout.engine_kwargs["ascend_safe"] = options or {}
    it = {"right": actor.server_class, "gate": lambda: server.AscendSafeHttpServer, "verl's": lambda: verls}[take]()(
        config=rollout,
        model_config=HFModelConfig(path=checkpoint),
        rollout_mode=RolloutMode[mode],
        workers=[],
        replica_rank=0,
        node_rank=0,
        gpus_per_node=1,
        nnodes=1,
        cuda_visible_devices="0",
    )
    await it.run_server(None)
    return it, it.engine


async def turns() -> None:
    """Let the event loop go round a hundred times; a fifth of a second is one turn where the machine is busy."""
    for _ in range(100):
        await asyncio.sleep(0.002)


class Requests:
    """Requests to a server, and how each of them ended."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._tasks: list[asyncio.Task[Any]] = []

    def start(self, count: int = 1) -> None:
        for _ in range(count):
            name = f"request-{len(self._tasks)}"
            self._tasks.append(asyncio.create_task(self._server.generate([1, 2, 3], {}, name)))

    async def settled(self) -> list[str]:
        """What each has come to once nothing moves any more: a stop reason, or `waits`."""
        await turns()
        return [task.result().stop_reason if task.done() else "waits" for task in self._tasks]


def orders(checkpoint: str, vllm: str = "") -> dict[str, Any]:
    """What the orders that trainers use lead to."""
    return asyncio.run(_orders(checkpoint, vllm))


async def _orders(checkpoint: str, vllm: str) -> dict[str, Any]:
    found: dict[str, Any] = {"verl": importlib.metadata.version("verl")}

    async def fresh(mode: str = "HYBRID") -> tuple[Any, Any, Requests]:
        server, engine = await start(checkpoint, vllm, mode)
        return server, engine, Requests(server)

    async def ends(engine: Any, ended: list[str]) -> dict[str, Any]:
        return {"paused": await engine.is_paused(), "requests": ended, "reached asleep": engine.reached_asleep}

    server, engine, requests = await fresh()
    found["class"] = type(server).__name__
    requests.start()
    while not engine.states:
        await asyncio.sleep(0)
    await server.abort_all_requests()
    requests.start()
    between = await requests.settled()
    held = len(engine.states)
    await server.resume_generation()
    await requests.settled()
    await server.sleep()
    await server.wake_up()
    requests.start()
    found["abort, resume, sleep, wake up"] = {
        "between": between,
        "in the engine": held,
        "level": engine.levels,
        **await ends(engine, await requests.settled()),
    }

    server, engine, requests = await fresh()
    await server.sleep()
    requests.start()
    away = await requests.settled()
    await server.wake_up(["weights"])
    await server.collective_rpc("update_weights_from_ipc")
    half = await requests.settled()
    await server.wake_up(["kv_cache"])
    found["a request while asleep"] = {"asleep": away, "half": half, **await ends(engine, await requests.settled())}

    server, engine, requests = await fresh()
    await server.abort_all_requests()
    await server.sleep()
    requests.start()
    await server.wake_up(["weights"])
    await server.collective_rpc("update_weights_from_ipc")
    await server.wake_up(["kv_cache"])
    before = await requests.settled()
    await server.resume_generation()
    found["abort, sleep, sync, wake up, resume"] = {"before": before, **await ends(engine, await requests.settled())}

    server, engine, requests = await fresh("STANDALONE")
    await server.abort_all_requests()
    await server.release_kv_cache()
    await server.collective_rpc("update_weights_from_ipc")
    await server.resume_kv_cache()
    requests.start()
    before = await requests.settled()
    await server.resume_generation()
    found["a trainer apart"] = {"before": before, **await ends(engine, await requests.settled())}

    server, engine, requests = await fresh()
    engine.fails_to_abort = True
    try:
        await server.abort_all_requests()
        found["an abort that fails"] = "is taken for one that did not"
    except RuntimeError as error:
        found["an abort that fails"] = str(error)
    return found


def without_gate(checkpoint: str) -> dict[str, Any]:
    """What the class for verl 0.9.1 does with a request while asleep, and after an abort and its end."""
    return asyncio.run(_without_gate(checkpoint))


async def _without_gate(checkpoint: str) -> dict[str, Any]:
    server, engine = await start(checkpoint, take="gate")
    await server.abort_all_requests()
    await server.resume_generation()
    await server.sleep()
    Requests(server).start()
    await turns()
    await server.wake_up()
    return {"reached asleep": len(engine.reached_asleep), "paused": engine.paused}


def verls_own(checkpoint: str) -> dict[str, Any]:
    """What verl 0.7.1's own server does with a request after its adapter has put the engine to sleep."""
    return asyncio.run(_verls_own(checkpoint))


async def _verls_own(checkpoint: str) -> dict[str, Any]:
    server, engine = await start(checkpoint, "0.13", take="verl's")
    await server.collective_rpc("sleep", kwargs={"level": 2})
    Requests(server).start()
    await turns()
    return {"reached asleep": len(engine.reached_asleep)}


def storm(checkpoint: str, seed: int, vllm: str = "") -> dict[str, Any]:
    """Everything in random order, some of it at once, with requests in flight: how the requests ended."""
    return asyncio.run(_storm(checkpoint, seed, vllm))


async def _storm(checkpoint: str, seed: int, vllm: str) -> dict[str, Any]:
    source = random.Random(seed)
    server, engine = await start(checkpoint, vllm)
    requests = Requests(server)
    calls = {
        "sleep": server.sleep,
        "wake": server.wake_up,
        "wake weights": lambda: server.wake_up(["weights"]),
        "wake kv": lambda: server.wake_up(["kv_cache"]),
        "free": server.free_cache_engine,
        "init": server.init_cache_engine,
        "abort": server.abort_all_requests,
        "resume": server.resume_generation,
        "sync": lambda: server.collective_rpc("update_weights_from_ipc"),
    }
    if vllm:  # verl 0.7.1: as its adapter does it
        calls["sleep"] = lambda: server.collective_rpc("sleep", kwargs={"level": 2})
        calls["wake weights"] = lambda: server.collective_rpc("wake_up", kwargs={"tags": ["weights"]})
        calls["wake kv"] = lambda: server.collective_rpc("wake_up", kwargs={"tags": ["kv_cache"]})
    started: list[asyncio.Task[Any]] = []
    for _ in range(200):
        for name in source.sample(sorted(calls), source.choice((1, 1, 2, 3))):
            started.append(asyncio.create_task(calls[name]()))
        requests.start(source.choice((0, 1, 2)))
        await asyncio.sleep(source.choice((0, 0, 0.002)))
    await asyncio.wait_for(asyncio.gather(*started), 60)
    await server.wake_up()
    await server.resume_generation()
    requests.start(4)
    ended = await requests.settled()
    return {
        "ends": {reason: ended.count(reason) for reason in sorted(set(ended))},
        "last": ended[-4:],
        "paused": await engine.is_paused(),
        "asleep": sorted(engine.asleep),
        "reached asleep": len(engine.reached_asleep),
    }


def abort_while_asleep(checkpoint: str, stock: bool, barrier: float) -> float:
    """Seconds that an abort takes when requests reach an engine that is asleep, having passed both gates before.

    Args:
        stock: leave the abort to verl.
        barrier: for how long verl waits for the first token of each, instead of its minute.
    """
    return asyncio.run(_abort_while_asleep(checkpoint, stock, barrier))


async def _abort_while_asleep(checkpoint: str, stock: bool, barrier: float) -> float:
    server, engine = await start(checkpoint)
    from verl.workers.rollout.vllm_rollout import vllm_async_server

    vllm_async_server._GATE_BARRIER_TIMEOUT_S = barrier
    if stock:
        server._abort_what_a_paused_engine_holds = lambda: asyncio.sleep(0)
    add = engine.add_request

    async def add_late(name: str) -> Any:
        while not engine.asleep:
            await asyncio.sleep(0)
        return await add(name)

    engine.add_request = add_late
    requests = Requests(server)
    requests.start(8)
    while server._admitting < 8:
        await asyncio.sleep(0)
    await server.sleep()
    started = time.perf_counter()
    await server.abort_all_requests()
    seconds = time.perf_counter() - started
    assert await requests.settled() == ["aborted"] * 8
    return seconds


def deaths(checkpoint: str, seed: int, deaths: int, limit: int) -> dict[str, Any]:
    """The steps of a trainer, while engines die at any moment: which weights each request was answered with, and with
    which it should have been; how many engines there were; and the last error."""
    return asyncio.run(_deaths(checkpoint, seed, deaths, limit))


async def _deaths(checkpoint: str, seed: int, deaths: int, limit: int) -> dict[str, Any]:
    from verl_ascend_rollout.engine import death
    from verl_ascend_rollout.transport.snapshot import SnapshotWriter

    death.POLL_SECONDS = death.LAST_WORDS_SECONDS = 0.003
    source, writer = random.Random(seed), SnapshotWriter()
    made: list[MortalEngine] = []

    class Made(MortalEngine):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    server, _ = await start(checkpoint, make=Made, options={"on_engine_death": "restart", "max_engine_restarts": limit})
    from verl_ascend_rollout.integration import server as module

    module.HOLD_SECONDS = 0.01

    async def sync(number: int) -> None:
        # As the adapter does it.
        writer.begin(number)
        with contextlib.suppress(death.EngineDiedError):
            await server.call("collective_rpc", ("update_weights_from_ipc",), {"kwargs": {"sync": number}})
        await server.call("keep_snapshot", (writer.finish().as_dict(),), {})

    async def dies() -> None:
        for _ in range(deaths):
            await asyncio.sleep(source.uniform(0, 0.2))
            made[-1].errored = True

    answered: list[tuple[int, int]] = []
    error = ""
    dying: asyncio.Task[None] | None = None
    try:
        for number in range(1, 13):
            await server.call("sleep", (), {})
            await server.call("wake_up", (), {"tags": ["weights"]})
            await sync(number)
            if number == 1:
                dying = asyncio.create_task(dies())
            await server.call("wake_up", (), {"tags": ["kv_cache"]})
            if source.random() < 0.3:
                await server.call("abort_all_requests", (), {})
                await server.call("resume_generation", (), {})
            calls = [
                server.call("generate", ([1, 2, 3], {"max_tokens": 20}, f"{number}-{index}"), {}) for index in range(5)
            ]
            for output in await asyncio.wait_for(asyncio.gather(*calls), 30):
                assert output.stop_reason == "completed"
                answered.append((number, output.token_ids[0]))
    except death.EngineDiedError as died:
        error = str(died)
    if dying is not None and not error:
        await dying
    return {
        "wrong": [pair for pair in answered if pair[0] != pair[1]],
        "answered": len(answered),
        "engines": len(made),
        "error": error,
        "reached asleep": sum(len(engine.reached_asleep) for engine in made),
    }


def not_started(checkpoint: str) -> list[str]:
    """What the server raises where vLLM does not start the engine: its own words point elsewhere, or are the cause."""

    class Dies:
        def __init__(self) -> None:
            print("(EngineCore pid=9) ERROR 11-22 04:00:00 [core.py:1] ValueError: no room for one request", flush=True)
            raise RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")

    class Refuses:
        def __init__(self) -> None:
            raise NotImplementedError("not on this\nplatform")

    class OfOurs:
        def __init__(self) -> None:
            from verl_ascend_rollout.integration.server import UnsafeError

            raise UnsafeError("as it is")

    said = []
    for make in (Dies, Refuses, OfOurs):
        try:
            asyncio.run(start(checkpoint, make=make))
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said
