"""One vLLM engine, measured for `ascend-safe bench kv`.

python -m verl_ascend_rollout.bench.kv_engine ASKED.json ANSWERED.json
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, get_args

import torch

from verl_ascend_rollout.bench.kv import ENGINE, FLOOR
from verl_ascend_rollout.worker import kv_aliases, kv_cache
from verl_ascend_rollout.worker.lifecycle import AscendSafeLifecycle

WORKER = "verl_ascend_rollout.bench.kv_engine.KVBenchWorker"

Sample = dict[str, Any]


class KVBenchWorker(AscendSafeLifecycle):
    """Our lifecycle, with the steps of this bench; it runs where the tensors are."""

    device: Any

    def ascend_safe_bench_rungs(self) -> dict[str, Any]:
        """The rungs that work here, the one that is chosen, and why others do not work."""
        found = [rung for rung in get_args(kv_cache.Rung) if rung != "keep" and kv_cache.probe(self, rung).rung == rung]
        probe = kv_cache.probe(self)
        obstacles = [reason for rung in get_args(kv_cache.Rung) for reason in kv_cache.probe(self, rung).obstacles]
        return {
            "rungs": found,
            "chosen": probe.rung,
            "obstacles": list(dict.fromkeys(obstacles)),
            "kv_bytes": kv_cache.kv_bytes(self),
        }

    def ascend_safe_bench_cycle(self, rung: kv_cache.Rung) -> list[Sample]:
        """One free and one init by a rung."""
        samples = []
        for step in (kv_cache.free, kv_cache.init):
            before = self._ascend_safe_system_bytes()
            change = step(self, rung)
            self._ascend_safe_synchronize()
            moved = abs(self._ascend_safe_system_bytes() - before)
            samples.append(
                _sample(rung, change.action, change.seconds, change.bytes_before + change.bytes_after, moved)
            )
        return samples

    def ascend_safe_bench_floor(self) -> list[Sample]:
        """Tensors of the KV cache's sizes, allocated and touched, and let go of; the KV cache is away meanwhile."""
        sizes = [storage.nbytes() for storage in kv_aliases.storages(self.model_runner).values()]
        rung: kv_cache.Rung = "direct" if not kv_cache._sleep_mode(self) else kv_cache.probe(self).rung
        kv_cache.free(self, rung)
        before, started = self._ascend_safe_system_bytes(), time.perf_counter()
        tensors = [torch.zeros(size, dtype=torch.int8, device=self.device) for size in sizes]
        self._ascend_safe_synchronize()
        made, there = time.perf_counter() - started, self._ascend_safe_system_bytes()
        started = time.perf_counter()
        tensors.clear()
        if not kv_cache._on_cpu(self):
            kv_cache._empty_allocator(self)
        freed = time.perf_counter() - started
        after = self._ascend_safe_system_bytes()
        kv_cache.init(self, rung)
        return [
            _sample(FLOOR, "init", made, sum(sizes), there - before),
            _sample(FLOOR, "free", freed, sum(sizes), there - after),
        ]

    def ascend_safe_bench_system_bytes(self) -> int:
        """Bytes in use, as the system counts them."""
        return self._ascend_safe_system_bytes()

    def _ascend_safe_system_bytes(self) -> int:
        return kv_cache._resident() if kv_cache._on_cpu(self) else kv_cache.device_used(self)

    def _ascend_safe_synchronize(self) -> None:
        if not kv_cache._on_cpu(self):
            torch.get_device_module(self.device).synchronize()


def main() -> None:
    """Measure what was asked for and write the samples."""
    asked, answered = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM

    extra = {"additional_config": asked["additional_config"]} if asked["additional_config"] else {}
    if asked["sleep_mode"]:
        extra["enable_sleep_mode"] = True
    llm = LLM(
        model=asked["model"],
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=256,
        enable_prefix_caching=False,
        block_size=asked["block_size"],
        kv_cache_memory_bytes=asked["bytes"],
        worker_extension_cls=WORKER,
        **extra,
    )

    def call(method: str, *arguments: Any) -> Any:
        return llm.collective_rpc(method, args=arguments)[0]

    found = call("ascend_safe_bench_rungs")
    rungs = found["rungs"]
    if asked["sleep_mode"]:
        # Dropped, they would go back to sleep mode's pool, and new ones would not come from it.
        rungs = [rung for rung in rungs if rung != "direct"]
    samples: list[Sample] = []
    call("ascend_safe_bench_floor")  # the first pass pays for what is done once
    for _ in range(asked["repeats"]):
        samples += call("ascend_safe_bench_floor")
        for rung in rungs:
            samples += call("ascend_safe_bench_cycle", rung)
        if asked["sleep_mode"]:
            samples += _engine_cycle(llm, call)
    names = [FLOOR, *rungs, *([ENGINE] if asked["sleep_mode"] else [])]
    answered.write_text(json.dumps({**found, "rungs": names, "samples": samples, "sleep_mode": asked["sleep_mode"]}))


def _engine_cycle(llm: Any, call: Any) -> list[Sample]:
    """vLLM's own sleep at level 1 and wake-up: the weights go and come as well."""
    samples = []
    for step, act in (("free", lambda: llm.sleep(level=1)), ("init", llm.wake_up)):
        before, started = call("ascend_safe_bench_system_bytes"), time.perf_counter()
        act()
        seconds = time.perf_counter() - started
        moved = abs(call("ascend_safe_bench_system_bytes") - before)
        samples.append(_sample(ENGINE, step, seconds, moved, moved))
    return samples


def _sample(rung: str, step: str, seconds: float, size: int, system: int) -> Sample:
    return {"rung": rung, "step": step, "seconds": seconds, "bytes": size, "system_bytes": system}


if __name__ == "__main__":
    main()
