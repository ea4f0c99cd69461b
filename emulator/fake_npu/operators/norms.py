"""RMS normalisation.

Stands in for: aclnnRmsNorm, aclnnRmsNormGrad, aclnnAddRmsNorm.
Leaves out: Gemma's variants, the ones that also quantise, npu_add_rms_norm's derivative.

Who calls them:
    npu_rms_norm            vllm-ascend 0.11 to 0.30 ops/layernorm.py; verl 0.9.1 models/transformers/npu_patch.py
    npu_rms_norm_backward   torch-npu's derivative of npu_rms_norm, under verl's patched models
    npu_add_rms_norm        vllm-ascend 0.11 ops/layernorm.py; 0.13 to 0.23 there, when custom operators are off
"""

from __future__ import annotations

import torch

from .registry import implements


def normalise(x: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` over its root mean square times `gamma`, over the axes that `gamma` has; and the reciprocal root, in fp32.

    The normalised value is rounded to x's dtype before gamma, as in Hugging Face's RMSNorm.  Returns x's shape and
    dtype, and rstd with x's leading axes and 1 in place of the normalised ones.
    """
    axes = tuple(range(-gamma.dim(), 0))
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(axes, keepdim=True) + epsilon)
    return ((wide * rstd).to(x.dtype).float() * gamma.float()).to(x.dtype), rstd


@implements("npu::npu_rms_norm")
def npu_rms_norm(input: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """input (..., D) and gamma (D,), any floating dtypes: (y of input's dtype, rstd (..., 1) fp32).

    Source: "torch_npu.npu_rms_norm", Ascend Extension for PyTorch API reference; aclnnRmsNorm.
    """
    return normalise(input, gamma, epsilon)


@implements("npu::npu_rms_norm_backward")
def npu_rms_norm_backward(
    dy: torch.Tensor, input: torch.Tensor, gamma: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of npu_rms_norm: (dx of input's dtype and shape, dgamma fp32 of gamma's shape).

    Source: aclnnRmsNormGrad.
    """
    axes = tuple(range(-gamma.dim(), 0))
    leading = tuple(range(input.dim() - gamma.dim()))
    normalised = input.float() * rstd
    wide = dy.float()
    scaled = wide * gamma.float()
    dx = rstd * (scaled - normalised * (scaled * normalised).mean(axes, keepdim=True))
    dgamma = wide * normalised
    if leading:
        dgamma = dgamma.sum(leading)
    return dx.to(input.dtype), dgamma


@implements("npu::npu_add_rms_norm")
def npu_add_rms_norm(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x = x1 + x2 (rounded to their dtype), then npu_rms_norm of x: (y, rstd fp32, x).

    Source: "torch_npu.npu_add_rms_norm", Ascend Extension for PyTorch API reference; aclnnAddRmsNorm.
    """
    x = x1 + x2
    y, rstd = normalise(x, gamma, epsilon)
    return y, rstd, x
