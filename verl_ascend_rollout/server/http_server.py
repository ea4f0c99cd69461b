"""`AscendSafeHttpServer`: the rollout server actor, which owns the engine's arguments and its sleep and wake-up.

A subclass through the hooks that verl 0.9 offers.  What it adds: the policy's decisions before the engine starts; the
KV-cache ladder; one state for all that gives memory away and takes it back (`state`), so that every order of calls
has a defined result; and a refusal to generate after a step that left the engine in doubt.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import psutil
from verl.workers.rollout.replica import RolloutMode
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer

from verl_ascend_rollout import compat, events, policy
from verl_ascend_rollout.options import KEY, AscendSafeOptions
from verl_ascend_rollout.platforms.detect import detect
from verl_ascend_rollout.server import workers
from verl_ascend_rollout.server.state import EngineInDoubtError, Lifecycle, Request

logger = logging.getLogger("verl_ascend_rollout.server")

WORKER_EXTENSION = "verl_ascend_rollout.worker.extension.AscendSafeWorkerExtension"

SYNC_METHOD = "update_weights_from_ipc"


class UnsafeError(RuntimeError):
    """Nothing safe gives the KV cache back here, and the user set `on_unsafe: error`."""


class AscendSafeHttpServer(vLLMHttpServer):
    """verl's vLLM server, with the KV cache and the engine's arguments decided by what is there."""

    # ----------------------------------------------------------------------------------------------------------------
    # verl's hooks, in the order in which they are called

    def _init_config(self, config: Any) -> Any:
        """Read our options and let the policy decide what the user left open."""
        compat.assert_intact()
        config = super()._init_config(config)
        self._options = AscendSafeOptions.from_rollout(config)
        if self._options.events:
            os.environ[events.EVENTS_VARIABLE] = os.path.abspath(self._options.events)
        # verl 0.9.1 raises max_num_batched_tokens itself where chunked prefill is off, and its own config class then
        # refuses the assignment: FrozenInstanceError (vllm_async_server.py:1119 against config/rollout.py:146-156).
        object.__setattr__(config, "_mutable_fields", set(config._mutable_fields) | {"max_num_batched_tokens"})
        self._life = Lifecycle()
        self._changed = asyncio.Event()
        # One step at a time: memory that is given away while a sync writes into it would be worse than a wait.
        self._step = asyncio.Lock()
        self._rung: str = "keep"
        return config

    def _init_model_config(self, model_config: Any) -> Any:
        model_config = super()._init_model_config(model_config)
        # `lora_as_adapter` of verl's class wants both configs.
        self.model_config = model_config
        self._decide()
        return model_config

    def _decide(self) -> None:
        config = self.config
        self._facts = detect()
        self._decisions = policy.decide(
            self._facts,
            policy.Wishes.from_rollout(
                config,
                lora=self.lora_as_adapter,
                model=policy.ModelFacts.from_config(self.model_config.hf_config),
                environ=os.environ,
            ),
        )
        # The engine process is started with this environment, so vLLM reads it when it is imported there.
        os.environ.update(self._decisions.environment)
        for name in ("enforce_eager", "enable_sleep_mode"):
            object.__setattr__(config, name, self._decisions[name].value)
        self._rung = self._decisions["kv_rung"].value

    def _preprocess_engine_kwargs(self, engine_kwargs: dict[str, Any]) -> None:
        """Add what the policy decided to vLLM's arguments; what the user wrote there stays."""
        super()._preprocess_engine_kwargs(engine_kwargs)
        # What verl merges last would undo the decisions, which have already taken it into account.
        engine_kwargs.pop("enforce_eager", None)
        engine_kwargs.pop("enable_sleep_mode", None)
        decided = {name: self._decisions[name].value for name in ("cudagraph_mode", "cudagraph_capture_sizes")}
        compilation = engine_kwargs.get("compilation_config") or {}
        compilation = dict(json.loads(compilation) if isinstance(compilation, str) else compilation)
        wanted = {name: value for name, value in decided.items() if value is not None}
        engine_kwargs["compilation_config"] = {**compilation, **wanted}
        extra = self._decisions.additional_config
        if extra:
            wished = engine_kwargs.get("additional_config") or {}
            wished = dict(json.loads(wished) if isinstance(wished, str) else wished)
            engine_kwargs["additional_config"] = {**extra, **wished}

    def _resolve_sleep_level(self) -> int:
        """The level that the policy decided, so that what runs is what `ascend-safe explain` prints."""
        level = self._decisions["sleep_level"].value
        return int(level) if level is not None else int(super()._resolve_sleep_level())

    def _get_worker_extension_cls(self) -> str:
        return WORKER_EXTENSION

    async def run_server(self, args: Any) -> None:
        """Start the engine, then hand the decisions to its workers and find the rung that works on each."""
        started = time.perf_counter()
        await super().run_server(args)
        reports = await self._configure_workers(self._rung)
        if len({report["rung"] for report in reports}) > 1:
            # One rung for all: workers that free in different ways would not be asleep or awake together.
            reports = await self._configure_workers("keep")
        self._rung = reports[0]["rung"]
        obstacles = sorted({obstacle for report in reports for obstacle in report["obstacles"]})
        if self.replica_rank == 0:
            logger.info("Decisions for this engine:\n%s", policy.table(self._decisions))
        logger.info(
            "replica %d: KV cache of %d bytes on %d worker(s), rung %r%s",
            self.replica_rank,
            sum(report["kv_bytes"] for report in reports),
            len(reports),
            self._rung,
            f" (not: {'; '.join(obstacles)})" if obstacles else "",
        )
        self._emit(
            "decide",
            time.perf_counter() - started,
            {"decisions": self._decisions.as_dicts(), "rung": self._rung, "workers": reports},
        )
        if self._facts.name in ("cpu", "npu"):
            _unlink_message_queues()
        if self._rung == "keep" and self.config.free_cache_engine:
            self._say_unsafe(obstacles)

    async def _configure_workers(self, kv_rung: str) -> list[dict[str, Any]]:
        """Hand the decisions to vLLM's workers; what each of them is, and the rung that it found."""
        return await self._ask(
            "ascend_safe_configure",
            kv_rung=kv_rung,
            weight_path=self._decisions["weight_path"].value,
            verify=self._options.verify,
        )

    async def _ask(self, method: str, timeout: float | None = None, **keywords: Any) -> list[Any]:
        return await workers.ask(self.engine, method, keywords, timeout)

    def _say_unsafe(self, obstacles: list[str]) -> None:
        why = "; ".join(obstacles) or self._decisions["kv_rung"].reason
        sentence = f"The KV cache's memory stays allocated during training: {why}"
        if self._options.on_unsafe == "error":
            raise UnsafeError(f"{sentence}; {KEY}.on_unsafe=error says to stop then")
        logger.warning("%s. Set %s.on_unsafe=error to stop instead", sentence, KEY)

    # ----------------------------------------------------------------------------------------------------------------
    # sleep and wake-up

    async def sleep(self) -> None:
        """Give memory back, as far as it can be.  Requests that come in meanwhile wait; those in flight are aborted,
        as verl's own sleep does it."""
        if self._has_engine() and self.config.free_cache_engine and self.rollout_mode != RolloutMode.STANDALONE:
            await self._change("sleep")

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """Take memory back: `weights`, `kv_cache`, or both, weights first."""
        if not self._has_engine() or self.rollout_mode == RolloutMode.STANDALONE:
            return
        # verl wakes everything of a colocated engine, whatever the tags (verl 0.9.1, vllm_async_server.py:844).
        wanted = set(tags or ()) if self.rollout_mode == RolloutMode.HYBRID else set()
        if wanted == {"weights"}:
            await self._change("wake_weights")
        elif wanted == {"kv_cache"}:
            await self._change("wake_kv_cache")
        else:
            await self._change("wake_all")

    async def release_kv_cache(self) -> None:
        """Give the KV cache's memory back for the time of a weight sync (trainer and rollout apart)."""
        if self._frees_kv_cache():
            await self._change("free")

    async def resume_kv_cache(self) -> None:
        """Take it again after the sync."""
        if self._frees_kv_cache():
            await self._change("wake_kv_cache")

    def _frees_kv_cache(self) -> bool:
        return self._has_engine() and bool(self.config.free_cache_engine) and self.rollout_mode != RolloutMode.COLOCATED

    def _has_engine(self) -> bool:
        """The servers of a replica's further nodes have no engine to ask (verl 0.9.1, run_headless)."""
        return bool(self.node_rank == 0)

    async def free_cache_engine(self) -> list[dict[str, Any]]:
        """Pause the scheduler and give the KV cache's memory back.  Requests in flight are aborted; new ones wait.

        Returns:
            What each worker did (`KVCacheChange` as a mapping).  A second call changes nothing.

        Raises:
            EngineInDoubtError: the memory could not be given back; with the reason.
        """
        return await self._change("free") or await self._nothing_to_do("free")

    async def init_cache_engine(self) -> list[dict[str, Any]]:
        """Take the KV cache's memory again and let the scheduler go on.  A second call changes nothing.

        Returns:
            What each worker did (`KVCacheChange` as a mapping).

        Raises:
            EngineInDoubtError: the memory is not there (the message has the numbers, and what to lower), or the last
                weight sync failed: the scheduler must not go on then.
        """
        return await self._change("wake_kv_cache") or await self._nothing_to_do("init")

    async def _nothing_to_do(self, action: str) -> list[dict[str, Any]]:
        """What a step that has nothing to do reports."""
        reason = "the KV cache is already free" if action == "free" else "the KV cache is already there"
        reports = await self.memory()
        return [_as_change(action, self._rung, report, report, 0.0, reason) for report in reports]

    async def _change(self, request: Request) -> list[dict[str, Any]]:
        """Do what `request` means in the present state; what the last action changed, by worker.

        Raises:
            EngineInDoubtError: an action failed, which leaves the engine dirty, or the weights are not to be trusted.
        """
        async with self._step:
            changes = await self._perform(request)
        for rank, change in enumerate(changes):
            logger.info("replica %d, worker %d: %s", self.replica_rank, rank, _sentence(change))
        return changes

    async def _perform(self, request: Request) -> list[dict[str, Any]]:
        plan = self._life.plan(request)
        if plan.note:
            logger.warning("replica %d, %s: %s", self.replica_rank, request, plan.note)
        do = {
            "sleep": self._do_sleep,
            "free": self._do_free,
            "wake_weights": self._do_wake_weights,
            "init": self._do_init,
        }
        changes: list[dict[str, Any]] = []
        for action in plan.actions:
            try:
                changes = await do[action]()
            except BaseException as error:  # also a call that was broken off leaves half of a step
                what = f"{action} failed: {error or type(error).__name__}"
                self._live(self._life.failed(what))
                if not isinstance(error, Exception):
                    raise
                with contextlib.suppress(Exception):  # an engine that is dead runs nothing either
                    await self._run_or_pause()
                raise EngineInDoubtError(what) from error
        self._live(self._life.passed(plan))
        await self._run_or_pause()
        return changes

    def _live(self, life: Lifecycle) -> None:
        """Take over a new state, and let those who wait for one look at it."""
        self._life = life
        self._changed.set()
        self._changed = asyncio.Event()

    async def _run_or_pause(self) -> None:
        """Let the scheduler run if and only if it may: vLLM resumes it by itself after a wake-up (before 0.24 also
        after half of one)."""
        if not self._has_engine():
            return
        paused = await self.engine.is_paused()
        if self._life.runs and paused:
            await self.engine.resume_generation()
        elif not self._life.runs and not paused:
            # Requests inside stay, and go on when there is something to go on with.
            await self.engine.pause_generation(mode="keep", clear_cache=False)

    def _by_sleep_mode(self) -> bool:
        return self._rung in ("sleep", "release_kv_cache")

    async def _do_sleep(self) -> list[dict[str, Any]]:
        if not self._by_sleep_mode():
            return await self._do_free()
        async with self._device_memory_event("sleep"):
            await super().sleep()
        await self._ask("ascend_safe_memory", kv_asleep=True)
        if self.rollout_mode == RolloutMode.HYBRID and self._resolve_sleep_level() == 2:
            self._live(dataclasses.replace(self._life, weights_discarded=True))
        return []

    async def _do_free(self) -> list[dict[str, Any]]:
        # Aborts what runs, and clears the prefix cache: the blocks that it names are about to go.
        await self.engine.pause_generation(clear_cache=True)
        if not self._by_sleep_mode():
            return await self._ask("free_cache_engine")
        before, started = await self.memory(), time.perf_counter()
        if self._rung == "release_kv_cache" and hasattr(self.engine, "release_kv_cache_memory"):
            await self.engine.release_kv_cache_memory()
        else:
            # As verl's own release does it, but always at the level that keeps the weights (verl 0.9.1,
            # vllm_async_server.py:875): who frees the KV cache alone need not sync.
            await self.engine.sleep(level=1)
            await self.engine.wake_up(tags=["weights"])
            await self._settle_weights()
        return await self._changed_by_engine("free", before, started, kv_asleep=True)

    async def _do_wake_weights(self) -> list[dict[str, Any]]:
        """Weights are never given away without sleep mode, so waking them is nothing then."""
        if self._by_sleep_mode():
            async with self._device_memory_event("wake_up", tags=["weights"]):
                await self.engine.wake_up(tags=["weights"])
                await self._settle_weights()
        return []

    async def _do_init(self) -> list[dict[str, Any]]:
        # Before the memory is back: vLLM lets the scheduler go on by itself in a wake-up, and requests that waited
        # would hold blocks by the time of a reset that comes after it.
        if self._life.state == "dirty":
            await self.engine.pause_generation(clear_cache=True)
        await self._reset_prefix_cache()
        if not self._by_sleep_mode():
            return await self._ask("init_cache_engine")
        before, started = await self.memory(), time.perf_counter()
        await self.engine.wake_up(tags=["kv_cache"])
        await self._settle_weights()
        return await self._changed_by_engine("init", before, started, kv_asleep=False)

    async def _changed_by_engine(
        self, action: str, before: list[dict[str, int]], started: float, kv_asleep: bool
    ) -> list[dict[str, Any]]:
        """What vLLM itself did, as the workers' own steps are reported, and its event."""
        seconds = time.perf_counter() - started
        after = await self._ask("ascend_safe_memory", kv_asleep=kv_asleep)
        events.emit(
            events.Event(
                step=action,
                process="server",
                seconds=seconds,
                bytes_before=sum(report["kv_bytes"] for report in before),
                bytes_after=sum(report["kv_bytes"] for report in after),
                detail={"replica": self.replica_rank, "rung": self._rung, "changed": True},
            )
        )
        return [_as_change(action, self._rung, *pair, seconds) for pair in zip(before, after, strict=True)]

    @contextlib.asynccontextmanager
    async def _device_memory_event(self, step: str, **detail: Any) -> AsyncIterator[None]:
        """One event of what a step of vLLM's sleep mode did to the devices' memory, as the driver counts it."""
        if not os.environ.get(events.EVENTS_VARIABLE):
            yield
            return
        before = sum(report["device_used"] for report in await self.memory())
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        after = sum(report["device_used"] for report in await self.memory())
        events.emit(
            events.Event(
                step=step,
                process="server",
                seconds=seconds,
                bytes_before=before,
                bytes_after=after,
                detail={"replica": self.replica_rank, "rung": self._rung, **detail},
            )
        )

    async def _settle_weights(self) -> None:
        """vllm-ascend 0.13 to 0.26 leaves the experts in checkpoint form after a wake-up, ready for a load that a
        reward model, or an adapter-only sync, never does."""
        if self._decisions["weight_path"].value == "by_layout":
            await self._ask("ascend_safe_settle")

    async def _reset_prefix_cache(self) -> None:
        """Forget the cached blocks: their contents are gone.  Not being able to is an error, since a later request
        would be answered from them.  The scheduler is paused."""
        if not await self.engine.reset_prefix_cache(reset_connector=True):
            raise EngineInDoubtError(
                "the prefix cache could not be reset before the KV cache is made again: a request still holds blocks; "
                "abort all requests before the wake-up"
            )

    # ----------------------------------------------------------------------------------------------------------------
    # weights and generation

    async def collective_rpc(
        self,
        method: Any,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Call a method on every worker.  A weight sync that fails puts the engine in doubt until one has passed."""
        if method != SYNC_METHOD:
            await super().collective_rpc(method=method, timeout=timeout, args=args, kwargs=kwargs)
            return
        async with self._step:
            started = time.perf_counter()
            # A scheduler that went on after a failed sync would run requests in flight on half of a model.
            if not await self.engine.is_paused():
                await self.engine.pause_generation(mode="keep", clear_cache=False)
            if self._life.weights_may_be_away:
                await self._perform("wake_weights")
            try:
                await workers.ask(self.engine, SYNC_METHOD, dict(kwargs or {}), timeout)
            except asyncio.CancelledError:
                self._doubt("the last weight sync was broken off")
                raise
            except Exception as error:
                self._doubt(f"the last weight sync failed: {error}")
                raise
            self._live(self._life.synced())
            await self._run_or_pause()
            self._emit("sync", time.perf_counter() - started, {})

    async def abort_all_requests(self, *args: Any, **kwargs: Any) -> Any:
        """See verl's.  It pauses the engine until `resume_generation`, which neither a weight sync nor a wake-up does
        for it."""
        async with self._step:
            started = time.perf_counter()
            # Before the requests are gone: what the gate lets in meanwhile is aborted as well.
            self._live(dataclasses.replace(self._life, aborted=True))
            report = await super().abort_all_requests(*args, **kwargs)
            self._live(self._life)  # those who wait may now be turned away
            self._emit(
                "abort",
                time.perf_counter() - started,
                {"requests": int(report.get("aborted_count", 0)), "rung": self._rung, "state": self._life.state},
            )
        return report

    async def resume_engine_generation(self) -> None:
        """Half of verl's `resume_generation`: the scheduler goes on, unless there is nothing to go on with."""
        async with self._step:
            self._live(dataclasses.replace(self._life, aborted=False))
            await self._run_or_pause()

    async def doubt_weights(self, reason: str) -> None:
        """Refuse to generate until a full weight sync has passed: the trainer knows that the last one was not whole."""
        self._doubt(f"the last weight sync failed: {reason}")
        # Whoever is at work settles it at the end.
        if not self._step.locked():
            await self._run_or_pause()

    def _doubt(self, reason: str) -> None:
        self._live(dataclasses.replace(self._life, weights_doubt=reason))

    async def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate.  While memory is away a request waits; while the engine is in doubt it is refused.

        Raises:
            EngineInDoubtError: with the step that failed.
            ValueError: the prompt leaves no room below max_model_len (verl's own check).
        """
        self._refuse_in_doubt()
        return await super().generate(*args, **kwargs)

    async def _park_until_admitted(self, request_id: str) -> Any:
        """verl's gate, and ours behind it: both are open at one moment, or the request goes on waiting.

        A request that reached the engine while memory is away would wait there, out of reach of a refusal.
        """
        while True:
            rejected = await super()._park_until_admitted(request_id)
            if rejected is not None:
                return rejected
            if not self._life.waits and not self._life.refusal:
                return None
            # Not admitted after all (verl 0.9.1 counts, vllm_async_server.py:1043).
            self._admitting -= 1
            self._refuse_in_doubt()
            await self._changed.wait()

    def _refuse_in_doubt(self) -> None:
        if self._life.refusal:
            raise EngineInDoubtError(self._life.refusal)

    async def memory(self) -> list[dict[str, int]]:
        """Bytes of KV cache and resident memory of each worker: `kv_bytes`, `rss`, `pid`."""
        return await self._ask("ascend_safe_memory")

    def explain(self) -> dict[str, Any]:
        """What was decided for this engine, as plain values: `facts`, `decisions`, `options`, `rung`;
        and the `state` in which it is."""
        return {
            "facts": dataclasses.asdict(self._facts),
            "decisions": self._decisions.as_dicts(),
            "options": self._options.as_dict(),
            "rung": self._rung,
            "state": self._life.state,
        }

    def _emit(self, step: str, seconds: float, detail: dict[str, Any]) -> None:
        events.emit(
            events.Event(
                step=step,
                process="server",
                seconds=seconds,
                detail={"replica": self.replica_rank, "rung": self._rung, **detail},
            )
        )


def _unlink_message_queues() -> None:
    """Take the names from the shared-memory segments of the engine's message queues, so that they cannot outlive it.

    Ray ends a job's actors without ceremony, and vLLM then leaves its queues in /dev/shm: about 400 MiB a run were seen
    (vLLM 0.28, `ShmRingBuffer`).  Every process of the engine has mapped them by now and none will look for the names
    again; the memory goes with the last process that maps it, also after a kill -9.
    """
    this = psutil.Process()
    segments: set[str] = set()
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8")
            # Python's own prefix for a segment without a name of its own (multiprocessing.shared_memory).
            segments.update(word for word in maps.split() if word.startswith("/dev/shm/psm_"))
    for segment in segments:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(segment)


def _as_change(
    action: str, rung: str, before: Mapping[str, int], after: Mapping[str, int], seconds: float, reason: str = ""
) -> dict[str, Any]:
    """A `KVCacheChange` as a mapping, of what was done by vLLM or not at all."""
    return {
        "action": action,
        "rung": rung,
        "changed": not reason,
        "bytes_before": before["kv_bytes"],
        "bytes_after": after["kv_bytes"],
        "rss_before": before["rss"],
        "rss_after": after["rss"],
        "seconds": seconds,
        "reason": reason,
    }


def _sentence(change: Mapping[str, Any]) -> str:
    """A `KVCacheChange` for the log."""
    if not change["changed"]:
        return f"{change['action']}: nothing to do ({change['reason']})"
    mebibytes = abs(change["bytes_after"] - change["bytes_before"]) / 2**20
    resident = (change["rss_after"] - change["rss_before"]) / 2**20
    return (
        f"{change['action']} by {change['rung']}: {mebibytes:.0f} MiB of KV cache, "
        f"resident memory {resident:+.0f} MiB, {change['seconds'] * 1000:.0f} ms"
    )
