"""`AscendSafeHttpServer`: the rollout server actor, which owns the engine's arguments and its sleep and wake-up.

A subclass through the hooks that verl offers from 0.8.0 on (see `contract`; `own_gate` is for a verl without a gate for
requests, `no_hooks` for one without hooks).  What it adds: the policy's decisions before the engine starts; a KV cache
that is given back by the method that works here; one state for all that gives memory away and takes it back
(`engine.lifecycle`), so that every order of calls has a defined result; and a refusal to generate after a step that
left the engine in doubt.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import logging
import os
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any

import ray
from verl.workers.rollout.replica import RolloutMode
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer

from verl_ascend_rollout import events
from verl_ascend_rollout.engine import causes, death, message_queues, routing_record, vllm_api, workers
from verl_ascend_rollout.engine.causes import EngineStartError
from verl_ascend_rollout.engine.death import EngineDiedError
from verl_ascend_rollout.engine.lifecycle import EngineNotReadyError, Lifecycle, Request
from verl_ascend_rollout.engine.metrics import SYNC_METHOD, step_of
from verl_ascend_rollout.integration.patch import assert_intact
from verl_ascend_rollout.options import KEY, AscendSafeOptions, KVMethod
from verl_ascend_rollout.platforms.detect import detect
from verl_ascend_rollout.policy import engine_args
from verl_ascend_rollout.transport.rendezvous import NODE_VARIABLE
from verl_ascend_rollout.worker.kv_cache import KVAction, KVCacheChange
from verl_ascend_rollout.worker.worker_rpc import WorkerError

logger = logging.getLogger("verl_ascend_rollout.server")

WORKER_EXTENSION = "verl_ascend_rollout.integration.extension.AscendSafeWorkerExtension"


ABORT_SECONDS = 5.0
"""How long an abort goes on aborting what a paused engine holds; from the gate to there it is milliseconds."""

BUSY = {"sleep": "fell asleep", "free": "gave the KV cache back", "wake_weights": "woke up", "init": "woke up"}

HOLD_SECONDS = 20.0
"""How long a request to a dead engine waits for the end of the job (`integration.engine_death`) before it fails: verl's
V1 trainer sends it again at once, and each failure is a traceback in the log (66,000 lines in eleven seconds)."""


class UnsafeError(RuntimeError):
    """Nothing safe gives the KV cache back here, and the user set `on_unsafe: error`."""


class AscendSafeHttpServer(vLLMHttpServer):
    """verl's vLLM server, with the KV cache and the engine's arguments decided by what is there."""

    # ----------------------------------------------------------------------------------------------------------------
    # verl's hooks, in the order in which they are called

    def _init_config(self, config: Any) -> Any:
        """Read our options and let the policy decide what the user left open."""
        assert_intact()
        return self._take_config(super()._init_config(config))

    def _take_config(self, config: Any) -> Any:
        self._options = AscendSafeOptions.from_rollout(config)
        if self._options.events:
            os.environ[events.EVENTS_VARIABLE] = os.path.abspath(self._options.events)
        # The engine's processes inherit it: they meet the trainer of their own node.
        os.environ[NODE_VARIABLE] = ray.get_runtime_context().get_node_id()
        # verl 0.9.1 raises max_num_batched_tokens itself where chunked prefill is off, and its own config class then
        # refuses the assignment: FrozenInstanceError (vllm_async_server.py:1119 against config/rollout.py:146-156).
        object.__setattr__(config, "_mutable_fields", set(config._mutable_fields) | {"max_num_batched_tokens"})
        self._life = Lifecycle()
        self._leaving = False
        self._changed = asyncio.Event()
        # One step at a time: memory that is given away while a sync writes into it would be worse than a wait.
        self._step = asyncio.Lock()
        self._kv_release: KVMethod = "keep"
        # vLLM itself put memory to sleep, and must be asked to wake it: its executor keeps count of that.
        self._engine_sleeps = False
        self._workers: list[dict[str, Any]] = []
        self._routing = routing_record.Count()
        # Of the engine, once there is one.
        self._watch: death.Watch | None = None
        # Ends when the next engine is there, or with the reason why there is none.
        self._mourning: asyncio.Task[None] | None = None
        self.restarts = 0
        # Of the last weight sync, when it has come; where engines are made again.
        self._snapshot: asyncio.Future[dict[str, Any]] | None = None
        self._snapshot_memory = -1
        # What the engine is busy with, beside generating.
        self._busy = ""
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
        self._facts_of_model = engine_args.ModelFacts.from_config(self.model_config.hf_config)
        self._decisions = engine_args.decide(
            self._facts,
            engine_args.EngineRequest.from_rollout(
                config,
                lora=self.lora_as_adapter,
                model=self._facts_of_model,
                environ=os.environ,
            ),
        )
        # The engine process is started with this environment, so vLLM reads it when it is imported there.
        os.environ.update(self._decisions.environment)
        for name in ("enforce_eager", "enable_sleep_mode"):
            object.__setattr__(config, name, self._decisions[name].value)

    def _preprocess_engine_kwargs(self, engine_kwargs: dict[str, Any]) -> None:
        """Add what the policy decided to vLLM's arguments; what the user wrote there stays."""
        super()._preprocess_engine_kwargs(engine_kwargs)
        engine_args.add_to(engine_kwargs, self._decisions)

    def _get_worker_extension_cls(self) -> str:
        return WORKER_EXTENSION

    async def run_server(self, args: Any) -> None:
        """Start the engine, then hand the decisions to its workers, which take what works there.

        Raises:
            EngineStartError: with the cause, out of what the engine printed or vLLM raised.
            EngineDiedError: a process of the engine was killed, or said nothing.
        """
        self._args = args
        watch = death.Watch()
        watching = asyncio.create_task(watch.watch())
        try:
            await watch.while_alive(self._start(watch))
        except EngineDiedError as error:
            await watching  # by then it has printed why
            if cause := watch.said():
                raise EngineStartError(self._unstarted(cause)) from None
            raise EngineDiedError(self._obituary("started", str(error))) from None
        except Exception as error:
            if _is_ours(error):
                raise
            raise EngineStartError(self._unstarted(causes.why_not_started(error, watch.printed))) from error
        self._watch = watch
        self._mourning = asyncio.create_task(self._mourn(watch, watching))

    async def _start(self, watch: death.Watch) -> None:
        started = time.perf_counter()
        await super().run_server(self._args)
        vllm_api.complete(self.engine)
        watch.engine = self.engine
        reports = await self._ask(
            "ascend_safe_configure",
            kv_release=self._decisions["kv_release"].value,
            weight_path=self._decisions["weight_path"].value,
            verify=self._options.verify,
        )
        taken = sorted({report["kv_release"] for report in reports})
        if len(taken) > 1:
            # Workers that free in different ways would not be asleep or awake together.
            raise UnsafeError(
                f"The workers give the KV cache back in different ways ({', '.join(taken)}): set {KEY}.kv_release=keep"
            )
        self._kv_release = taken[0]
        self._workers = reports
        obstacles = sorted({obstacle for report in reports for obstacle in report["obstacles"]})
        if self.replica_rank == 0 and not self.restarts:
            logger.info("Decisions for this engine:\n%s", engine_args.table(self._decisions))
        logger.info(
            "replica %d: KV cache of %d bytes on %d worker(s), given back by %r%s",
            self.replica_rank,
            sum(report["kv_bytes"] for report in reports),
            len(reports),
            self._kv_release,
            f" (not: {'; '.join(obstacles)})" if obstacles else "",
        )
        reasons = sorted({reason for report in reports for reason in report["weight_path_obstacles"]})
        logger.info(
            "replica %d: weights are loaded %s%s",
            self.replica_rank,
            " and ".join(sorted({report["weight_path"] for report in reports})),
            f" (not {'; not '.join(reasons)})" if reasons else "",
        )
        self._emit(
            "decide",
            time.perf_counter() - started,
            {"decisions": self._decisions.as_dicts(), "workers": reports},
        )
        if self._facts.name in ("cpu", "npu"):
            message_queues.unlink()
        if self._kv_release == "keep" and self.config.free_cache_engine:
            self._say_unsafe(obstacles)
        if self._options.on_engine_death == "restart":
            self._assert_restartable(reports)
        watch.follow(reports)

    def _assert_restartable(self, reports: list[dict[str, Any]]) -> None:
        reasons = {
            "trains LoRA adapters": self.lora_as_adapter,
            "is on several nodes": self.nnodes > 1,
            "loads weights by verl's own sequence": any(report["weight_path"] == "verl" for report in reports),
        }
        found = [reason for reason, there in reasons.items() if there]
        if found:
            raise UnsafeError(
                f"An engine that {' and '.join(found)} cannot be made again: set {KEY}.on_engine_death=stop"
            )

    # ----------------------------------------------------------------------------------------------------------------
    # an engine that dies

    async def _mourn(self, watch: death.Watch, watching: asyncio.Task[str]) -> None:
        """Wait for the engine's death, say it once, and make another where that was asked for.

        Raises:
            EngineDiedError: there is no other engine; with the reason.
        """
        await watch.cause
        busy = self._busy or {"awake": "was awake", "dirty": "was in doubt"}.get(self._life.state, "was asleep")
        cause = await watching
        obituary = self._obituary(busy, cause)
        if self._options.on_engine_death == "restart":
            made = death.Watch()
            watching = asyncio.create_task(made.watch())
            try:
                await self._restart(made, cause, obituary)
            except Exception as error:
                said = str(error) if _is_ours(error) else causes.why_not_started(error, made.printed)
                obituary = f"{obituary}; another engine could not take its place: {said}"
                watching.cancel()
                made.kill()
            else:
                self._watch = made
                self._mourning = asyncio.create_task(self._mourn(made, watching))
                return
        logger.error("%s", obituary)
        raise EngineDiedError(obituary)

    def _obituary(self, busy: str, cause: str) -> str:
        return (
            f"The rollout engine of replica {self.replica_rank} died while it {busy}: {cause}; its last words are in "
            f"{death.log_of_this_process()}"
        )

    def _unstarted(self, cause: str) -> str:
        return (
            f"The rollout engine of replica {self.replica_rank} did not start: {cause}; what vLLM logged is in "
            f"{death.log_of_this_process(1)}"
        )

    async def _restart(self, watch: death.Watch, cause: str, obituary: str) -> None:
        """Make the engine again, as it was before the step that it died in, with the weights of the last sync.

        Args:
            watch: over the new one, which may be dead by the end of this as well.
            cause: why the one before is dead.
            obituary: the same, as a sentence.

        Raises:
            EngineDiedError: that was once too often, or its weights cannot be proven to be the last.
            Exception: the engine does not start.
        """
        if self.restarts >= self._options.max_engine_restarts:
            raise EngineDiedError(f"{self.restarts} times was as often as {KEY}.max_engine_restarts allows")
        started = time.perf_counter()
        self.restarts += 1
        logger.warning("%s. It is made again (%d of %d)", obituary, self.restarts, self._options.max_engine_restarts)
        # Its sockets and threads; the processes are gone.
        with contextlib.suppress(Exception):
            self.engine.shutdown()
        self._server_task.cancel()
        before, self._busy, address = self._life, "was made again", self.get_server_address()
        try:
            await watch.while_alive(self._start(watch))
            made = time.perf_counter()
            snapshot = await watch.while_alive(self._restore(before))
        except EngineDiedError:
            if not watch.died:
                raise
            # The next one is to be as the first was.
            self._life = before
            return
        seconds = time.perf_counter() - started
        # verl hands prompts to this actor; HTTP clients and Prometheus are told an address once (llm_server.py:487).
        logger.warning(
            "replica %d has an engine again after %.1f s, with the weights of sync %d; its HTTP server is at %s:%d, "
            "and no longer at %s:%d",
            self.replica_rank,
            seconds,
            snapshot["sync"],
            *self.get_server_address(),
            *address,
        )
        self._emit(
            "restart",
            seconds,
            {
                "cause": cause,
                "number": self.restarts,
                "sync": snapshot["sync"],
                "bytes": snapshot["bytes"],
                "engine_seconds": made - started,
                "weight_seconds": time.perf_counter() - made,
            },
        )

    async def _restore(self, before: Lifecycle) -> dict[str, Any]:
        """Bring a new engine to where the dead one was, and return the snapshot that it has its weights from.

        Raises:
            WorkerError: the snapshot is not what was written, or not the whole model.
            EngineDiedError: there is none of the last sync.
        """
        self._life = Lifecycle()
        self._engine_sleeps = self._leaving = False
        await self.engine.pause_generation(clear_cache=False)
        while True:
            promised = self._snapshot
            if promised is None:
                raise EngineDiedError("no weights had come yet")
            try:
                snapshot = await asyncio.wait_for(asyncio.shield(promised), self._options.sync_timeout)
            except asyncio.TimeoutError:
                raise EngineDiedError("no weights that are proven to be the last came for it") from None
            try:
                await self._ask("ascend_safe_load_snapshot", snapshot=snapshot)
            except WorkerError:
                if promised is self._snapshot:
                    raise
            else:
                if promised is self._snapshot:
                    break
        self._busy = ""
        self._live(Lifecycle(aborted=before.aborted))
        if before.state in ("asleep", "weights_only"):
            await self._perform("sleep" if before.state == "asleep" else "free")
        await self._run_or_pause()
        return snapshot

    async def keep_snapshot(self, snapshot: dict[str, Any]) -> None:
        """Take the snapshot of a sync that has ended; return when there is an engine with those weights.

        Args:
            snapshot: a `Snapshot`, whose memory this process holds from now on.
        """
        if self._snapshot_memory >= 0:
            os.close(self._snapshot_memory)
        self._snapshot_memory = os.open(snapshot["path"], os.O_RDONLY | os.O_CLOEXEC)
        path = f"/proc/{os.getpid()}/fd/{self._snapshot_memory}"
        if self._snapshot is not None and not self._snapshot.done():
            self._snapshot.set_result({**snapshot, "path": path})
        if self._watch is not None and self._watch.died and self._mourning is not None:
            await asyncio.shield(self._mourning)

    async def engine_death(self) -> str:
        """Wait until the engine is dead for good, and return the sentence about it."""
        while True:
            if self._mourning is None:  # also the further nodes of a replica, which have no engine
                await asyncio.sleep(death.POLL_SECONDS)
                continue
            try:
                await asyncio.shield(self._mourning)
            except EngineDiedError as error:
                return str(error)

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call one of this server's methods.  Where the engine dies it is called again with the next one, if there is
        one; a weight sync is not, whose weights have gone by.

        Raises:
            EngineDiedError: which engine, why, and which log.
            Exception: what the method raises.
        """
        syncs = step_of(method, args, kwargs) == "sync"
        if syncs:
            # From here on the weights of the sync before are not the last.
            self._snapshot = asyncio.get_running_loop().create_future()
        while True:
            watch, mourning = self._watch, self._mourning
            # verl takes out of the sampling parameters what it has read.
            call = getattr(self, method)(*_copied(args), **dict(zip(kwargs, _copied(kwargs.values()), strict=True)))
            if not inspect.isawaitable(call):
                return call
            if watch is None or mourning is None or method in OUTLIVES:
                return await call
            try:
                return await watch.while_alive(call)
            except EngineDiedError:
                if syncs and self._options.on_engine_death == "restart":
                    raise
                try:
                    await asyncio.shield(mourning)
                except EngineDiedError:
                    if method == "generate":
                        # Every prompt would be tried again, and fail again, until the job has ended.
                        await asyncio.sleep(HOLD_SECONDS)
                    raise

    async def _ask(self, method: str, timeout: float | None = None, **keywords: Any) -> list[Any]:
        return await workers.ask(self.engine, method, keywords, timeout)

    def _say_unsafe(self, obstacles: list[str]) -> None:
        why = "; ".join(obstacles) or self._decisions["kv_release"].reason
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
        """Do nothing on a replica's further nodes, whose servers have no engine to ask (verl 0.9.1, run_headless)."""
        return bool(self.node_rank == 0)

    async def free_cache_engine(self) -> list[dict[str, Any]]:
        """Pause the scheduler and give the KV cache's memory back.  Requests in flight are aborted; new ones wait.

        Returns:
            What each worker did (`KVCacheChange` as a mapping).  A second call changes nothing.

        Raises:
            EngineNotReadyError: the memory could not be given back; with the reason.
        """
        return await self._change("free") or await self._nothing_to_do("free")

    async def init_cache_engine(self) -> list[dict[str, Any]]:
        """Take the KV cache's memory again and let the scheduler go on.  A second call changes nothing.

        Returns:
            What each worker did (`KVCacheChange` as a mapping).

        Raises:
            EngineNotReadyError: the memory is not there (the message has the numbers, and what to lower), or the last
                weight sync failed: the scheduler must not go on then.
        """
        return await self._change("wake_kv_cache") or await self._nothing_to_do("init")

    async def _nothing_to_do(self, action: KVAction) -> list[dict[str, Any]]:
        """Return what a step that has nothing to do reports."""
        reason = "the KV cache is already free" if action == "free" else "the KV cache is already there"
        reports = await self.memory()
        return [_as_change(action, self._kv_release, report, report, 0.0, reason) for report in reports]

    async def _change(self, request: Request) -> list[dict[str, Any]]:
        """Do what `request` means in the present state; what the last action changed, by worker.

        Raises:
            EngineNotReadyError: an action failed, which leaves the engine dirty, or the weights are not to be trusted.
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
        # Who comes while memory goes away waits already: it would lie in an engine that is asleep, out of our reach.
        self._leaving = bool(plan.actions) and plan.then in ("asleep", "weights_only")
        for action in plan.actions:
            self._busy = BUSY[action]
            try:
                changes = await do[action]()
            except BaseException as error:  # also a call that was broken off leaves half of a step
                self._leaving = False
                if self._watch is not None and self._watch.look():
                    raise
                self._busy = ""
                what = f"{action} failed: {error or type(error).__name__}"
                self._live(self._life.failed(what))
                if not isinstance(error, Exception):
                    raise
                with contextlib.suppress(Exception):  # an engine that is dead runs nothing either
                    await self._run_or_pause()
                raise EngineNotReadyError(what) from error
        self._leaving, self._busy = False, ""
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
            # Requests inside stay where vLLM can hold them, and go on when there is something to go on with.
            await vllm_api.hold(self.engine)

    async def _do_sleep(self) -> list[dict[str, Any]]:
        if self._kv_release not in ("kv_only", "sleep"):
            return await self._do_free()
        # What follows a colocated engine's sleep brings no weights (verl 0.9.1, vllm_async_server.py:859).
        hybrid = self.rollout_mode == RolloutMode.HYBRID
        level = int(self._decisions["sleep_level"].value) if hybrid else 1
        self._engine_sleeps = True
        async with self._device_memory_event("sleep"):
            await vllm_api.sleep(self.engine, level)
            if hybrid:  # as verl's own: image features of the old weights must not answer for the new ones
                await vllm_api.reset_encoder_cache(self.engine)
        await self._ask("ascend_safe_memory", kv_asleep=True)
        if level == 2:
            self._live(dataclasses.replace(self._life, weights_discarded=True))
        return []

    async def _do_free(self) -> list[dict[str, Any]]:
        # Aborts what runs, and clears the prefix cache: the blocks that it names are about to go.
        await self.engine.pause_generation(clear_cache=True)
        if self._kv_release != "sleep" and not self._engine_sleeps:
            return await self._ask("free_cache_engine")
        before, started = await self.memory(), time.perf_counter()
        # As verl's own release does it, but always at the level that keeps the weights (verl 0.9.1,
        # vllm_async_server.py:875): who frees the KV cache alone need not sync.
        self._engine_sleeps = True
        await vllm_api.sleep(self.engine, 1)
        await self.engine.wake_up(tags=["weights"])
        await self._restore_kernel_format()
        return await self._changed_by_engine("free", before, started, kv_asleep=True)

    async def _do_wake_weights(self) -> list[dict[str, Any]]:
        """Weights are only given away by vLLM's own sleep, so waking them is nothing without.  And asking would let the
        scheduler go on."""
        if self._engine_sleeps:
            async with self._device_memory_event("wake_up", tags=["weights"]):
                await self.engine.wake_up(tags=["weights"])
                await self._restore_kernel_format()
        return []

    async def _do_init(self) -> list[dict[str, Any]]:
        # Before the memory is back: vLLM lets the scheduler go on by itself in a wake-up, and requests that waited
        # would hold blocks by the time of a reset that comes after it.
        if self._life.state == "dirty":
            await self.engine.pause_generation(clear_cache=True)
        await self._reset_prefix_cache()
        if not self._engine_sleeps:
            return await self._ask("init_cache_engine")
        before, started = await self.memory(), time.perf_counter()
        await self.engine.wake_up(tags=["kv_cache"])
        await self._restore_kernel_format()
        changes = await self._changed_by_engine("init", before, started, kv_asleep=False)
        self._engine_sleeps = False
        return changes

    async def _changed_by_engine(
        self, action: KVAction, before: list[dict[str, int]], started: float, kv_asleep: bool
    ) -> list[dict[str, Any]]:
        """Return what vLLM itself did, as the workers' own steps are reported, and its event."""
        seconds = time.perf_counter() - started
        after = await self._ask("ascend_safe_memory", kv_asleep=kv_asleep)
        sizes = [sum(report["kv_bytes"] for report in reports) for reports in (before, after)]
        self._emit(action, seconds, {"changed": True}, *sizes)
        return [_as_change(action, self._kv_release, *pair, seconds) for pair in zip(before, after, strict=True)]

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
        self._emit(step, seconds, detail, before, after)

    async def _restore_kernel_format(self) -> None:
        """vllm-ascend 0.13 to 0.26 leaves the experts in checkpoint form after a wake-up, ready for a load that a
        reward model, or an adapter-only sync, never does."""
        if any(worker["weight_path"] != "verl" for worker in self._workers):
            await self._ask("ascend_safe_restore_kernel_format")

    async def _reset_prefix_cache(self) -> None:
        """Forget the cached blocks: their contents are gone.  Not being able to is an error, since a later request
        would be answered from them.  The scheduler is paused."""
        if not await vllm_api.reset_prefix_cache(self.engine):
            raise EngineNotReadyError(
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
                await vllm_api.hold(self.engine)
            if self._life.weights_may_be_away:
                await self._perform("wake_weights")
            self._busy = "took new weights"
            try:
                await workers.ask(self.engine, SYNC_METHOD, dict(kwargs or {}), timeout)
            except asyncio.CancelledError:
                self._doubt("the last weight sync was broken off")
                raise
            except Exception as error:
                if self._watch is None or not self._watch.look():
                    self._busy = ""
                self._doubt(f"the last weight sync failed: {error}")
                raise
            self._busy = ""
            self._live(self._life.synced())
            await self._run_or_pause()
            self._emit("sync", time.perf_counter() - started, {})

    async def abort_all_requests(self, *args: Any, **kwargs: Any) -> Any:
        """See verl's.  It pauses the engine until `resume_generation`, which neither a weight sync nor a wake-up does
        for it."""
        async with self._step:
            started = time.perf_counter()
            await self._abort_what_a_paused_engine_holds()
            # Before the requests are gone: what the gate lets in meanwhile is aborted as well.
            self._live(dataclasses.replace(self._life, aborted=True))
            report = await super().abort_all_requests(*args, **kwargs)
            self._live(self._life)  # those who wait may now be turned away
            self._emit(
                "abort",
                time.perf_counter() - started,
                {"requests": int(report.get("aborted_count", 0)), "state": self._life.state},
            )
        return report

    async def _abort_what_a_paused_engine_holds(self) -> None:
        """Abort the requests that reached a paused engine, until verl counts none that waits for its first token.

        verl's abort waits for that token, up to a minute (verl 0.9.1, vllm_async_server.py:925), and a paused engine
        gives none.  Nobody comes in meanwhile: our gate is closed where the scheduler may not run.
        """
        deadline = time.monotonic() + ABORT_SECONDS
        while not self._life.runs and getattr(self, "_admitting", 0) > 0 and time.monotonic() < deadline:
            await self.engine.pause_generation(clear_cache=False)

    async def resume_engine_generation(self) -> None:
        """Let the scheduler go on, unless there is nothing to go on with: half of verl's `resume_generation`."""
        async with self._step:
            self._live(dataclasses.replace(self._life, aborted=False))
            await self._run_or_pause()

    async def mark_weights_stale(self, reason: str) -> None:
        """Refuse to generate until a full weight sync has passed: the trainer knows that the last one was not whole."""
        self._doubt(f"the last weight sync failed: {reason}")
        if self._snapshot is not None and not self._snapshot.done():
            self._snapshot.set_exception(EngineDiedError(f"the last weight sync failed: {reason}"))
            self._snapshot.exception()  # nobody need wait for it
        # Whoever is at work settles it at the end.
        if not self._step.locked():
            await self._run_or_pause()

    def _doubt(self, reason: str) -> None:
        self._live(dataclasses.replace(self._life, weights_stale=reason))

    async def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate.  While memory is away a request waits; while the engine is in doubt it is refused.

        Raises:
            EngineNotReadyError: with the step that failed.
            ValueError: the prompt leaves no room below max_model_len (verl's own check).
        """
        self._refuse_stale()
        answer = await super().generate(*args, **kwargs)
        if self.config.enable_rollout_routing_replay:
            self._check_routing(args[0] if args else kwargs["prompt_ids"], answer)
        return answer

    def _check_routing(self, prompt: Sequence[int], answer: Any) -> None:
        """Take a record of routing away that does not cover its answer; the trainer then routes those tokens itself."""
        shape = self._facts_of_model.layers or 0, self._facts_of_model.top_k or 0
        answer.routed_experts, reason = routing_record.checked(
            answer.routed_experts, len(prompt), len(answer.token_ids), shape
        )
        self._routing.add(reason)
        if reason and self._routing.dropped == 1:
            logger.warning(
                "replica %d: %s, so the trainer routes its tokens for itself; further ones are counted and not said "
                "(rollout/routing_records_dropped)",
                self.replica_rank,
                reason,
            )

    def take_routing(self) -> dict[str, int]:
        """Return how many records of routing came and were dropped since the last call; empty without any."""
        return self._routing.take()

    async def _park_until_admitted(self, request_id: str) -> Any:
        """verl's gate, and ours behind it: both are open at one moment, or the request goes on waiting.

        A request that reached the engine while memory is away would wait there, out of reach of a refusal.
        """
        while True:
            rejected = await super()._park_until_admitted(request_id)
            if rejected is not None:
                return rejected
            if not self._waits() and not self._life.refusal:
                return None
            # Not admitted after all (verl 0.9.1 counts, vllm_async_server.py:1043).
            self._admitting -= 1
            self._refuse_stale()
            await self._changed.wait()

    def _waits(self) -> bool:
        """Return whether a request to generate waits for memory."""
        return self._leaving or self._life.waits

    def _refuse_stale(self) -> None:
        if self._life.refusal:
            raise EngineNotReadyError(self._life.refusal)

    async def memory(self) -> list[dict[str, int]]:
        """Bytes of KV cache and resident memory of each worker: `kv_bytes`, `rss`, `pid`."""
        return await self._ask("ascend_safe_memory")

    def explain(self) -> dict[str, Any]:
        """Return what was decided for this engine, as plain values: `facts`, `decisions`, `options`, `kv_release`;
        the `state` in which it is, and what its `workers` said of themselves at the start."""
        return {
            "facts": dataclasses.asdict(self._facts),
            "decisions": self._decisions.as_dicts(),
            "options": self._options.as_dict(),
            "kv_release": self._kv_release,
            "state": self._life.state,
            "workers": self._workers,
        }

    def _emit(
        self, step: str, seconds: float, detail: dict[str, Any], before: int | None = None, after: int | None = None
    ) -> None:
        detail = {"replica": self.replica_rank, "rung": self._kv_release, **detail}
        events.emit(events.Event(step, "server", seconds, before, after, detail=detail))


OUTLIVES = ("engine_death", "keep_snapshot", "mark_weights_stale", "explain")
"""Methods that ask nothing of the engine."""


def _is_ours(error: Exception) -> bool:
    """Return whether an exception is one of this package's, whose text is a sentence."""
    return type(error).__module__.startswith("verl_ascend_rollout.")


def _copied(values: Iterable[Any]) -> list[Any]:
    return [dict(value) if isinstance(value, dict) else value for value in values]


def _as_change(
    action: KVAction,
    kv_release: KVMethod,
    before: Mapping[str, int],
    after: Mapping[str, int],
    seconds: float,
    reason: str = "",
) -> dict[str, Any]:
    """Return a `KVCacheChange` as a mapping, of what was done by vLLM or not at all."""
    change = KVCacheChange(action, kv_release, before["kv_bytes"], before["rss"], not reason)
    change.bytes_after, change.rss_after = after["kv_bytes"], after["rss"]
    change.seconds, change.reason = seconds, reason
    return dataclasses.asdict(change)


def _sentence(change: Mapping[str, Any]) -> str:
    """Return a `KVCacheChange` for the log."""
    if not change["changed"]:
        return f"{change['action']}: nothing to do ({change['reason']})"
    mebibytes = abs(change["bytes_after"] - change["bytes_before"]) / 2**20
    resident = (change["rss_after"] - change["rss_before"]) / 2**20
    return (
        f"{change['action']} by {change['kv_release']}: {mebibytes:.0f} MiB of KV cache, "
        f"resident memory {resident:+.0f} MiB, {change['seconds'] * 1000:.0f} ms"
    )
