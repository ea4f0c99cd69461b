"""What a model holds, byte for byte: the proof that a sync is a fresh load."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch


def state_of(model: torch.nn.Module) -> dict[str, tuple[str, int]]:
    """Every tensor that hangs on a module (parameters, buffers, what a layer keeps beside them): a digest of its bytes,
    shape, strides and dtype, and its address on the accelerator, which a captured graph has written down; 0 for one in
    host memory."""
    return {
        name: (digest(tensor.detach()), 0 if tensor.device.type == "cpu" else tensor.data_ptr())
        for name, tensor in _tensors(model)
    }


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    # An attention layer's part of the KV cache hangs on it as well, and is no weight.
    for prefix, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False), *vars(module).items()]
        yield from (
            (f"{prefix}.{name}", value) for name, value in own if isinstance(value, torch.Tensor) and name != "kv_cache"
        )


def digest(tensor: torch.Tensor) -> str:
    """Of a tensor's shape, strides, dtype and bytes."""
    if tensor.numel() == 0:  # emptied by a kernel that has packed it: the dtype is chance
        return f"{tuple(tensor.shape)}"
    form = f"{tuple(tensor.shape)} {tensor.stride()} {tensor.dtype}"
    # As bytes, since numpy has no bf16, and a NaN equals itself.
    data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(form.encode() + data).hexdigest()
