"""Writing keys and values into the paged cache.

Stands in for: aclnnScatterPaKvCache, aclnnScatterNdUpdate, ATB's ReshapeAndCacheOperation.
Leaves out: compression, the NZ cache of the 310P and of cache mode "PA_NZ", MLA's caches, reading blocks back
(npu_gather_pa_kv_cache, npu_paged_cache_load: context parallel and MLA).

A cache is (blocks, block size, key heads, head size) and a slot is block * block size + offset; slot -1 is padding.

Who calls them:
    _npu_reshape_and_cache   vllm-ascend 0.11 and 0.13 attention/attention_v1.py, 0.18 and 0.23 device/device_op.py
    npu_scatter_pa_kv_cache  vllm-ascend 0.28 and 0.30 device/device_op.py
    npu_scatter_nd_update_   vllm-ascend 0.30 device/device_op.py, for other models
"""

from __future__ import annotations

import torch

from .registry import implements, leave_out


@implements("npu::npu_scatter_pa_kv_cache")
def npu_scatter_pa_kv_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache_mode: str | None = "Norm",
) -> None:
    """Write key and value (tokens, key heads, head size) to the slots of slot_mapping (tokens,), in place.

    Source: "torch_npu.npu_scatter_pa_kv_cache", Ascend Extension for PyTorch API reference; aclnnScatterPaKvCache.
    """
    if cache_mode != "Norm":
        leave_out("npu::npu_scatter_pa_kv_cache", cache_mode=cache_mode)
    _write(key, key_cache, slot_mapping)
    _write(value, value_cache, slot_mapping)


@implements("atb::_npu_reshape_and_cache")
def npu_reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_indices: torch.Tensor,
) -> None:
    """The same, as ATB's "ReshapeAndCacheOperation"; slot_indices is int32."""
    _write(key, key_cache, slot_indices)
    _write(value, value_cache, slot_indices)


def _write(x: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    if slots.numel() < x.shape[0]:
        raise ValueError(f"KV cache write: {x.shape[0]} tokens but {slots.numel()} slots")
    slots = slots.flatten()[: x.shape[0]].long()
    used = slots >= 0
    # By block and place, not by a view of all rows: vLLM 0.30's caches are slices with a stride between blocks.
    blocks, places = slots[used] // cache.shape[1], slots[used] % cache.shape[1]
    cache[blocks, places] = x[used].reshape(-1, *cache.shape[2:]).to(cache.dtype)


@implements("npu::npu_scatter_nd_update_")
def npu_scatter_nd_update_(input: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
    """input[indices[..., 0], indices[..., 1], ...] = updates, in place; returns input.

    indices (..., n) addresses input's first n axes.  Source: "torch_npu.npu_scatter_nd_update_", Ascend Extension for
    PyTorch API reference; aclnnScatterNdUpdate.
    """
    input[tuple(indices.long().unbind(-1))] = updates
    return input


@implements("npu::npu_scatter_nd_update")
def npu_scatter_nd_update(input: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
    """The same on a copy of input."""
    return npu_scatter_nd_update_(input.clone(), indices, updates)
