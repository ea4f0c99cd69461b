"""Expert weights that vLLM's CPU kernels want packed: packed region by region, into the kernel's own tensor.

vLLM 0.28 packs `w13_weight` and `w2_weight` into blocks for AMX, AVX-512, NEON or VSX (experts/cpu_moe.py), into a
tensor of the same shape.  A region of whole rows is packed alone as it is packed with the rest, so one tensor of a
weight sync can go straight to its place, without the rest of its layer and without a second copy.  That is not taken on
trust: it is tried on the weights themselves when the layer is made, and a layer where it does not hold is `repacked`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

ROWS = 32
"""Rows of a block (vLLM 0.28, cpu_moe.py: output_alignment): a region starts and ends at a multiple."""


@dataclass(frozen=True)
class Sample:
    """The first and the last expert of a weight in checkpoint form: two tensors of shape (rows, columns)."""

    experts: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def of(cls, name: str, weight: torch.Tensor) -> Sample | None:
        """A sample of an expert weight on a CPU, of shape (experts, rows, columns); `None` of any other weight."""
        if name not in ("w13_weight", "w2_weight") or weight.dim() != 3 or weight.device.type != "cpu":
            return None
        return cls((weight.data[0].clone(), weight.data[-1].clone()))


def instruction_set(layer: Any, name: str, sample: Sample | None, after: torch.Tensor | None) -> str | None:
    """For which instruction set a weight was packed, if it was, and if its regions can be packed one by one.

    Args:
        layer: the layer whose weights were just processed.
        name: of the weight.
        sample: taken before.
        after: the weight now.

    Returns:
        vLLM's name of it (`amx`, `vec`, ...), or `None`.
    """
    kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
    isa = getattr(getattr(kernel, "fused_experts", None), "isa", None)
    if sample is None or after is None or not isinstance(isa, str) or not hasattr(torch.ops._C, "prepack_moe_weight"):
        return None
    first, last = sample.experts
    rows = first.shape[0] // 2 if name == "w13_weight" else first.shape[0]
    if tuple(after.shape[1:]) != tuple(first.shape) or not after.is_contiguous() or rows % ROWS:
        return None
    for expert, packed in ((first, after.data[0]), (last, after.data[-1])):
        ours = torch.empty_like(packed)
        for start in range(0, first.shape[0], rows):
            pack(expert[start : start + rows], ours[start : start + rows], isa)
        if not torch.equal(_bits(ours), _bits(packed)):
            return None
    return isa


def fits(size: tuple[int, ...], stride: tuple[int, ...], offset: int, weight: tuple[int, ...]) -> bool:
    """Whether a region of a weight of shape (experts, rows, columns) is one of whole rows that can be packed alone."""
    rows, columns = weight[-2], weight[-1]
    if len(size) == 3 and size[0] == 1:
        size, stride = size[1:], stride[1:]
    if len(size) != 2 or size[1] != columns or stride != (columns, 1) or offset % columns:
        return False
    first = offset // columns % rows
    half = first in (0, rows // 2) and size[0] == rows // 2 and size[0] % ROWS == 0
    return half or (first == 0 and size[0] == rows)


def pack(source: torch.Tensor, destination: torch.Tensor, isa: str) -> None:
    """Pack rows in checkpoint form into their place in a packed weight.

    Args:
        source: shape (rows, columns), or (experts, rows, columns); the weight's dtype.
        destination: the same shape, a contiguous part of the packed weight.
        isa: see `instruction_set`.
    """
    if source.dim() == 2:
        source, destination = source.unsqueeze(0), destination.unsqueeze(0)
    torch.ops._C.prepack_moe_weight(source.contiguous(), destination, isa)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
