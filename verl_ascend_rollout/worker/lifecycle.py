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
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from verl_ascend_rollout import events
from verl_ascend_rollout.options import KVMethod
from verl_ascend_rollout.transport.stream import NamedTensor
from verl_ascend_rollout.worker import kv_cache, worker_rpc
from verl_ascend_rollout.worker.weights import expert_format, layerwise, paths
from verl_ascend_rollout.worker.weights import sync as weight_sync
from verl_ascend_rollout.worker.weights.manifest import Manifest
from verl_ascend_rollout.worker.weights.plan import Plan

logger = logging.getLogger("verl_ascend_rollout.worker")


class AscendSafeLifecycle:
    """A guarded KV cache, and weight loading that is right on every reload."""

    # What vLLM's Worker brings.
    model_runner: Any

    def ascend_safe_configure(
        self, kv_release: str | Sequence[str], weight_path: str | Sequence[str], verify: str
    ) -> dict[str, Any]:
        """Take over the policy's decisions; the first call of the server once the engine is up.

        Args:
            kv_release: how the KV cache may be given back: the policy's methods, of which the first that works here is
                taken; one method; or `auto`, which is all of them.
            weight_path: `by_layout`, `layerwise` or `verl`; several, of which the first that works here is taken; or
                `auto` (see `paths`).
            verify: `first`, `always` or `off`.

        Returns:
            What this worker is and what it found, for the server's log: `pid`, `host`, `kv_release` (the method that is
            taken) and `obstacles` (why not those before it), `weight_path` and `weight_path_obstacles`, `kv_bytes`,
            `worker` and `model_runner`.
        """
        self._ascend_safe_probe = kv_cache.probe(self, kv_release)
        path, reasons = paths.choose(
            weight_path, weight_sync.unwrapped(self.model_runner), self.model_runner.vllm_config
        )
        self._ascend_safe_weight_path = path
        self._ascend_safe_verify = verify
        self._ascend_safe_syncs = 0
        return {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "kv_release": self._ascend_safe_probe.method,
            "obstacles": list(self._ascend_safe_probe.obstacles),
            "weight_path": path,
            "weight_path_obstacles": reasons,
            "kv_bytes": kv_cache.kv_bytes(self),
            "worker": type(self).__name__,
            "model_runner": type(self.model_runner).__name__,
        }

    def ascend_safe_call(self, method: str, keywords: dict[str, Any] | None = None) -> dict[str, Any]:
        """Call `method` and answer with its result or its error, never with an exception (see `worker_rpc`).

        Args:
            method: the name of a method of this worker.
            keywords: its arguments.

        Returns:
            What `worker_rpc.unwrap` takes.
        """
        return worker_rpc.capture(lambda: getattr(self, method)(**(keywords or {})), method)

    def free_cache_engine(self) -> dict[str, Any]:
        """Give the KV cache's memory back to the system.

        The scheduler must be paused (the rollout server does that).  A second call changes nothing.

        Returns:
            The `KVCacheChange` as a mapping: `kv_release`, `changed`, bytes and resident memory before and after,
            `seconds`.

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

    def ascend_safe_restore_kernel_format(self) -> list[str]:
        """Put weights that a wake-up left in checkpoint format into kernel format, and return their names."""
        if self._ascend_safe_path() == "verl":
            return []
        return expert_format.restore_kernel_format(weight_sync.unwrapped(self.model_runner))

    def ascend_safe_memory(self, kv_asleep: bool | None = None) -> dict[str, int]:
        """Return the bytes that the KV tensors hold, what is used of the device, and the process's resident memory.

        Args:
            kv_asleep: said by a caller that has just put the KV cache to sleep, or woken it, through vLLM itself:
                sleep mode leaves the tensors as they are.

        Returns:
            `kv_bytes`, `device_used` (of the whole device, by the driver's count; 0 on a CPU), `rss`, `pid`.
        """
        if kv_asleep is not None:
            self._ascend_safe_kv_asleep = kv_asleep
        return {
            "kv_bytes": kv_cache.kv_bytes(self),
            "device_used": kv_cache.device_used(self),
            "rss": kv_cache.resident(),
            "pid": os.getpid(),
        }

    def ascend_safe_reload_from_disk(self, path: str | list[str], changed: bool = False) -> dict[str, Any]:
        """Load every weight again from safetensors files, as a weight sync would; for checks and tests.

        Args:
            path: these, or the folder of a checkpoint.
            changed: load other values: each tensor turned by one place along its last axis, so that sizes and
                magnitudes stay.

        Returns:
            `tensors`, `copies`, `bytes`, `seconds`.
        """
        from safetensors import safe_open

        def tensors(file: str | Path) -> Iterator[NamedTensor]:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - a safetensors file is no mapping
                    tensor = opened.get_tensor(name)
                    yield name, tensor.roll(1, -1) if changed and tensor.dim() else tensor

        def receive(load: weight_sync.Loader) -> None:
            for file in sorted(Path(path).glob("*.safetensors")) if isinstance(path, str) else path:
                load(tensors(file))

        return self._ascend_safe_reload(receive)

    def ascend_safe_load_snapshot(self, snapshot: dict[str, Any]) -> dict[str, Any]:
        """Load the weights of the last sync into an engine that was made again: see `transport.snapshot`.

        Returns:
            `tensors`, `copies`, `bytes`, `seconds`.

        Raises:
            TransportError: the snapshot is gone, or not what was written.
        """
        device = kv_cache.device_of(self)

        def receive(load: weight_sync.Loader) -> None:
            from verl_ascend_rollout.transport.snapshot import Snapshot  # needs xxhash, which verl brings

            for bucket in Snapshot(**snapshot).read(device):
                load(bucket)

        return self._ascend_safe_reload(receive)

    # ------------------------------------------------------------------------------------------------------------

    def _ascend_safe_reload(self, receive: Any) -> dict[str, Any]:
        """Run one full sync of every model on this worker, by the weight path that fits its kernels.

        Args:
            receive: is given a function that loads weights, calls it until there are no more, and may
                return more for the event.
        """
        from vllm.config import set_current_vllm_config

        self._ascend_safe_syncs = getattr(self, "_ascend_safe_syncs", 0) + 1
        # What a sync that passed did, for the next ones to repeat.
        plan: Plan | None = getattr(self, "_ascend_safe_plan", None)
        if plan is None:
            plan = self._ascend_safe_plan = Plan()
        replayed = plan.replayable
        verify = getattr(self, "_ascend_safe_verify", "first")
        # A plan comes from a sync that passed: so `first` is every sync until one has, and each by a loader that is
        # asked every time.
        reads_values = verify == "always" or (verify == "first" and not replayed)
        manifest = Manifest(finite=reads_values, compare=reads_values, sync=self._ascend_safe_syncs)
        started = time.perf_counter()
        runner = self.model_runner
        model = weight_sync.unwrapped(runner)
        by_vllm = self._ascend_safe_path() == "layerwise"
        sync = layerwise.reload if by_vllm else weight_sync.reload
        with (
            torch.no_grad(),
            set_current_vllm_config(runner.vllm_config),
            sync(model, runner.vllm_config.model_config, manifest, plan) as load,
        ):
            received: dict[str, Any] = receive(load) or {}
        summary = {
            "tensors": len(manifest.names),
            "copies": manifest.copies,
            "bytes": manifest.bytes,
            "seconds": time.perf_counter() - started,
        }
        counts = {name: summary[name] for name in ("tensors", "copies", "bytes")}
        path = "layerwise" if by_vllm else "replay" if replayed else "loader"
        detail = {**counts, "path": path, **received}
        events.emit(events.Event(step="sync", process="worker", seconds=float(summary["seconds"]), detail=detail))
        logger.info("weight sync %d: %s", self._ascend_safe_syncs, summary)
        return summary

    def _ascend_safe_kv_step(self, action: str) -> dict[str, Any]:
        method = self._ascend_safe_kv_method()
        change = kv_cache.free(self, method) if action == "free" else kv_cache.init(self, method)
        if method in ("kv_only", "sleep"):
            self.ascend_safe_restore_kernel_format()
        events.emit(
            events.Event(
                step=action,
                process="worker",
                seconds=change.seconds,
                bytes_before=change.bytes_before,
                bytes_after=change.bytes_after,
                rss_before=change.rss_before,
                rss_after=change.rss_after,
                detail={"rung": change.kv_release, "changed": change.changed, "reason": change.reason},
            )
        )
        return dataclasses.asdict(change)

    def _ascend_safe_path(self) -> str:
        return getattr(self, "_ascend_safe_weight_path", "verl")

    def _ascend_safe_kv_method(self) -> KVMethod:
        found: kv_cache.Probe | None = getattr(self, "_ascend_safe_probe", None)
        if found is None:
            # Used without our server (a smoke test, a script): probe at the first use.
            found = self._ascend_safe_probe = kv_cache.probe(self)
        return found.method
