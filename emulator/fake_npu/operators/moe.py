"""Mixture of experts: gating, routing tokens to experts, and bringing them back.

Stands in for: aclnnMoeGatingTopK, aclnnMoeGatingTopKSoftmax, aclnnMoeInitRoutingV3, aclnnMoeTokenPermute and Unpermute
with their Grads, aclnnMoeReRouting.
Leaves out: expert groups and biases (DeepSeek), token dropping by capacity, quantised rows, padded mode, and
npu_moe_distribute_dispatch and _combine, which communicate by themselves (vllm-ascend's MC2, taken on A3 machines, and
on A2 from 16 ranks on: run as Ascend910B).

Who calls them:
    npu_moe_gating_top_k_softmax   vllm-ascend 0.11 ops/moe/experts_selector.py
    npu_moe_gating_top_k           vllm-ascend 0.18 to 0.30 device/device_op.py (A5); on A2 and A3 the operator of its
                                   own library, moe_gating_top_k: see vllm_ascend_library.py
    npu_moe_init_routing_v2        vllm-ascend 0.11 ops/moe/token_dispatcher.py, 0.28 and 0.30 device/device_op.py:
                                   ALLGATHER, with active_expert_range when experts are spread
    npu_moe_token_permute          vllm-ascend 0.11 ops/moe/token_dispatcher.py, 0.13 to 0.30
                                   ops/fused_moe/token_dispatcher.py: ALLTOALL; verl 0.9.1
                                   models/transformers/npu_patch.py
    npu_moe_token_unpermute        the same files, for both ways of communicating
    npu_moe_token_permute_grad, npu_moe_token_unpermute_grad   torch-npu's derivatives, under verl's patched models;
                                   2.13 calls those that end in _v2, and _npu_moe_token_unpermute
    npu_moe_re_routing             vllm-ascend 0.11 torchair/ops (graph mode)
"""

from __future__ import annotations

import torch

from .registry import implements, leave_out


