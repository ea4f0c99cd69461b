"""The KV-cache ladder: how the memory of the KV cache is given back and taken again, inside vLLM's worker process.

Three rungs here, walked from the top once, at start-up, by asking what the engine has:

- `sleep`: vLLM's sleep mode (CUDA cumem, Ascend CaMem) unmaps the memory and keeps the addresses.
- `direct`: no sleep mode, and eager: drop the tensors and make them again.  Every alias of a KV tensor is reset; one
  that is forgotten keeps the memory alive (vllm-ascend: `impl.key_cache`) or is read instead of the new cache.
- `keep`: nothing safe; the memory stays, and the report says what stood in the way.

A KV-only release of vLLM's own (vllm#44890) would stand above these; vLLM 0.28 does not have it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import inspect
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch

Rung = Literal["sleep", "direct", "keep"]


@dataclass(frozen=True)
class KVCacheChange:
    """What one `free_cache_engine` or `init_cache_engine` did.

    Attributes:
        action: `free` or `init`.
        rung: the rung that was used.
        changed: whether there was anything to do: a second free, or a second init, finds nothing.
        bytes_before, bytes_after: bytes that KV tensors hold, before and after, each storage counted once.
        rss_before, rss_after: resident memory of the worker process, in bytes.
        seconds: how long it took.
        reason: why nothing changed, where nothing did.
    """

    action: Literal["free", "init"]
    rung: Rung
    changed: bool
    bytes_before: int
    bytes_after: int
    rss_before: int
    rss_after: int
    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class Probe:
    """The rung that works here, and what stood in the way of those above it."""

    rung: Rung
    obstacles: tuple[str, ...] = ()


class KVCacheMemoryError(RuntimeError):
    """There is not enough memory to make the KV cache again.  The message has the numbers and what to lower."""


def probe(worker: Any, wish: str = "auto") -> Probe:
    """Find the rung that works on this worker.

    Args:
        worker: vLLM's worker, with its model runner made.
        wish: `auto`, or the rung that the policy chose for this engine.

    Returns:
        The first rung that works, at or below the wish.
    """
    obstacles: list[str] = []
    if wish == "release_kv_cache":
        obstacles.append("release_kv_cache: this vLLM has no KV-only release (vllm#44890)")
    if wish in ("auto", "release_kv_cache", "sleep"):
        if _sleep_mode(worker):
            return Probe("sleep", tuple(obstacles))
        obstacles.append("sleep: the engine runs without sleep mode")
    if wish != "keep":
        missing = list(_missing_for_direct(worker))
        if not missing:
            return Probe("direct", tuple(obstacles))
        obstacles.extend(f"direct: {reason}" for reason in missing)
    return Probe("keep", tuple(obstacles))


def free(worker: Any, rung: Rung) -> KVCacheChange:
    """Give the KV cache's memory back; what was cached is lost.

    The caller (the rollout server) has paused the scheduler: no request may be running, and the prefix cache must be
    reset before the next one, since its blocks are gone.

    Args:
        worker: vLLM's worker.
        rung: the rung found by `probe`.

    Returns:
        What was done.  Freeing twice changes nothing the second time.
    """
    with _measured(worker, "free", rung) as outcome:
        if outcome.bytes_before == 0:
            outcome.reason = "the KV cache is already free"
        elif rung == "sleep":
            # vLLM's level 1 moves the weights out too; they are wanted back at once, as verl's own release_kv_cache
            # does it (verl 0.9.1, vllm_async_server.py:875-883).
            worker.sleep(level=1)
            worker.wake_up(tags=["weights"])
            worker._ascend_safe_kv_asleep = True
            outcome.changed = True
        elif rung == "direct":
            _drop_tensors(worker)
            outcome.changed = True
        else:
            outcome.reason = "nothing safe gives the memory back here; see the probe's obstacles"
    return outcome.change()


def init(worker: Any, rung: Rung) -> KVCacheChange:
    """Take the KV cache's memory again: same shapes, same number of blocks, contents zero or undefined.

    Args:
        worker: vLLM's worker.
        rung: the rung found by `probe`.

    Returns:
        What was done.  A second init changes nothing.

    Raises:
        KVCacheMemoryError: the memory is not there, even after one more collection of garbage.
    """
    with _measured(worker, "init", rung) as outcome:
        if outcome.bytes_before > 0:
            outcome.reason = "the KV cache is already there"
        elif rung == "sleep":
            worker.wake_up(tags=["kv_cache"])
            worker._ascend_safe_kv_asleep = False
            outcome.changed = True
        elif rung == "direct":
            _make_tensors(worker)
            outcome.changed = True
        else:
            outcome.reason = "the KV cache was never freed"
    return outcome.change()


def kv_bytes(worker: Any) -> int:
    """Bytes held by the KV tensors, each storage counted once (layers may share one); 0 while they are asleep."""
    if getattr(worker, "_ascend_safe_kv_asleep", False):
        return 0
    storages: dict[int, int] = {}
    for tensor in _kv_tensors(worker):
        storage = tensor.untyped_storage()
        if storage.nbytes():
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


# --------------------------------------------------------------------------------------------------------------------
# the `direct` rung


def _missing_for_direct(worker: Any) -> Iterator[str]:
    """What stands in the way of the `direct` rung: nothing, if it works."""
    runner = getattr(worker, "model_runner", None)
    if runner is None:
        yield "the worker has no model runner"
        return
    for attribute in ("kv_caches", "kv_cache_config", "initialize_kv_cache_tensors"):
        if not hasattr(runner, attribute):
            yield f"{type(runner).__name__} has no `{attribute}`"
    if _forward_context(runner) is None:
        yield f"{type(runner).__name__} has no `compilation_config.static_forward_context`"
    config = getattr(runner, "vllm_config", None)
    if config is None:
        yield f"{type(runner).__name__} has no `vllm_config`"
        return
    # A graph has the tensors' addresses in it; new tensors have others.  With this flag vLLM captures and compiles
    # nothing (vllm 0.28, config/vllm.py:1284).
    if not getattr(config.model_config, "enforce_eager", False):
        yield "the engine does not run in eager mode: captured or compiled code may hold the addresses"
    if getattr(config, "kv_transfer_config", None) is not None:
        yield "a KV connector has the tensors' addresses registered"


def _drop_tensors(worker: Any) -> None:
    """Let go of every reference to the KV tensors.

    The list is that of vLLM's own `_cleanup_profiling_kv_cache` (vllm 0.28, gpu_model_runner.py:6709) without what
    would make a second `initialize_kv_cache` necessary (attention groups, kv_cache_config), plus the aliases of other
    releases: facts by release are beside each line.
    """
    runner = worker.model_runner
    for index in range(len(runner.kv_caches)):
        runner.kv_caches[index] = None
    # In place: the connector and the speculative decoder hold this very list.
    runner.kv_caches.clear()
    if hasattr(runner, "cross_layers_kv_cache"):
        runner.cross_layers_kv_cache = None
    for layer in (_forward_context(runner) or {}).values():
        # MoE layers stand in the same mapping, without a KV cache (all releases, 0.11 to 0.28).
        if hasattr(layer, "kv_cache"):
            # A list until vLLM 0.18, a bare tensor from 0.20.2 on.
            layer.kv_cache = torch.tensor([]) if isinstance(layer.kv_cache, torch.Tensor) else []
        implementation = getattr(layer, "impl", None)
        for alias in ("key_cache", "value_cache", "_k_scale_cache", "_v_scale_cache"):
            # vllm-ascend 0.11 to main keep views of the cache here and never look again (attention_v1.py): left alone,
            # nothing is freed, and the new cache is ignored.  The scale views are vLLM 0.28's int8 and fp8 caches.
            if getattr(implementation, alias, None) is not None:
                setattr(implementation, alias, None)
    _collect(worker)


def _make_tensors(worker: Any) -> None:
    """Make the KV tensors again, from the configuration that the runner kept, and bind them to the layers."""
    from vllm.config import set_current_vllm_config

    runner = worker.model_runner
    arguments = [runner.kv_cache_config]
    # One argument until vLLM 0.11, and in vllm-ascend; the kernel block sizes as a second from 0.13 on.
    if len(inspect.signature(runner.initialize_kv_cache_tensors).parameters) > 1:
        arguments.append(runner._kernel_block_sizes)
    for attempt in ("first", "after collecting garbage"):
        try:
            with set_current_vllm_config(runner.vllm_config):
                runner.initialize_kv_cache_tensors(*arguments)
            break
        except (RuntimeError, MemoryError) as error:
            # torch raises a RuntimeError (OutOfMemoryError on an accelerator) when an allocation fails.
            if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
                raise
            _drop_tensors(worker)
            if attempt != "first":
                raise KVCacheMemoryError(_out_of_memory(worker, runner.kv_cache_config)) from error
    if getattr(runner.kv_cache_config, "needs_kv_cache_zeroing", False) and hasattr(runner, "_init_kv_zero_meta"):
        # The block zeroer has the tensors' addresses (vllm 0.28, gpu_worker.py:692).
        runner._init_kv_zero_meta()


def _out_of_memory(worker: Any, kv_cache_config: Any) -> str:
    wanted = sum(getattr(tensor, "size", 0) for tensor in getattr(kv_cache_config, "kv_cache_tensors", ()))
    available, total = _memory(worker)
    return (
        f"There is no room to make the KV cache again: it takes {wanted / 2**30:.2f} GiB, and {available / 2**30:.2f} "
        f"of {total / 2**30:.2f} GiB are available; lower actor_rollout_ref.rollout.gpu_memory_utilization, or offload "
        "the trainer's parameters and optimizer before generation"
    )


# --------------------------------------------------------------------------------------------------------------------
# what the rungs share


def _sleep_mode(worker: Any) -> bool:
    config = getattr(getattr(worker, "vllm_config", None), "model_config", None)
    return bool(getattr(config, "enable_sleep_mode", False))


def _forward_context(runner: Any) -> dict[str, Any] | None:
    """The layers by name; filled when the model is made, in eager mode as well (vLLM 0.11 to 0.28)."""
    compilation = getattr(getattr(runner, "vllm_config", None), "compilation_config", None)
    return getattr(compilation, "static_forward_context", None)


def _kv_tensors(worker: Any) -> Iterator[torch.Tensor]:
    runner = worker.model_runner
    yield from _tensors_in(getattr(runner, "kv_caches", ()))
    for layer in (_forward_context(runner) or {}).values():
        yield from _tensors_in(getattr(layer, "kv_cache", ()))


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Iterable) and not isinstance(value, (str, bytes, dict)):
        for item in value:
            yield from _tensors_in(item)


def _collect(worker: Any) -> None:
    """Hand freed memory back to the system."""
    gc.collect()
    if worker.device is None or worker.device.type == "cpu":
        # glibc keeps small freed blocks; large ones were mapped and are gone already.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
    else:
        # torch.accelerator has no empty_cache before torch 2.9, which vllm-ascend 0.11 and 0.13 are older than.
        device_module = torch.get_device_module(worker.device)
        device_module.synchronize()
        device_module.empty_cache()


def device_used(worker: Any) -> int:
    """Bytes in use on the worker's device, by whomever; 0 on a CPU."""
    if worker.device is None or worker.device.type == "cpu":
        return 0
    available, total = _memory(worker)
    return total - available


