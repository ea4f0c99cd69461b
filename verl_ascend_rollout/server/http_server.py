"""`AscendSafeHttpServer`: the rollout server actor, which owns the engine's arguments and its sleep and wake-up.

A subclass through the hooks that verl 0.9 offers.  What it adds: the policy's decisions before the engine starts; the
KV-cache ladder where there is no sleep mode; and a refusal to generate after a step that left the engine in doubt.
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

logger = logging.getLogger("verl_ascend_rollout.server")

WORKER_EXTENSION = "verl_ascend_rollout.worker.extension.AscendSafeWorkerExtension"

SYNC_METHOD = "update_weights_from_ipc"


class EngineInDoubtError(RuntimeError):
    """The engine may hold half of a policy, or no KV cache: it generates nothing until the step has been repeated."""


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
        # What left the engine in doubt, by what it is about: "weights" or "KV cache".
        self._doubts: dict[str, str] = {}
        self._paused_for_sync = False
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
        if self._facts.name == "cpu":
            _unlink_message_queues()
        if self._rung == "keep" and self.config.free_cache_engine:
            self._say_unsafe(obstacles)

    async def _configure_workers(self, kv_rung: str) -> list[dict[str, Any]]:
        """Hand the decisions to vLLM's workers; what each of them is, and the rung that it found."""
        reports: list[dict[str, Any]] = await self.engine.collective_rpc(
            "ascend_safe_configure",
            kwargs={
                "kv_rung": kv_rung,
                "weight_path": self._decisions["weight_path"].value,
                "verify": self._options.verify,
            },
        )
        return reports

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
        self._paused_for_sync = False  # from here on it is the sleep that pauses
        if self._rung == "sleep":
            async with self._device_memory_event("sleep"):
                await super().sleep()
            return
        if self.node_rank != 0 or not self.config.free_cache_engine or self.rollout_mode == RolloutMode.STANDALONE:
            return
        await self.free_cache_engine()

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """Take memory back.  Weights are never given away without sleep mode, so waking them alone is nothing."""
        if self._rung == "sleep":
            async with self._device_memory_event("wake_up", tags=tags):
                await super().wake_up(tags=tags)
                await self._settle_weights()
            await self._reset_prefix_cache()
            return
        if self.node_rank != 0 or self.rollout_mode == RolloutMode.STANDALONE:
            return
        if tags is None or "kv_cache" in tags:
            await self.init_cache_engine()

    async def release_kv_cache(self) -> None:
        """Give the KV cache's memory back for the time of a weight sync (trainer and rollout apart)."""
        self._paused_for_sync = False
        if self._rung == "sleep":
            async with self._device_memory_event("sleep", tags=["kv_cache"]):
                await super().release_kv_cache()
        elif self._frees_kv_cache():
            await self.free_cache_engine()

    async def resume_kv_cache(self) -> None:
        """Take it again after the sync."""
        if self._rung == "sleep":
            async with self._device_memory_event("wake_up", tags=["kv_cache"]):
                await super().resume_kv_cache()
                await self._settle_weights()
            await self._reset_prefix_cache()
        elif self._frees_kv_cache():
            await self.init_cache_engine()

    def _frees_kv_cache(self) -> bool:
        return (
            self.node_rank == 0 and bool(self.config.free_cache_engine) and self.rollout_mode != RolloutMode.COLOCATED
        )

    async def free_cache_engine(self) -> list[dict[str, Any]]:
        """Pause the scheduler and give the KV cache's memory back.  Requests in flight are aborted; new ones wait.

        Returns:
            What each worker did (`KVCacheChange` as a mapping).  A second call changes nothing.
        """
        self._paused_for_sync = False
        # Aborts what runs, and clears the prefix cache: the blocks that it names are about to go.
        await self.engine.pause_generation(clear_cache=True)
        return await self._kv_step("free_cache_engine")

    async def init_cache_engine(self) -> list[dict[str, Any]]:
        """Take the KV cache's memory again and let the scheduler go on.  A second call changes nothing.

        Returns:
            What each worker did (`KVCacheChange` as a mapping).

        Raises:
            EngineInDoubtError: the memory is not there (the message has the numbers, and what to lower), or the last
                weight sync failed: the scheduler must not go on then.
        """
        if "weights" in self._doubts:
            raise EngineInDoubtError(f"The KV cache is not made again: {self._doubts['weights']}")
        changes = await self._kv_step("init_cache_engine")
        if any(change["changed"] for change in changes):
            await self._reset_prefix_cache()
        self._doubts.pop("KV cache", None)
        await self.engine.resume_generation()
        return changes

    @contextlib.asynccontextmanager
    async def _device_memory_event(self, step: str, **detail: Any) -> AsyncIterator[None]:
        """One event of what a step of vLLM's sleep mode did to the devices' memory, as the driver counts it."""
        # The servers of a replica's further nodes have no engine to ask (verl 0.9.1, run_headless).
        if self.node_rank != 0 or not os.environ.get(events.EVENTS_VARIABLE):
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
        if self.node_rank == 0 and self._decisions["weight_path"].value == "by_layout":
            await self.engine.collective_rpc("ascend_safe_settle")

    async def _kv_step(self, method: str) -> list[dict[str, Any]]:
        try:
            changes: list[dict[str, Any]] = await self.engine.collective_rpc(method)
        except Exception as error:
            self._doubts["KV cache"] = f"{method} failed: {error}"
            raise EngineInDoubtError(self._doubts["KV cache"]) from error
        for rank, change in enumerate(changes):
            logger.info("replica %d, worker %d: %s", self.replica_rank, rank, _sentence(change))
        return changes

    async def _reset_prefix_cache(self) -> None:
        """Forget the cached blocks: their contents are gone.  Not being able to is an error, since a later request
        would be answered from them."""
        if self.node_rank != 0:
            return
        if not await self.engine.reset_prefix_cache(reset_connector=True):
            self._doubts["KV cache"] = (
                "the prefix cache could not be reset after the KV cache was made again: a request still holds blocks; "
                "abort all requests before the wake-up"
            )
            raise EngineInDoubtError(self._doubts["KV cache"])

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
        started = time.perf_counter()
        # A scheduler that went on after a failed sync would run requests in flight on half of a model.
        if not await self.engine.is_paused():
            await self.engine.pause_generation(mode="keep", clear_cache=False)
            self._paused_for_sync = True
        try:
            await super().collective_rpc(method=method, timeout=timeout, args=args, kwargs=kwargs)
        except asyncio.CancelledError:
            self._doubts["weights"] = "the last weight sync was broken off"
            raise
        except Exception as error:
            self._doubts["weights"] = f"the last weight sync failed: {error}"
            raise
        self._doubts.pop("weights", None)
        if self._paused_for_sync:
            self._paused_for_sync = False
            await self.engine.resume_generation()
        self._emit("sync", time.perf_counter() - started, {})

    async def abort_all_requests(self, *args: Any, **kwargs: Any) -> Any:
        """See verl's.  It pauses the engine until `resume_generation`, which a weight sync must not do for it."""
        self._paused_for_sync = False
        return await super().abort_all_requests(*args, **kwargs)

    async def doubt_weights(self, reason: str) -> None:
        """Refuse to generate until a full weight sync has passed: the trainer knows that the last one was not whole."""
        self._doubts["weights"] = f"the last weight sync failed: {reason}"

    async def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate, unless the engine is in doubt.

        Raises:
            EngineInDoubtError: with the step that failed.
            ValueError: the prompt leaves no room below max_model_len (verl's own check).
        """
        if self._doubts:
            reasons = "; ".join(self._doubts.values())
            raise EngineInDoubtError(
                f"This rollout engine refuses to generate: {reasons}. A full weight sync that passes, and a KV cache "
                "that is there, end this"
            )
        return await super().generate(*args, **kwargs)

    async def memory(self) -> list[dict[str, int]]:
        """Bytes of KV cache and resident memory of each worker: `kv_bytes`, `rss`, `pid`."""
        reports: list[dict[str, int]] = await self.engine.collective_rpc("ascend_safe_memory")
        return reports

    def explain(self) -> dict[str, Any]:
        """What was decided for this engine, as plain values: `facts`, `decisions`, `options`, `rung`."""
        return {
            "facts": dataclasses.asdict(self._facts),
            "decisions": self._decisions.as_dicts(),
            "options": self._options.as_dict(),
            "rung": self._rung,
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
