"""Losses.

Stands in for: aclnnCrossEntropyLoss, aclnnCrossEntropyLossGrad.
Leaves out: class weights, label smoothing, the z-loss.

Who calls them:
    npu_cross_entropy_loss            verl 0.9.1 utils/torch_functional.py, logprobs_from_logits_torch_npu
    npu_cross_entropy_loss_backward   torch-npu's derivative of it
"""

from __future__ import annotations

import torch

from .registry import implements, leave_out


@implements("npu::npu_cross_entropy_loss")
def npu_cross_entropy_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    reduction: str = "mean",
    ignore_index: int = -100,
    return_zloss: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross entropy of input (rows, classes) against target (rows,), computed in fp32.

    Returns (loss, log probabilities, z-loss, log-sum-exp): loss has (rows,) for "none" and () else; the first two have
    input's dtype, as on the device: with bf16 logits, verl's log-probabilities are bf16.  The last two are empty.

    Source: "torch_npu.npu_cross_entropy_loss", Ascend Extension for PyTorch API reference; aclnnCrossEntropyLoss.
    """
    if return_zloss:
        leave_out("npu::npu_cross_entropy_loss", return_zloss=return_zloss)
    log_prob = input.float().log_softmax(-1)
    counted = target != ignore_index
    rows = -log_prob.gather(-1, target.long().where(counted, 0).unsqueeze(-1)).squeeze(-1) * counted
    if reduction == "none":
        loss = rows
    elif reduction == "sum":
        loss = rows.sum()
    else:
        loss = rows.sum() / counted.sum()
    nothing = input.new_empty(0)
    return loss.to(input.dtype), log_prob.to(input.dtype), nothing, nothing.clone()


@implements("npu::npu_cross_entropy_loss_backward")
def npu_cross_entropy_loss_backward(
    grad_loss: torch.Tensor,
    log_prob: torch.Tensor,
    target: torch.Tensor,
    grad_zloss: torch.Tensor | None = None,
    lse_for_zloss: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> torch.Tensor:
    """Gradient with respect to input, of log_prob's shape and dtype.  Source: aclnnCrossEntropyLossGrad.

    torch-npu passes gradients of zeros for the z-loss when it was not asked for; they are not used.
    """
    counted = target != ignore_index
    grad = grad_loss.float()
    if reduction == "mean":
        grad = grad / counted.sum()
    rows = (grad * counted).unsqueeze(-1)
    one_hot = torch.zeros_like(log_prob, dtype=torch.float32)
    one_hot.scatter_(-1, target.long().where(counted, 0).unsqueeze(-1), 1.0)
    return ((log_prob.float().exp() - one_hot) * rows).to(log_prob.dtype)
