"""Sampling.

Stands in for: aclnnApplyTopKTopP.
Leaves out: npu_top_k_top_p_sample, and drawing the token, which vllm-ascend does with aten operators.

Who calls it:
    npu_top_k_top_p          vllm-ascend 0.11 sample/sampler.py; 0.23 to 0.30 there, with enable_reduce_sample
    npu_apply_top_k_top_p    vllm-ascend 0.18 sample/sampler.py (its own library: see vllm_ascend_library.py)
"""

from __future__ import annotations

import torch

from .registry import implements


@implements("npu::npu_top_k_top_p")
def npu_top_k_top_p(logits: torch.Tensor, p: torch.Tensor | None = None, k: torch.Tensor | None = None) -> torch.Tensor:
    """logits (rows, vocabulary) with all but the top k, then all but the top p of what is left, at -inf; a new tensor.

    k and p have (rows,).  Values equal to the k-th largest stay.  The smallest probabilities whose sum is at most 1 - p
    go, and the largest always stays.

    Source: "torch_npu.npu_top_k_top_p", Ascend Extension for PyTorch API reference; aclnnApplyTopKTopP.
    """
    ordered, order = logits.sort(dim=-1, stable=True)
    if k is not None:
        first = (ordered.shape[-1] - k.long()).clamp(min=0).unsqueeze(-1)
        ordered = ordered.masked_fill(ordered < ordered.gather(-1, first), float("-inf"))
    if p is not None:
        mass = ordered.float().softmax(-1).cumsum(-1)
        dropped = mass <= 1 - p.float().unsqueeze(-1)
        dropped[..., -1] = False
        ordered = ordered.masked_fill(dropped, float("-inf"))
    return torch.empty_like(logits).scatter_(-1, order, ordered)
