"""Derivatives of aten operators that torch-npu spells as operators of its own.

Stands in for: what torch-npu's derivative formulas of torch.gather and torch.repeat_interleave call.
Leaves out: those of binary_cross_entropy_with_logits, renorm, cdist and of recurrent layers: no trainer of a Qwen model
needs them, and a call is refused by name.

Who calls them: autograd on an NPU, as in log-probabilities by torch.gather (verl 0.9.1 utils/torch_functional.py).
"""

from __future__ import annotations

import torch

from .registry import implements, leave_out


@implements("npu::npu_gather_backward")
def npu_gather_backward(
    grad: torch.Tensor, self_size: list[int], dim: int, index: torch.Tensor, sparse_grad: bool = False
) -> torch.Tensor:
    """Zeros of self_size with grad added along `dim` at index: the gradient of torch.gather, of grad's dtype.

    Source: torch-npu derivatives.yaml, "gather".
    """
    if sparse_grad:
        leave_out("npu::npu_gather_backward", sparse_grad=sparse_grad)
    return torch.zeros(self_size, dtype=grad.dtype, device=grad.device).scatter_add_(dim, index, grad.contiguous())


@implements("npu::repeat_interleave_backward_int")
def repeat_interleave_backward_int(
    grad: torch.Tensor, input: torch.Tensor, repeats: int, dim: int | None = None
) -> torch.Tensor:
    """The sums of grad over each element's copies, of input's shape.  Without dim, input was flattened."""
    axis = 0 if dim is None else dim
    return grad.unflatten(axis, (-1, repeats)).sum(axis + 1 if axis >= 0 else axis).reshape(input.shape)


@implements("npu::repeat_interleave_backward_tensor")
def repeat_interleave_backward_tensor(
    grad: torch.Tensor, input: torch.Tensor, repeats: torch.Tensor, dim: int | None = None
) -> torch.Tensor:
    """The same for a number of copies of each element, or one for all."""
    axis = 0 if dim is None else dim
    flat = input.flatten() if dim is None else input
    length = flat.shape[axis]
    number = torch.arange(length, device=grad.device)
    source = number.repeat_interleave(repeats.expand(length).to(grad.device))
    return torch.zeros(flat.shape, dtype=grad.dtype, device=grad.device).index_add_(axis, source, grad).view_as(input)