def gate(
    operator: str,
    x: torch.Tensor,
    k: int,
    group_count: int,
    renorm: int,
    norm_type: int,
    routed_scaling_factor: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The top k experts of logits x (tokens, experts): (weights of x's dtype, experts int32, all scores fp32).

    norm_type 0: scores are the softmax; renorm 1 makes the chosen ones sum to 1 (the softmax of the chosen logits).
    norm_type 1: scores are the sigmoid, and the chosen ones always sum to 1, up to eps.  Both are then scaled.
    """
    if group_count not in (0, 1):
        leave_out(operator, group_count=group_count)
    scores = x.float().softmax(-1) if norm_type == 0 else x.float().sigmoid()
    weights, experts = scores.topk(k, -1)
    if renorm == 1 or norm_type == 1:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return (weights * routed_scaling_factor).to(x.dtype), experts.to(torch.int32), scores


@implements(
    "npu::npu_moe_gating_top_k",
    ignored={
        "k_group": "groups to choose from: one",
        "group_select_mode": "how to choose groups: one",
        "out_flag": "the scores are always returned",
    },
)
def npu_moe_gating_top_k(
    x: torch.Tensor,
    k: int,
    group_count: int = 1,
    renorm: int = 0,
    norm_type: int = 0,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `gate`.  Source: "torch_npu.npu_moe_gating_top_k", Ascend Extension for PyTorch API reference."""
    return gate("npu::npu_moe_gating_top_k", x, k, group_count, renorm, norm_type, routed_scaling_factor, eps)


@implements("npu::npu_moe_gating_top_k_softmax")
def npu_moe_gating_top_k_softmax(x: torch.Tensor, k: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax, then top k of x (tokens, experts): (weights of x's dtype, experts int32, row numbers int32).

    Row number [t, j] is j * tokens + t.  Source: "torch_npu.npu_moe_gating_top_k_softmax", Ascend Extension for PyTorch
    API reference; aclnnMoeGatingTopKSoftmax.
    """
    weights, experts = x.float().softmax(-1).topk(k, -1)
    rows = torch.arange(x.shape[0] * k, device=x.device, dtype=torch.int32).view(k, -1).t().contiguous()
    return weights.to(x.dtype), experts.to(torch.int32), rows


def init_routing(
    operator: str,
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    scale: torch.Tensor | None,
    active_num: int,
    expert_num: int,
    drop_pad_mode: int,
    expert_tokens_num_type: int,
    expert_tokens_num_flag: bool,
    quant_mode: int,
    active_expert_range: list[int],
    row_idx_type: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of x (tokens, hidden) for each (token, choice) of expert_idx (tokens, k), sorted by expert, stably.

    Returns (rows (tokens * k, hidden), row numbers int32 (tokens * k,), tokens for each expert int64, scales).
    Row numbers: of choice j of token t at t * k + j, the row it went to, -1 when its expert is not in
    active_expert_range [first, last) (row_idx_type 0); or of each row, the choice it came from (1).  Tokens for each
    expert of the range: running sums (type 0) or counts (1).  Rows after the last active one are undefined on the
    device; here they are the tokens of the experts elsewhere, in order: code that reads them gets wrong numbers.
    """
    if quant_mode != -1:
        leave_out(operator, quant_mode=quant_mode)
    if drop_pad_mode != 0:
        leave_out(operator, drop_pad_mode=drop_pad_mode)
    if expert_tokens_num_type not in (0, 1):
        leave_out(operator, expert_tokens_num_type=expert_tokens_num_type)
    choices = expert_idx.numel()
    if active_num not in (-1, 0) and active_num != choices:
        leave_out(operator, active_num=active_num)
    k = expert_idx.shape[-1]
    first, last = active_expert_range or (0, expert_num)
    experts = expert_idx.reshape(-1).long()
    active = (experts >= first) & (experts < last)
    order = torch.where(active, experts, experts.new_full((), 1 << 30)).sort(stable=True).indices
    if row_idx_type == 0:
        rows = torch.empty_like(order)
        rows[order] = torch.arange(choices, device=x.device)
        rows = torch.where(active, rows, -1)
    else:
        number = torch.arange(choices, device=x.device)
        rows = torch.where(number < active.sum(), order, -1)
    counts = torch.bincount(experts[active] - first, minlength=last - first)
    if expert_tokens_num_type == 0:
        counts = counts.cumsum(0)
    if not expert_tokens_num_flag:
        counts = counts.new_empty(0)
    tokens = order // k
    scales = x.new_empty(0, dtype=torch.float32) if scale is None else scale[tokens]
    return x[tokens], rows.to(torch.int32), counts, scales


@implements(
    "npu::npu_moe_init_routing_v2",
    ignored={"expert_capacity": "only for drop_pad_mode 1"},
)
def npu_moe_init_routing_v2(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    scale: torch.Tensor | None = None,
    active_num: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: list[int] = (),  # type: ignore[assignment]
    row_idx_type: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `init_routing`.

    Source: "torch_npu.npu_moe_init_routing_v2", Ascend Extension for PyTorch API reference; aclnnMoeInitRoutingV3.
    """
    return init_routing(
        "npu::npu_moe_init_routing_v2",
        x,
        expert_idx,
        scale,
        active_num,
        expert_num,
        drop_pad_mode,
        expert_tokens_num_type,
        expert_tokens_num_flag,
        quant_mode,
        active_expert_range,
        row_idx_type,
    )


@implements("npu::npu_moe_token_permute")
def npu_moe_token_permute(
    tokens: torch.Tensor, indices: torch.Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens (tokens, hidden) sorted by indices (tokens, k) or (tokens,), stably: (rows, row numbers int32).

    Row numbers (tokens * k,): the row that choice j of token t went to, at t * k + j.  num_out_tokens cuts the rows as
    a slice would, 0 or None keeps all.

    Source: "torch_npu.npu_moe_token_permute", Ascend Extension for PyTorch API reference; aclnnMoeTokenPermute.
    """
    if padded_mode:
        leave_out("npu::npu_moe_token_permute", padded_mode=padded_mode)
    k = indices.shape[1] if indices.dim() == 2 else 1
    order = indices.reshape(-1).sort(stable=True).indices
    rows = torch.empty_like(order)
    rows[order] = torch.arange(order.numel(), device=tokens.device)
    kept = order[:num_out_tokens] if num_out_tokens else order
    return tokens[kept // k], rows.to(torch.int32)


@implements("npu::npu_moe_token_permute_grad")
def npu_moe_token_permute_grad(
    tokens: torch.Tensor,
    grad_permuted_tokens: torch.Tensor,
    indices: torch.Tensor,
    sorted_indices: torch.Tensor,
    padded_mode: bool = False,
) -> torch.Tensor:
    """Each token's gradient, the sum over its rows, of tokens' shape and dtype.  Source: aclnnMoeTokenPermuteGrad."""
    if padded_mode:
        leave_out("npu::npu_moe_token_permute_grad", padded_mode=padded_mode)
    k = indices.shape[1] if indices.dim() == 2 else 1
    return _permute_grad(grad_permuted_tokens, sorted_indices, k, tokens.dtype)


@implements("npu::npu_moe_token_permute_grad_v2", ignored={"tokens_size_0": "follows from sorted_indices and num_topK"})
def npu_moe_token_permute_grad_v2(
    grad_permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    tokens_dtype: torch.dtype,
    num_topK: int,
    padded_mode: bool = False,
) -> torch.Tensor:
    """The same without the tokens, which torch-npu 2.13's derivative formula does not keep."""
    if padded_mode:
        leave_out("npu::npu_moe_token_permute_grad_v2", padded_mode=padded_mode)
    return _permute_grad(grad_permuted_tokens, sorted_indices, num_topK, tokens_dtype)


def _permute_grad(grad: torch.Tensor, rows: torch.Tensor, k: int, dtype: torch.dtype) -> torch.Tensor:
    chosen = _rows_or_zeros(grad, rows)
    return chosen.view(-1, k, chosen.shape[-1]).sum(1).to(dtype)


@implements("npu::npu_moe_token_unpermute", ignored={"restore_shape": "only for padded mode"})
def npu_moe_token_unpermute(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None = None,
    padded_mode: bool = False,
) -> torch.Tensor:
    """The inverse of npu_moe_token_permute, its rows summed for each token with probs (tokens, k), in fp32.

    Without probs each row is a token (k is 1).  Row numbers beyond the rows, of dropped choices, count as 0.  Returns
    (tokens, hidden) of permuted_tokens' dtype.

    Source: "torch_npu.npu_moe_token_unpermute", Ascend Extension for PyTorch API reference; aclnnMoeTokenUnpermute.
    """
    if padded_mode:
        leave_out("npu::npu_moe_token_unpermute", padded_mode=padded_mode)
    rows = _rows_or_zeros(permuted_tokens, sorted_indices)
    if probs is not None:
        rows = (rows.view(*probs.shape, -1) * probs.float().unsqueeze(-1)).sum(1)
    return rows.to(permuted_tokens.dtype)


@implements("npu::_npu_moe_token_unpermute", ignored={"restore_shape": "only for padded mode"})
def npu_moe_token_unpermute_for_training(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None = None,
    padded_mode: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """npu_moe_token_unpermute, and what its gradient needs: the rows.  torch-npu 2.13 calls it under autograd."""
    if padded_mode:
        leave_out("npu::_npu_moe_token_unpermute", padded_mode=padded_mode)
    return npu_moe_token_unpermute(permuted_tokens, sorted_indices, probs), permuted_tokens.clone()


@implements("npu::npu_moe_token_unpermute_grad", ignored={"restore_shape": "only for padded mode"})
def npu_moe_token_unpermute_grad(
    permuted_tokens: torch.Tensor,
    grad_unpermuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None = None,
    padded_mode: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients for permuted_tokens and for probs (empty without probs), of their shapes and dtypes.

    Source: aclnnMoeTokenUnpermuteGrad.
    """
    if padded_mode:
        leave_out("npu::npu_moe_token_unpermute_grad", padded_mode=padded_mode)
    rows, dtype = permuted_tokens.shape[0], permuted_tokens.dtype
    return _unpermute_grad(grad_unpermuted_tokens, sorted_indices, rows, dtype, probs, permuted_tokens)


@implements("npu::npu_moe_token_unpermute_grad_v2", ignored={"restore_shape": "only for padded mode"})
def npu_moe_token_unpermute_grad_v2(
    grad_unpermuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    permuted_tokens_size_0: int,
    permuted_tokens_dtype: torch.dtype,
    probs: torch.Tensor | None = None,
    padded_mode: bool = False,
    permuted_tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, with the rows only where probs are given."""
    if padded_mode:
        leave_out("npu::npu_moe_token_unpermute_grad_v2", padded_mode=padded_mode)
    return _unpermute_grad(
        grad_unpermuted_tokens, sorted_indices, permuted_tokens_size_0, permuted_tokens_dtype, probs, permuted_tokens
    )


def _unpermute_grad(
    grad: torch.Tensor,
    places: torch.Tensor,
    rows: int,
    dtype: torch.dtype,
    probs: torch.Tensor | None,
    permuted_tokens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    each, dprobs = grad.float(), grad.new_empty(0)
    if probs is not None:
        if permuted_tokens is None:
            raise ValueError("npu::npu_moe_token_unpermute_grad_v2: probs without permuted_tokens")
        chosen = _rows_or_zeros(permuted_tokens, places).view(*probs.shape, -1)
        dprobs = (each.unsqueeze(1) * chosen).sum(-1).to(probs.dtype)
        each = (each.unsqueeze(1) * probs.float().unsqueeze(-1)).flatten(0, 1)
    dpermuted = each.new_zeros(rows, grad.shape[-1])
    kept = places < rows
    dpermuted[places[kept].long()] = each[kept]
    return dpermuted.to(dtype), dprobs


def _rows_or_zeros(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x[rows] in fp32, with 0 where a row number is beyond x."""
    rows = rows.long()
    if x.shape[0] == 0:
        return x.new_zeros(rows.numel(), x.shape[1], dtype=torch.float32)
    kept = rows < x.shape[0]
    return torch.where(kept.unsqueeze(-1), x[rows.where(kept, 0)].float(), 0.0)


@implements("npu::npu_moe_re_routing")
def npu_moe_re_routing(
    tokens: torch.Tensor,
    expert_token_num_per_rank: torch.Tensor,
    per_token_scales: torch.Tensor | None = None,
    expert_token_num_type: int = 1,
    idx_type: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens ordered by rank and then expert, as counts (ranks, experts) say, put in order of expert and then rank.

    Returns (tokens, scales (empty without scales), the row each came from int32, tokens for each expert).

    Source: "torch_npu.npu_moe_re_routing", Ascend Extension for PyTorch API reference; aclnnMoeReRouting.
    """
    if expert_token_num_type != 1 or idx_type != 0:
        leave_out("npu::npu_moe_re_routing", expert_token_num_type=expert_token_num_type, idx_type=idx_type)
    counts = expert_token_num_per_rank
    ranks, experts = counts.shape
    number = torch.arange(experts, device=counts.device).repeat(ranks)
    order = number.repeat_interleave(counts.reshape(-1).long()).sort(stable=True).indices
    scales = tokens.new_empty(0, dtype=torch.float32) if per_token_scales is None else per_token_scales[order]
    return tokens[order], scales, order.to(torch.int32), counts.sum(0, dtype=counts.dtype)
