"""How the memory of the KV cache is given back and taken again, inside vLLM's worker process.

The policy gives an ordered list of methods; once, at start-up, the first is taken that works with what the engine has:

- `kv_only`: sleep mode that can discard the KV cache alone, and leaves the weights where they are (vllm#44890:
  `Worker.discard`, in vLLM from 0.31 on; not on a CPU, and not in vllm-ascend 0.11 to 0.30).
- `sleep`: vLLM's sleep mode (CUDA cumem, Ascend CaMem) unmaps the memory and keeps the addresses.
- `reallocate`: eager: drop the tensors and make them again (`kv_references` has who refers to them).
- `keep`: nothing safe; the memory stays, and the report says what stood in the way.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import psutil
import torch

from verl_ascend_rollout.options import KVMethod
from verl_ascend_rollout.worker import kv_references

KVAction = Literal["free", "init"]

METHODS: tuple[KVMethod, ...] = get_args(KVMethod)
"""All of them, in the order in which they are tried where there is no policy (a smoke test, a script)."""


@dataclass
class KVCacheChange:
    """What one `free_cache_engine` or `init_cache_engine` did; filled in while it works."""

    action: KVAction
    kv_release: KVMethod  # the method that was used
    bytes_before: int  # bytes that KV tensors hold, each storage counted once
    rss_before: int  # resident memory of the worker process, in bytes
    changed: bool = False  # whether there was anything to do: a second free, or a second init, finds nothing
    bytes_after: int = 0
    rss_after: int = 0
    seconds: float = 0.0
    reason: str = ""  # why nothing changed, where nothing did


@dataclass(frozen=True)
class Probe:
    """The method that works here, and what stood in the way of those before it."""

    method: KVMethod
    obstacles: tuple[str, ...] = ()


class KVCacheMemoryError(RuntimeError):
    """There is not enough memory to make the KV cache again.  The message has the numbers and what to lower."""


class KVCacheHeldError(RuntimeError):
    """Somebody still holds the old KV cache: it is not freed, and might be read instead of a new one."""


def probe(worker: Any, methods: str | Sequence[str] = "auto") -> Probe:
    """Return the first of `methods` that works on this worker; `keep` where none does.

    Args:
        worker: vLLM's worker, with its model runner made.
        methods: what the policy decided for this engine, in its order; one method; or `auto` for all.
    """
    missing = {"kv_only": _missing_for_kv_only, "sleep": _missing_for_sleep, "reallocate": _missing_for_reallocate}
    wanted = METHODS if methods == "auto" else (methods,) if isinstance(methods, str) else methods
    obstacles: list[str] = []
    for method in wanted:
        if method == "keep":
            break
        found = list(missing[method](worker))
        if not found:
            return Probe(cast("KVMethod", method), tuple(obstacles))
        obstacles.extend(f"{method}: {reason}" for reason in found)
    return Probe("keep", tuple(obstacles))


def free(worker: Any, method: KVMethod) -> KVCacheChange:
    """Give the KV cache's memory back; what was cached is lost.

    The caller (the rollout server) has paused the scheduler: no request may be running, and the prefix cache must be
    reset before the next one, since its blocks are gone.

    Args:
        worker: vLLM's worker.
        method: what `probe` found.

    Returns:
        What was done.  Freeing twice changes nothing the second time.

    Raises:
        KVCacheHeldError: somebody else holds the KV tensors (`reallocate`); the message says who, if that can be told.
    """
    with _measured(worker, "free", method) as outcome:
        if outcome.bytes_before == 0:
            outcome.reason = "the KV cache is already free"
        elif method == "kv_only":
            worker.discard(("kv_cache",))
            worker._ascend_safe_kv_asleep = True
            outcome.changed = True
        elif method == "sleep":
            # vLLM's level 1 moves the weights out too; they are wanted back at once, as verl's own release_kv_cache
            # does it (verl 0.9.1, vllm_async_server.py:875-883).
            worker.sleep(level=1)
            # From here on, also if the weights find no memory: the KV cache is unmapped.
            worker._ascend_safe_kv_asleep = True
            worker.wake_up(tags=["weights"])
            outcome.changed = True
        elif method == "reallocate":
            holders = kv_references.unknown_holders(worker.model_runner)
            if holders:
                raise KVCacheHeldError(
                    f"The KV cache is not freed: {', '.join(holders)} holds it too and would go on reading the old one"
                )
            _drop_tensors(worker, outcome)
            outcome.changed = True
        else:
            outcome.reason = "nothing safe gives the memory back here; see the probe's obstacles"
    return outcome


def init(worker: Any, method: KVMethod) -> KVCacheChange:
    """Take the KV cache's memory again: same shapes, same number of blocks, contents zero or undefined.

    Args:
        worker: vLLM's worker.
        method: what `probe` found.

    Returns:
        What was done.  A second init changes nothing.

    Raises:
        KVCacheMemoryError: the memory is not there, even after one more collection of garbage.
        KVCacheHeldError: the old cache is still held (`reallocate`).
    """
    with _measured(worker, "init", method) as outcome:
        if outcome.bytes_before > 0:
            outcome.reason = "the KV cache is already there"
        elif method in ("kv_only", "sleep"):
            worker.wake_up(tags=["kv_cache"])
            worker._ascend_safe_kv_asleep = False
            outcome.changed = True
        elif method == "reallocate":
            _make_tensors(worker)
            outcome.changed = True
        else:
            outcome.reason = "the KV cache was never freed"
    return outcome


def kv_bytes(worker: Any) -> int:
    """Return the bytes of the KV tensors, each storage counted once (layers may share one); 0 while they are asleep."""
    if getattr(worker, "_ascend_safe_kv_asleep", False):
        return 0
    return sum(storage.nbytes() for storage in kv_references.storages(worker.model_runner).values())


# --------------------------------------------------------------------------------------------------------------------
# `kv_only` and `sleep`


def _missing_for_kv_only(worker: Any) -> Iterator[str]:
    """Yield what stands in the way of discarding the KV cache alone (vllm#44890)."""
    if not callable(getattr(worker, "discard", None)):
        yield f"{type(worker).__name__} has no `discard` (vllm#44890; vLLM has it from 0.31 on)"
        return
    if not sleep_mode(worker):
        yield "the engine runs without sleep mode, whose allocator is what discards"
        return
    if _on_cpu(worker):
        yield "vLLM's CPU worker refuses it (vllm 0.32, cpu_worker.py:187)"
        return
    backend = type(getattr(worker, "sleep_mode_backend", None))
    # The base class refuses; a back end that can discard overrides (vllm 0.32, sleep_mode_backend.py:76).
    owner = next((base for base in backend.__mro__ if "discard" in vars(base)), None)
    if owner is not None and owner.__name__ == "SleepModeBackend":
        yield f"the sleep-mode back end {backend.__name__} cannot discard one tag"


def _missing_for_sleep(worker: Any) -> Iterator[str]:
    """Yield what stands in the way of vLLM's sleep mode."""
    if not sleep_mode(worker):
        yield "the engine runs without sleep mode"


# --------------------------------------------------------------------------------------------------------------------
# `reallocate`


def _missing_for_reallocate(worker: Any) -> Iterator[str]:
    """Yield what stands in the way of making the tensors again: nothing, if it works."""
    runner = getattr(worker, "model_runner", None)
    if runner is None:
        yield "the worker has no model runner"
        return
    name = type(runner).__name__
    for attribute in ("kv_caches", "kv_cache_config"):
        if not hasattr(runner, attribute):
            yield f"{name} has no `{attribute}`"
    if kv_references.layers(runner) is None:
        yield f"{name} has no `compilation_config.static_forward_context`"
    config = getattr(runner, "vllm_config", None)
    if config is None:
        yield f"{name} has no `vllm_config`"
        return
    # A graph has the tensors' addresses in it; new tensors have others.  With this flag vLLM captures and compiles
    # nothing (vllm 0.28, config/vllm.py:1284).
    if not getattr(config.model_config, "enforce_eager", False):
        yield "the engine does not run in eager mode: captured or compiled code may hold the addresses"
    if getattr(config, "kv_transfer_config", None) is not None:
        yield "a KV connector has the tensors' addresses registered"
    try:
        _maker(runner)
    except LookupError as error:
        yield str(error.args[0])


def _maker(runner: Any) -> Callable[[], None]:
    """Return the call that makes the KV tensors again, with its arguments.

    Arguments go by name: what vLLM passes differs from release to release, and so does its order.

    Raises:
        LookupError: this runner cannot make them alone, or wants an argument that is not known here.
    """
    name = type(runner).__name__
    known: dict[str, Callable[[], Any]] = {
        "kv_cache_config": lambda: runner.kv_cache_config,
        "kernel_block_sizes": lambda: _kernel_block_sizes(runner),
    }
    make: Callable[..., Any]
    if hasattr(runner, "initialize_kv_cache_tensors"):
        make = runner.initialize_kv_cache_tensors
    else:
        # vLLM's V2 runner makes them in a function (vllm 0.24 to 0.32, v1/worker/gpu/attn_utils.py).
        try:
            make = importlib.import_module("vllm.v1.worker.gpu.attn_utils").init_kv_cache
        except (ImportError, AttributeError):
            raise LookupError(
                f"{name} has no `initialize_kv_cache_tensors`, and vLLM no `init_kv_cache` of its V2 runner"
            ) from None
        if "MambaSpec" in _spec_names(runner):
            raise LookupError(f"{name} keeps the addresses of Mamba states (v1/worker/gpu/model_states)")
        known |= {
            "runner_kv_caches": lambda: runner.kv_caches,
            "forward_context": lambda: kv_references.layers(runner),
            "device": lambda: runner.device,
            "cache_dtype": lambda: runner.vllm_config.cache_config.cache_dtype,
            "vllm_config": lambda: runner.vllm_config,
            "attn_groups": lambda: runner.attn_groups,
        }
        if "runner_kv_caches" not in inspect.signature(make).parameters:
            raise LookupError(f"{name} binds its KV cache in a way that is not known here (vLLM from 0.29 on)")
    wanted = inspect.signature(make).parameters
    required = [p.name for p in wanted.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    unknown = [parameter for parameter in required if parameter not in known]
    if unknown:
        raise LookupError(f"{name} wants {', '.join(unknown)} to make its KV tensors, which is not known here")
    # An optional argument is left at its default (vllm 0.30: the memory pool to allocate in), except where it is known.
    # All of them now: what is found missing only after the tensors went would be found too late.
    return functools.partial(make, **{parameter: known[parameter]() for parameter in wanted if parameter in known})


def _kernel_block_sizes(runner: Any) -> Any:
    """Return into which sizes the kernels cut the blocks of each group."""
    # V1: vLLM 0.18 on; vllm-ascend from 0.30 on.  V2 has it without the underscore.  vLLM 0.13 computes it each time.
    for attribute in ("_kernel_block_sizes", "kernel_block_sizes"):
        if hasattr(runner, attribute):
            return getattr(runner, attribute)
    if hasattr(runner, "_prepare_kernel_block_sizes"):
        return runner._prepare_kernel_block_sizes(runner.kv_cache_config)
    raise LookupError(f"{type(runner).__name__} has no _kernel_block_sizes")


def _spec_names(runner: Any) -> set[str]:
    groups = getattr(getattr(runner, "kv_cache_config", None), "kv_cache_groups", None) or ()
    return {type(group.kv_cache_spec).__name__ for group in groups}


def _drop_tensors(worker: Any, outcome: KVCacheChange) -> None:
    """Let go of the tensors, and see that the memory went back to the system.

    Raises:
        KVCacheHeldError: it did not, since somebody still holds a tensor.
    """
    survivors = worker._ascend_safe_survivors = kv_references.drop(worker.model_runner)
    if survivors.bytes():
        raise KVCacheHeldError(_held(survivors))
    _give_back(worker, outcome)


def _held(survivors: kv_references.Survivors) -> str:
    return (
        f"{survivors.bytes()} bytes of the KV cache are still held after every known reference to them was reset, by "
        f"{', '.join(survivors.holders()) or 'something that Python does not see'}; set "
        "actor_rollout_ref.rollout.engine_kwargs.ascend_safe.kv_release=keep, and report this with your versions"
    )


def _make_tensors(worker: Any) -> None:
    """Make the KV tensors again, from the configuration that the runner kept, and bind them to the layers."""
    from vllm.config import set_current_vllm_config

    survivors: kv_references.Survivors | None = getattr(worker, "_ascend_safe_survivors", None)
    if survivors is not None and survivors.bytes():
        raise KVCacheHeldError(_held(survivors))
    runner = worker.model_runner
    make = _maker(runner)
    for attempt in ("first", "after collecting garbage"):
        try:
            with set_current_vllm_config(runner.vllm_config):
                make()
            break
        except (RuntimeError, MemoryError) as error:
            # torch raises a RuntimeError (OutOfMemoryError on an accelerator) when an allocation fails.
            if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
                raise
            kv_references.drop(runner)
            if attempt != "first":
                raise KVCacheMemoryError(_out_of_memory(worker, runner.kv_cache_config, error)) from error
        # Outside of the handler, whose traceback holds the tensors that were made before memory ran out.
        gc.collect()
        empty_allocator(worker)
    if getattr(runner.kv_cache_config, "needs_kv_cache_zeroing", False) and hasattr(runner, "_init_kv_zero_meta"):
        # The block zeroer has the tensors' addresses (vllm 0.28, gpu_worker.py:692).
        runner._init_kv_zero_meta()


def _out_of_memory(worker: Any, kv_cache_config: Any, error: BaseException) -> str:
    wanted = sum(getattr(tensor, "size", 0) for tensor in getattr(kv_cache_config, "kv_cache_tensors", ()))
    available, total = memory(worker)
    allocator = " ".join(str(error).split())[:300]
    return (
        f"There is no room to make the KV cache again: it takes {wanted / 2**30:.2f} GiB, and {available / 2**30:.2f} "
        f"of {total / 2**30:.2f} GiB are available (the allocator: {allocator}); lower "
        "actor_rollout_ref.rollout.gpu_memory_utilization (on a CPU engine_kwargs.vllm.kv_cache_memory_bytes), or "
        "offload the trainer's parameters and optimizer before generation"
    )


# --------------------------------------------------------------------------------------------------------------------
# what the methods share


def sleep_mode(worker: Any) -> bool:
    """Return whether the engine runs with sleep mode."""
    config = getattr(getattr(worker, "vllm_config", None), "model_config", None)
    return bool(getattr(config, "enable_sleep_mode", False))


def device_of(worker: Any) -> torch.device:
    """Return the device of a worker; vllm-ascend 0.11 tells its model runner alone (worker_v1.py:217)."""
    for owner in (worker, getattr(worker, "model_runner", None)):
        device: torch.device | None = getattr(owner, "device", None)
        if device is not None:
            return device
    return torch.device("cpu")


def _on_cpu(worker: Any) -> bool:
    return device_of(worker).type == "cpu"


def _give_back(worker: Any, outcome: KVCacheChange) -> None:
    """Hand freed memory back to the system, where it has not gone by itself."""
    # glibc maps a large block by itself and unmaps it when it is freed.  Small ones, and another allocator (vLLM
    # advises tcmalloc on a CPU), may stay with the process: then the heap is trimmed, which takes its time.
    if _on_cpu(worker) and outcome.rss_before - resident() >= 0.99 * outcome.bytes_before:
        return
    empty_allocator(worker)


def empty_allocator(worker: Any) -> None:
    """Have the allocator give back what it keeps."""
    if not _on_cpu(worker):
        # torch.accelerator has no empty_cache before torch 2.9, which vllm-ascend 0.11 and 0.13 are older than.
        device_module = torch.get_device_module(device_of(worker))
        device_module.synchronize()
        device_module.empty_cache()
        return
    process = ctypes.CDLL(None)
    # The first is tcmalloc's, and there only where it is preloaded; the second glibc's.
    for name, arguments in (("MallocExtension_ReleaseFreeMemory", ()), ("malloc_trim", (0,))):
        with contextlib.suppress(AttributeError):
            getattr(process, name)(*arguments)


def resident() -> int:
    """Return the resident memory of this process, in bytes."""
    return int(psutil.Process().memory_info().rss)


def device_used(worker: Any) -> int:
    """Return the bytes in use on the worker's device, by whomever; 0 on a CPU."""
    if _on_cpu(worker):
        return 0
    available, total = memory(worker)
    return total - available


def memory(worker: Any) -> tuple[int, int]:
    """Return the bytes available, and in all, where the KV cache lives."""
    if _on_cpu(worker):
        memory = psutil.virtual_memory()
        return int(memory.available), int(memory.total)
    available, total = torch.get_device_module(device_of(worker)).mem_get_info()
    return int(available), int(total)


@contextlib.contextmanager
def _measured(worker: Any, action: KVAction, method: KVMethod) -> Iterator[KVCacheChange]:
    change = KVCacheChange(action, method, kv_bytes(worker), resident())
    started = time.perf_counter()
    yield change
    change.seconds = time.perf_counter() - started
    change.bytes_after, change.rss_after = kv_bytes(worker), resident()
