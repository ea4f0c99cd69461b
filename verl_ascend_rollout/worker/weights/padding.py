"""Parameters that are larger than the checkpoint's: what of them a checkpoint fills.

vLLM makes experts so for kernels that want other sizes: hidden sizes that DeepEP sends, and from 0.33 on intermediate
sizes that FlashInfer takes on Blackwell.  The layer's configuration has the checkpoint's sizes (0.24 to 0.33,
fused_moe/config.py).  The merged projection of Kimi K3's linear attention ends with rows that make it a multiple of 16
(0.28, mamba/gdn/kimi_gdn_linear_attn.py:209).
"""

from __future__ import annotations

from typing import Any

import torch


def padded(model: torch.nn.Module) -> dict[str, list[torch.Tensor]]:
    """Return of each padded parameter, by name, what a checkpoint fills (see `filled`)."""
    found = {}
    rows = padded_rows(model)
    for prefix, layer in model.named_modules():
        for name, parameter in layer.named_parameters(recurse=False):
            parts = filled(layer, name, parameter, rows.get(layer, 0))
            if parts[0] is not parameter:
                found[f"{prefix}.{name}"] = parts
    return found


def padded_rows(model: torch.nn.Module) -> dict[torch.nn.Module, int]:
    """Return the projections whose weight ends with rows that no checkpoint has, with how many."""
    found: dict[torch.nn.Module, int] = {}
    for layer in model.modules():
        projection = getattr(layer, "in_proj_qkvgfab", None)
        if isinstance(projection, torch.nn.Module):
            found[projection] = int(getattr(layer, "in_proj_padding", 0))
    return found


def filled(layer: torch.nn.Module, name: str, parameter: torch.Tensor, rows: int = 0) -> list[torch.Tensor]:
    """Return what a checkpoint fills of a parameter, as views: all of it, unless it is padded.

    Args:
        layer: whose parameter it is.
        name: the layer's own.
        parameter: in checkpoint form; of experts of shape (experts, rows, columns), or of a bias (experts, rows).
        rows: how many at the end are padding (see `padded_rows`).
    """
    if rows and name == "weight":
        return [parameter.narrow(0, 0, parameter.shape[0] - rows)] if parameter.numel() else [parameter]
    config: Any = getattr(layer, "moe_config", None)
    intermediate = getattr(config, "intermediate_size_per_partition_unpadded", None)
    hidden = getattr(config, "hidden_dim_unpadded", None)
    if intermediate is None or hidden is None or not name.startswith(("w13_", "w2_")) or parameter.dim() < 2:
        return [parameter]
    gated = name.startswith("w13_") and bool(getattr(config, "is_act_and_mul", True))
    sizes = (intermediate, hidden) if name.startswith("w13_") else (hidden, intermediate)
    halves = parameter.chunk(2, dim=1) if gated and parameter.shape[1] % 2 == 0 else (parameter,)
    if all(size <= there for size, there in zip(halves[0].shape[1:], sizes, strict=False)):
        return [parameter]
    found = []
    for half in halves:
        for axis, size in enumerate(sizes[: half.dim() - 1], start=1):
            half = half.narrow(axis, 0, min(size, half.shape[axis]))
        found.append(half)
    return found
