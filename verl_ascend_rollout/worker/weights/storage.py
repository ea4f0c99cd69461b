"""What tells the memory of tensors apart."""

from __future__ import annotations

import torch


def storage_of(tensor: torch.Tensor) -> int:
    """What tells the storage of a tensor from all others that exist at the same time, also where it has no address."""
    return int(tensor.untyped_storage()._cdata)
