"""Activations.

Stands in for: aclnnSwiGlu, aclnnSwiGluGrad.
Leaves out: npu_fast_gelu, npu_clipped_swiglu, npu_geglu: no Qwen text model uses them.

Who calls them:
    npu_swiglu            vllm-ascend 0.11 to 0.30 ops/activation.py; 0.11 ops/moe/moe_mlp.py, 0.13 to 0.30
                          ops/fused_moe/moe_mlp.py; verl 0.9.1 models/transformers/npu_patch.py
    npu_swiglu_backward   torch-npu's derivative of npu_swiglu, under verl's patched models
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .registry import implements


@implements("npu::npu_swiglu")
def npu_swiglu(input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """silu(first half of `dim`) times the second half, computed in fp32, of input's dtype.

    Source: "torch_npu.npu_swiglu", Ascend Extension for PyTorch API reference; aclnnSwiGlu.
    """
    gate, up = input.float().chunk(2, dim)
    return (F.silu(gate) * up).to(input.dtype)


@implements("npu::npu_swiglu_backward")
def npu_swiglu_backward(grad_output: torch.Tensor, input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Gradient of npu_swiglu, of input's shape and dtype.  Source: aclnnSwiGluGrad."""
    gate, up = input.float().chunk(2, dim)
    grad = grad_output.float()
    sigmoid = torch.sigmoid(gate)
    dgate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat((dgate, grad * gate * sigmoid), dim).to(input.dtype)
