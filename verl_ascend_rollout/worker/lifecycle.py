"""What a worker can do with its KV cache and its weights, on vLLM alone: `AscendSafeLifecycle`.

Mixed into vLLM's Worker by `worker_extension_cls`, as the base of `AscendSafeWorkerExtension`, which adds verl's weight
transport, or by itself where there is no verl (a smoke test, a script).  vLLM refuses an extension that redefines a
name that the Worker has (vLLM 0.11 to 0.28, v1/worker/worker_base.py), so every public name here is one that no Worker
has: `free_cache_engine` and `init_cache_engine` are the names that users know (vllm#11638), the others are prefixed.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from typing import Any

import torch

from verl_ascend_rollout import answers, events
from verl_ascend_rollout.worker import kv_cache
from verl_ascend_rollout.worker.weights import bracket, moe
from verl_ascend_rollout.worker.weights.plan import Plan
from verl_ascend_rollout.worker.weights.verify import Manifest

logger = logging.getLogger("verl_ascend_rollout.worker")


class AscendSafeLifecycle:
    """A guarded KV cache, and weight loading that is right on every reload."""

    # What vLLM's Worker brings.
    model_runner: Any

    def ascend_safe_configure(self, kv_rung: str, weight_path: str, verify: str) -> dict[str, Any]:
        """Take over the policy's decisions; the first call of the server once the engine is up.

        Args:
            kv_rung: the rung that the policy chose, or `auto`.
            weight_path: `by_layout` (each weight by the layout recorded for it), or `verl` (verl's own sequence).
            verify: `first`, `always` or `off`.

        Returns:
            What this worker is and which rung it found, for the server's log: `pid`, `rung`, `obstacles`,
            `kv_bytes`, `worker` and `model_runner`.
        """
        self._ascend_safe_probe = kv_cache.probe(self, kv_rung)
        self._ascend_safe_weight_path = weight_path
        self._ascend_safe_verify = verify
        self._ascend_safe_syncs = 0
        return {
            "pid": os.getpid(),
            "rung": self._ascend_safe_probe.rung,
            "obstacles": list(self._ascend_safe_probe.obstacles),
            "kv_bytes": kv_cache.kv_bytes(self),
            "worker": type(self).__name__,
            "model_runner": type(self.model_runner).__name__,
        }

    def ascend_safe_answer(self, method: str, keywords: dict[str, Any] | None = None) -> dict[str, Any]:
        """Call `method` and answer with its result or its error, never with an exception (see `answers`).

        Args:
            method: the name of a method of this worker.
            keywords: its arguments.

        Returns:
            What `answers.values` takes.
        """
        return answers.answer(lambda: getattr(self, method)(**(keywords or {})), method)

    def free_cache_engine(self) -> dict[str, Any]:
        """Give the KV cache's memory back to the system.

        The scheduler must be paused (the rollout server does that).  A second call changes nothing.

        Returns:
            The `KVCacheChange` as a mapping: `rung`, `changed`, bytes and resident memory before and after, `seconds`.

        Raises:
            KVCacheHeldError: somebody else holds the KV tensors.
        """
        return self._ascend_safe_kv_step("free")

    def init_cache_engine(self) -> dict[str, Any]:
        """Take the KV cache's memory again.  A second call changes nothing.

        Returns:
            The `KVCacheChange` as a mapping.

        Raises:
            KVCacheMemoryError: the memory is not there.
            KVCacheHeldError: the old cache was not let go of.
        """
        return self._ascend_safe_kv_step("init")

    def ascend_safe_settle(self) -> list[str]:
        """Put weights that a wake-up left in checkpoint form into kernel form; their names (see `moe.settle`)."""
        if self._ascend_safe_path() == "verl":
            return []
        return moe.settle(bracket.unwrapped(self.model_runner))

    def ascend_safe_memory(self, kv_asleep: bool | None = None) -> dict[str, int]:
        """Bytes that the KV tensors hold, what is used of the device, and the process's resident memory.

        Args:
            kv_asleep: said by a caller that has just put the KV cache to sleep, or woken it, through vLLM itself:
                sleep mode leaves the tensors as they are.

        Returns:
            `kv_bytes`, `device_used` (of the whole device, by the driver's count; 0 on a CPU), `rss`, `pid`.
        """
        import psutil

        if kv_asleep is not None:
            self._ascend_safe_kv_asleep = kv_asleep
        return {
            "kv_bytes": kv_cache.kv_bytes(self),
            "device_used": kv_cache.device_used(self),
            "rss": int(psutil.Process().memory_info().rss),
            "pid": os.getpid(),
        }

    def ascend_safe_reload_from_disk(self, path: str) -> dict[str, Any]:
        """Load every weight again from the safetensors files of `path`, as a weight sync would; for checks and tests.

        Returns:
            `tensors`, `bytes`, `seconds`.
        """
        from pathlib import Path

        from safetensors import safe_open

        def receive(load: bracket.Loader) -> None:
            for file in sorted(Path(path).glob("*.safetensors")):
                with safe_open(file, framework="pt") as checkpoint:
                    for name in checkpoint.keys():  # noqa: SIM118 - a safetensors file is no mapping
                        load([(name, checkpoint.get_tensor(name))])

        return self._ascend_safe_reload(receive)

    # ------------------------------------------------------------------------------------------------------------

    def _ascend_safe_reload(self, receive: Any) -> dict[str, Any]:
        """One full sync of every model on this worker, through the bracket that fits its kernels.

        Args:
            receive: is given a function that loads (name, tensor) pairs, calls it until there are no more, and may
                return more for the event.
        """
        from vllm.config import set_current_vllm_config

        self._ascend_safe_syncs = getattr(self, "_ascend_safe_syncs", 0) + 1
        verify = getattr(self, "_ascend_safe_verify", "first")
        reads_values = verify == "always" or (verify == "first" and self._ascend_safe_syncs == 1)
        manifest = Manifest(
            complete=verify != "off", finite=reads_values, compare=reads_values, sync=self._ascend_safe_syncs
        )
        # What the first sync did, for the next ones to repeat.
        plan: Plan | None = getattr(self, "_ascend_safe_plan", None)
        if plan is None:
            plan = self._ascend_safe_plan = Plan()
        replayed = plan.replayable
        started = time.perf_counter()
        runner = self.model_runner
        model = bracket.unwrapped(runner)
        with (
            torch.no_grad(),
            set_current_vllm_config(runner.vllm_config),
            bracket.reload(model, runner.vllm_config.model_config, manifest, plan) as load,
        ):
            received: dict[str, Any] = receive(load) or {}
        summary = {
            "tensors": len(manifest.names),
            "bytes": manifest.bytes,
            "seconds": time.perf_counter() - started,
        }
        events.emit(
            events.Event(
                step="sync",
                process="worker",
                seconds=float(summary["seconds"]),
                detail={
                    "tensors": summary["tensors"],
                    "bytes": summary["bytes"],
                    "path": "replay" if replayed else "loader",
                    **received,
                },
            )
        )
        logger.info("weight sync %d: %s", self._ascend_safe_syncs, summary)
        return summary

    def _ascend_safe_kv_step(self, action: str) -> dict[str, Any]:
        rung = self._ascend_safe_rung()
        change = kv_cache.free(self, rung) if action == "free" else kv_cache.init(self, rung)
        if rung == "sleep":
            self.ascend_safe_settle()
        events.emit(
            events.Event(
                step=action,
                process="worker",
                seconds=change.seconds,
                bytes_before=change.bytes_before,
                bytes_after=change.bytes_after,
                rss_before=change.rss_before,
                rss_after=change.rss_after,
                detail={"rung": change.rung, "changed": change.changed, "reason": change.reason},
            )
        )
        return dataclasses.asdict(change)

    def _ascend_safe_path(self) -> str:
        return getattr(self, "_ascend_safe_weight_path", "verl")

    def _ascend_safe_rung(self) -> kv_cache.Rung:
        found: kv_cache.Probe | None = getattr(self, "_ascend_safe_probe", None)
        if found is None:
            # Used without our server (a smoke test, a script): probe at the first use.
            found = self._ascend_safe_probe = kv_cache.probe(self)
        return found.rung
