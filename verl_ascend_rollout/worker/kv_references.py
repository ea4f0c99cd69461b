"""Who holds the tensors of the KV cache: every reference is found, reset for `reallocate`, and checked to be gone.

A reference that is forgotten keeps the memory alive, or is read instead of the new cache (vllm-ascend's
`impl.key_cache`), so the list is written down here, what is not in it is looked for, and what survives is named.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

IMPLEMENTATION_ALIASES = ("key_cache", "value_cache", "_k_scale_cache", "_v_scale_cache")
"""Views of the cache that an attention implementation keeps.  vllm-ascend 0.11 to 0.30 fill the first two at the first
forward pass and never look again (attention_v1.py); the scale views are vLLM's int8 and fp8 caches (0.28,
gpu_model_runner.py:6709)."""

RUNNER_ALIASES = ("cross_layers_kv_cache", "_mamba_copy_bufs", "_mamba_bufs")
"""What a model runner keeps beside its `kv_caches`: the one tensor of all layers that a KV connector wants, and the
addresses of Mamba states for the copy kernels (`_mamba_copy_bufs` in vLLM 0.18, `_mamba_bufs` from 0.23 on; both are
made again at the next use)."""

_DEPTH = 3
"""How deep lists, tuples and mappings are searched for tensors: vLLM nests at most two (a list of tuples)."""


def layers(runner: Any) -> dict[str, Any] | None:
    """Return the layers by name; filled when the model is made, in eager mode as well (vLLM 0.11 to 0.32)."""
    compilation = getattr(getattr(runner, "vllm_config", None), "compilation_config", None)
    return getattr(compilation, "static_forward_context", None)


def tensors(runner: Any) -> Iterator[torch.Tensor]:
    """Every KV tensor that the runner or a layer names; views of one storage come more than once."""
    yield from _tensors_in(getattr(runner, "kv_caches", ()))
    yield from _tensors_in(getattr(runner, "cross_layers_kv_cache", None))
    for layer in (layers(runner) or {}).values():
        # MoE layers stand in the same mapping, without a KV cache (all releases).
        yield from _tensors_in(getattr(layer, "kv_cache", ()))


def storages(runner: Any) -> dict[int, torch.UntypedStorage]:
    """Return the storages behind the KV tensors by address, each once; none that is empty."""
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors(runner):
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = storage
    return found


def unknown_holders(runner: Any) -> list[str]:
    """Attributes of layers, attention implementations, metadata builders and the runner that hold a KV tensor and are
    not among those that `drop` resets; named like `model.layers.0.attn.impl.key_cache`."""
    addresses = set(storages(runner))
    found: list[str] = []

    def look(owner: Any, name: str, known: Iterable[str]) -> None:
        for attribute, value in list(getattr(owner, "__dict__", {}).items()):
            if attribute in known:
                continue
            if any(tensor.untyped_storage().data_ptr() in addresses for tensor in _tensors_in(value)):
                found.append(f"{name}.{attribute}")

    look(runner, type(runner).__name__, ("kv_caches", *RUNNER_ALIASES))
    for name, layer in (layers(runner) or {}).items():
        look(layer, name, ("kv_cache",))
        look(getattr(layer, "impl", None), f"{name}.impl", IMPLEMENTATION_ALIASES)
    for groups in getattr(runner, "attn_groups", None) or ():
        for group in groups if isinstance(groups, Iterable) else (groups,):
            for builder in getattr(group, "metadata_builders", None) or ():
                look(builder, type(builder).__name__, ())
    return found


def drop(runner: Any) -> Survivors:
    """Let go of every reference to the KV tensors.

    The list is that of vLLM's own `_cleanup_profiling_kv_cache` (vllm 0.28, gpu_model_runner.py:6709) without what
    would make a second `initialize_kv_cache` necessary (attention groups, kv_cache_config), plus the aliases of other
    releases.  The routed-experts capturer needs nothing: its buffers go by token or by slot, and the number of slots
    stays (vLLM 0.18 to 0.32).

    Returns:
        What is still there.
    """
    watched = {address: _weak(storage) for address, storage in storages(runner).items()}
    sizes = {address: storage.nbytes() for address, storage in storages(runner).items()}
    if isinstance(runner.kv_caches, list):
        for index in range(len(runner.kv_caches)):
            runner.kv_caches[index] = None
        # In place: the connector and the speculative decoder hold this very list.
        runner.kv_caches.clear()
    for alias in RUNNER_ALIASES:
        if hasattr(runner, alias):
            setattr(runner, alias, None)
    for layer in (layers(runner) or {}).values():
        if hasattr(layer, "kv_cache"):
            # A list of one tensor until vLLM 0.18, bare from 0.20.2 on; a tuple on Ascend and for Mamba states.
            layer.kv_cache = torch.tensor([]) if isinstance(layer.kv_cache, torch.Tensor) else []
        implementation = getattr(layer, "impl", None)
        for alias in IMPLEMENTATION_ALIASES:
            if getattr(implementation, alias, None) is not None:
                setattr(implementation, alias, None)
    survivors = Survivors(watched, sizes)
    if survivors.bytes():
        # Only now: a collection takes longer than all the rest, and is for nothing where no cycle holds a tensor.
        gc.collect()
    if survivors.bytes():
        # vLLM has the collector overlook all that there was when it had started (0.28, gpu_worker.py:858).
        gc.unfreeze()
        gc.collect()
        gc.freeze()
    return survivors


class Survivors:
    """Storages that were let go of, watched without holding them."""

    def __init__(self, watched: dict[int, StorageWeakRef], sizes: dict[int, int]) -> None:
        self._watched = watched
        self._sizes = sizes

    def bytes(self) -> int:
        """Bytes that are still held by somebody."""
        gone = [address for address, reference in self._watched.items() if _expired(reference)]
        for address in gone:
            del self._watched[address]
        return sum(self._sizes[address] for address in self._watched)

    def holders(self) -> list[str]:
        """Who holds them, as far as the garbage collector can tell; slow, for a message."""
        if not self.bytes():
            return []
        found: set[str] = set()
        gc.unfreeze()
        held = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
        for tensor in held:
            if tensor.untyped_storage().data_ptr() not in self._watched:
                continue
            for referrer in gc.get_referrers(tensor):
                if referrer is held:
                    continue
                if isinstance(referrer, dict):
                    owners = [o for o in gc.get_referrers(referrer) if getattr(o, "__dict__", None) is referrer]
                    kinds = [type(owner).__name__ for owner in owners] or ["a mapping"]
                    names = [str(key) for key, value in referrer.items() if value is tensor]
                else:
                    kinds = [type(referrer).__name__]
                    names = [key for key, value in getattr(referrer, "__dict__", {}).items() if value is tensor]
                found.update(f"{kind}.{name}" for kind in kinds for name in names)
                found.update(kind for kind in kinds if not names)
        gc.freeze()
        return sorted(found)


def _weak(storage: torch.UntypedStorage) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _expired(reference: StorageWeakRef) -> bool:
    return bool(reference.expired())  # type: ignore[no-untyped-call]


def _tensors_in(value: Any, depth: int = _DEPTH) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item, depth - 1)
    elif depth and isinstance(value, dict):
        for item in list(value.values()):
            yield from _tensors_in(item, depth - 1)