def _memory(worker: Any) -> tuple[int, int]:
    """Bytes available, and in all, where the KV cache lives."""
    if worker.device is None or worker.device.type == "cpu":
        memory = psutil.virtual_memory()
        return int(memory.available), int(memory.total)
    available, total = torch.get_device_module(worker.device).mem_get_info()
    return int(available), int(total)


@dataclass
class _Outcome:
    """What is filled in while the work is measured."""

    action: Literal["free", "init"]
    rung: Rung
    bytes_before: int
    rss_before: int
    started: float
    changed: bool = False
    reason: str = ""
    bytes_after: int = 0
    rss_after: int = 0
    seconds: float = 0.0

    def change(self) -> KVCacheChange:
        return KVCacheChange(
            action=self.action,
            rung=self.rung,
            changed=self.changed,
            bytes_before=self.bytes_before,
            bytes_after=self.bytes_after,
            rss_before=self.rss_before,
            rss_after=self.rss_after,
            seconds=self.seconds,
            reason=self.reason,
        )


@contextlib.contextmanager
def _measured(worker: Any, action: Literal["free", "init"], rung: Rung) -> Iterator[_Outcome]:
    process = psutil.Process()
    outcome = _Outcome(action, rung, kv_bytes(worker), int(process.memory_info().rss), time.perf_counter())
    yield outcome
    outcome.seconds = time.perf_counter() - outcome.started
    outcome.bytes_after = kv_bytes(worker)
    outcome.rss_after = int(process.memory_info().rss)
