"""`BenchWorker`: the benches' part inside vLLM's worker process, where the weights and the KV cache are."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from verl_ascend_rollout.integration import verl_sequence
from verl_ascend_rollout.options import KVMethod
from verl_ascend_rollout.tools.bench.kv import FLOOR, sample
from verl_ascend_rollout.worker import kv_cache, kv_references
from verl_ascend_rollout.worker.lifecycle import AscendSafeLifecycle
from verl_ascend_rollout.worker.weights import merged_experts
from verl_ascend_rollout.worker.weights.manifest import first_line
from verl_ascend_rollout.worker.weights.plan import Plan

STD = 0.02


class BenchWorker(AscendSafeLifecycle):
    """vLLM's worker with a set of weights to load again and again, and with its KV cache to free and make again."""

    def bench_prepare(self, tensors: list[tuple[str, list[int]]]) -> dict[str, Any]:
        """Make the weights that are loaded: random bf16, beside the engine, on its device.

        Args:
            tensors: name and shape of each, experts merged.

        Returns:
            `bytes`, `tensors` (taken apart), `device`, and `threads` that torch computes with here.
        """
        generator = torch.Generator(device=self._bench_device).manual_seed(0)
        self._bench_merged = []
        for name, shape in tensors:
            tensor = torch.empty(shape, dtype=torch.bfloat16, device=self._bench_device)
            filled = tensor.fill_(1.0) if name.endswith("norm.weight") else tensor.normal_(0, STD, generator=generator)
            self._bench_merged.append((name, filled))
        config = self.model_runner.vllm_config.model_config
        # The same memory under the names of a checkpoint, as most trainers send it.
        self._bench_apart = [
            part
            for name, tensor in self._bench_merged
            for part in merged_experts.parts(name, tensor, config) or [(name, tensor)]
        ]
        self._bench_targets = [torch.zeros_like(tensor) for _, tensor in self._bench_merged]
        return {
            "bytes": sum(tensor.nbytes for _, tensor in self._bench_merged),
            "tensors": len(self._bench_apart),
            "threads": torch.get_num_threads(),
            "device": "cpu" if self._bench_module is None else str(self._bench_module.get_device_name()),
        }

    def bench_load(self, path: str, repeats: int, merged: bool = False, verify: str = "first") -> dict[str, Any]:
        """Load the weights again and again, and return what that cost, and how many tensors and copies ours took.

        Args:
            path: the name of a method below, which says what it does.
            repeats: how often.
            merged: send experts merged, and not one tensor each.
            verify: which of our syncs look at the values.
        """
        self._bench_weights = self._bench_merged if merged else self._bench_apart
        self._ascend_safe_verify = verify
        self._bench_counts: dict[str, int] = {}
        return {**self._bench_measure(getattr(self, f"_bench_{path}"), repeats), **self._bench_counts}

    def bench_kv_methods(self) -> dict[str, Any]:
        """Return the methods that work here, the one that is chosen, and why others do not work."""
        probes = {method: kv_cache.probe(self, method) for method in kv_cache.METHODS if method != "keep"}
        obstacles = [reason for probe in probes.values() for reason in probe.obstacles]
        return {
            "rungs": [method for method, probe in probes.items() if probe.method == method],
            "chosen": kv_cache.probe(self).method,
            "obstacles": list(dict.fromkeys(obstacles)),
            "kv_bytes": kv_cache.kv_bytes(self),
        }

    def bench_kv_cycle(self, method: KVMethod) -> list[dict[str, Any]]:
        """Free and init once by a method."""
        samples = []
        for step in (kv_cache.free, kv_cache.init):
            before = self.bench_system_bytes()
            change = step(self, method)
            self._bench_synchronize()
            moved, size = abs(self.bench_system_bytes() - before), change.bytes_before + change.bytes_after
            samples.append(sample(method, change.action, change.seconds, size, moved))
        return samples

    def bench_kv_floor(self) -> list[dict[str, Any]]:
        """Allocate tensors of the KV cache's sizes, touch them, and let go; the KV cache is away meanwhile."""
        sizes = [storage.nbytes() for storage in kv_references.storages(self.model_runner).values()]
        method: KVMethod = kv_cache.probe(self).method if kv_cache.sleep_mode(self) else "reallocate"
        kv_cache.free(self, method)
        before, started = self.bench_system_bytes(), time.perf_counter()
        tensors = [torch.zeros(size, dtype=torch.int8, device=self._bench_device) for size in sizes]
        self._bench_synchronize()
        made, there = time.perf_counter() - started, self.bench_system_bytes()
        started = time.perf_counter()
        tensors.clear()
        if self._bench_module is not None:
            kv_cache.empty_allocator(self)
        freed, after = time.perf_counter() - started, self.bench_system_bytes()
        kv_cache.init(self, method)
        return [
            sample(FLOOR, "init", made, sum(sizes), there - before),
            sample(FLOOR, "free", freed, sum(sizes), there - after),
        ]

    def bench_system_bytes(self) -> int:
        """Return the bytes in use, as the system counts them."""
        return kv_cache.resident() if self._bench_module is None else kv_cache.device_used(self)

    # ------------------------------------------------------------------------------------------------------------

    @property
    def _bench_device(self) -> torch.device:
        return kv_cache.device_of(self)

    @property
    def _bench_module(self) -> Any:
        """torch's module for the device; `None` for a CPU."""
        return None if self._bench_device.type == "cpu" else torch.get_device_module(self._bench_device)

    def _bench_stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self._bench_weights)

    def _bench_plain_copy(self) -> None:
        """Copy the same bytes, in few large tensors, into memory that has been used before."""
        for target, (_, tensor) in zip(self._bench_targets, self._bench_merged, strict=True):
            target.copy_(tensor)

    def _bench_ours_first(self) -> None:
        """Sync without a plan: through the model's own loader."""
        self._ascend_safe_plan = Plan()
        self._bench_ours_later()

    def _bench_ours_later(self) -> None:
        """Sync along the plan that an earlier sync left."""
        done = self._ascend_safe_reload(lambda load: load(self._bench_stream()))
        self._bench_counts = {"tensors": done["tensors"], "copies": done["copies"]}

    def _bench_vllm_reload(self) -> None:
        """Call vLLM's own `reload_weights`, fed with the same tensors."""
        self.model_runner.reload_weights(weights_iterator=self._bench_stream())

    def _bench_verl(self) -> None:
        """Load by verl's own sequence."""
        verl_sequence.load(self.model_runner, self._bench_stream())

    def _bench_measure(self, run: Callable[[], None], repeats: int) -> dict[str, Any]:
        """Return the median of the seconds, each run right after a plain copy; the median of its ratio to that copy,
        since a machine is not equally fast all the time; and the most memory beyond what there was before: in one more
        run, since what is done to see it makes a run slower."""
        found: dict[str, Any] = dict.fromkeys(("seconds", "ratio", "peak_extra_bytes", "error"))
        try:
            pairs = [(self._bench_time(self._bench_plain_copy), self._bench_time(run)) for _ in range(repeats)]
            before = self._bench_reset_peak()
            self._bench_time(run)
            after = self._bench_peak()
        except Exception as failure:
            return {**found, "error": f"{type(failure).__name__}: {first_line(failure)}"}
        found["seconds"] = statistics.median(seconds for _, seconds in pairs)
        found["ratio"] = statistics.median(seconds / plain for plain, seconds in pairs)
        if before is not None and after is not None:
            found["peak_extra_bytes"] = after - before
        return found

    def _bench_time(self, run: Callable[[], None]) -> float:
        started = time.perf_counter()
        with torch.no_grad():
            run()
        self._bench_synchronize()
        return time.perf_counter() - started

    def _bench_synchronize(self) -> None:
        if self._bench_module is not None:
            self._bench_module.synchronize()

    def _bench_reset_peak(self) -> int | None:
        """Forget the highest use of memory so far; what is used now, in bytes, or `None` where nobody counts."""
        if self._bench_module is not None:
            self._bench_module.reset_peak_memory_stats()
            return int(self._bench_module.memory_allocated())
        with contextlib.suppress(OSError, AttributeError):
            # What glibc keeps of freed memory would hide what is asked for next.
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        try:
            # proc(5): 5 resets the high-water mark of resident memory.
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            return None
        return kv_cache.resident()

    def _bench_peak(self) -> int | None:
        if self._bench_module is not None:
            return int(self._bench_module.max_memory_allocated())
        # The only count of it that `clear_refs` resets: getrusage's does not go down.
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
