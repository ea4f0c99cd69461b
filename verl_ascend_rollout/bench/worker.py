"""`BenchWorker`: the benches' part inside vLLM's worker process, where the weights are."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from verl_ascend_rollout.worker.lifecycle import AscendSafeLifecycle
from verl_ascend_rollout.worker.weights import bracket
from verl_ascend_rollout.worker.weights.plan import Plan
from verl_ascend_rollout.worker.weights.verify import first_line

STD = 0.02


class BenchWorker(AscendSafeLifecycle):
    """vLLM's worker with a set of weights to load again and again."""

    def bench_prepare(self, tensors: list[tuple[str, list[int]]]) -> dict[str, Any]:
        """Make the weights that are loaded: random bf16, beside the engine, on its device.

        Args:
            tensors: name and shape of each, as the checkpoint has them.

        Returns:
            `bytes`, `tensors`, and `threads` that torch computes with here.
        """
        device = self._bench_device()
        generator = torch.Generator(device=device).manual_seed(0)
        self._bench_weights = [
            (name, torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0.0, STD, generator=generator))
            for name, shape in tensors
        ]
        for name, tensor in self._bench_weights:
            if name.endswith("norm.weight"):
                tensor.fill_(1.0)
        self._bench_targets = [torch.zeros_like(tensor) for _, tensor in self._bench_weights]
        return {
            "bytes": sum(tensor.nbytes for _, tensor in self._bench_weights),
            "tensors": len(self._bench_weights),
            "threads": torch.get_num_threads(),
            "device": _device_name(device),
        }

    def bench_plain_copy(self, repeats: int) -> dict[str, Any]:
        """Copy the same bytes, tensor by tensor, into memory that has been used before."""
        return self._bench_measure(self._bench_copy, repeats)

    def bench_ours_first(self, repeats: int) -> dict[str, Any]:
        """Our bracket without a plan: through the model's own loader."""

        def first() -> None:
            self._ascend_safe_plan = Plan()
            self._bench_sync()

        self._ascend_safe_syncs, self._ascend_safe_verify = 1, "first"
        return self._bench_measure(first, repeats)

    def bench_ours_later(self, repeats: int, verify: str) -> dict[str, Any]:
        """Our bracket along the plan that an earlier sync left."""
        self._ascend_safe_syncs, self._ascend_safe_verify = 1, verify
        return self._bench_measure(self._bench_sync, repeats)

    def bench_vllm_reload(self, repeats: int) -> dict[str, Any]:
        """vLLM's own `reload_weights`, fed with the same tensors."""

        def reload() -> None:
            self.model_runner.reload_weights(weights_iterator=self._bench_stream())

        return self._bench_measure(reload, repeats)

    def bench_verl(self, repeats: int) -> dict[str, Any]:
        """What verl 0.9.1's worker extension does with one full set of weights (vllm_rollout/utils.py, by name)."""

        def load() -> None:
            from verl.utils.vllm.patch import patch_vllm_moe_model_weight_loader
            from vllm.model_executor.model_loader.utils import process_weights_after_loading

            model = bracket.unwrapped(self.model_runner)
            patch_vllm_moe_model_weight_loader(model)
            model.load_weights(self._bench_stream())
            process_weights_after_loading(model, self.model_runner.vllm_config.model_config, self._bench_device())

        return self._bench_measure(load, repeats)

    # ------------------------------------------------------------------------------------------------------------

    def _bench_stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self._bench_weights)

    def _bench_sync(self) -> None:
        self._ascend_safe_reload(lambda load: load(self._bench_stream()))

    def _bench_device(self) -> torch.device:
        return getattr(self, "device", None) or torch.device("cpu")

    def _bench_measure(self, run: Callable[[], None], repeats: int) -> dict[str, Any]:
        """The median of the seconds, each run right after a plain copy; the median of its ratio to that copy, since a
        machine is not equally fast all the time; and the most memory beyond what there was before: in one more run,
        since what is done to see it makes a run slower."""
        device = self._bench_device()
        seconds: list[float] = []
        ratios: list[float] = []
        try:
            for _ in range(repeats):
                plain = self._bench_time(self._bench_copy)
                seconds.append(self._bench_time(run))
                ratios.append(seconds[-1] / plain)
            before = _reset_peak(device)
            self._bench_run(run)
            after = _peak(device)
        except Exception as failure:
            return {
                "seconds": None,
                "ratio": None,
                "peak_extra_bytes": None,
                "error": f"{type(failure).__name__}: {first_line(failure)}",
            }
        return {
            "seconds": statistics.median(seconds),
            "ratio": statistics.median(ratios),
            "peak_extra_bytes": after - before if after is not None and before is not None else None,
            "error": None,
        }

    def _bench_copy(self) -> None:
        for target, (_, tensor) in zip(self._bench_targets, self._bench_weights, strict=True):
            target.copy_(tensor)

    def _bench_time(self, run: Callable[[], None]) -> float:
        started = time.perf_counter()
        self._bench_run(run)
        return time.perf_counter() - started

    def _bench_run(self, run: Callable[[], None]) -> None:
        with torch.no_grad():
            run()
        _synchronize(self._bench_device())


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    return str(torch.get_device_module(device).get_device_name())


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def _reset_peak(device: torch.device) -> int | None:
    """Forget the highest use of memory so far; what is used now, in bytes, or `None` where nobody counts."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        module.reset_peak_memory_stats()
        return int(module.memory_allocated())
    with contextlib.suppress(OSError, AttributeError):
        # What glibc keeps of freed memory would hide what is asked for next.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        # proc(5): 5 resets the high-water mark of resident memory.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    return _status("VmRSS")


def _peak(device: torch.device) -> int | None:
    if device.type != "cpu":
        return int(torch.get_device_module(device).max_memory_allocated())
    return _status("VmHWM")


def _status(key: str) -> int | None:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None
