"""Matrix products.

Stands in for: aclnnGroupedMatmulV5, ATB's LinearOperation with fp32 accumulation.
Leaves out: quantised weights, biases, several activations at once (split_item 0 and 1), group lists of key and value
pairs, fused activations, the all-reduce and reduce-scatter fused into a product.

Weights may be in FRACTAL_NZ: their base format is read through torch.ops.fake_npu.base_format.

Who calls them:
    npu_grouped_matmul     vllm-ascend 0.11 ops/moe/moe_mlp.py; 0.13 to 0.23 ops/fused_moe/moe_mlp.py; 0.28 and 0.30
                           ops/fused_moe/routed_experts.py; verl 0.9.1 models/transformers/npu_patch.py, whose backward
                           uses group type 2
    _npu_matmul_add_fp32   vllm-ascend 0.11 worker/worker_v1.py; 0.13 to 0.30 worker/worker.py: the ATB warm-up
"""

from __future__ import annotations

import torch

from .registry import implements, leave_out

UNWRITTEN = 1.0
"""What rows hold that the device would leave uninitialised: finite, so that `0 * row` is 0, and not 0, so that code
that reads them gets wrong numbers."""


def in_base_format(weight: torch.Tensor) -> torch.Tensor:
    """`weight` with its elements in row-major (ND) order: an operator of the device reads FRACTAL_NZ as it is."""
    reader = getattr(torch.ops.fake_npu, "base_format", None)
    return weight if reader is None else reader(weight)


@implements(
    "npu::npu_grouped_matmul",
    "npu::npu_grouped_matmul.List",
    ignored={"tuning_config": "a hint about the expected group size"},
)
def npu_grouped_matmul(
    x: list[torch.Tensor],
    weight: list[torch.Tensor],
    group_list: torch.Tensor | list[int] | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
) -> list[torch.Tensor]:
    """Products of consecutive groups of one tensor, in fp32, of x's dtype; returns a list of one tensor.

    Group type 0 (rows): x [(M, K)], weight [(G, K, N)] or G of (K, N): group g of the rows times weight g, (M, N).
    Group type 2 (the summed axis): x [(M, K)], weight [(K, N)]: x's columns of group g times weight's rows of g,
    (G, M, N).  group_list holds group sizes (group_list_type 1) or their running sums (0).  Rows after the last group
    hold UNWRITTEN.

    Source: "torch_npu.npu_grouped_matmul", Ascend Extension for PyTorch API reference; aclnnGroupedMatmulV5.
    """
    operator = "npu::npu_grouped_matmul"
    if split_item not in (2, 3) or len(x) != 1 or group_list is None:
        leave_out(operator, split_item=split_item, group_list=group_list)
    if group_list_type not in (0, 1):
        leave_out(operator, group_list_type=group_list_type)
    sizes = group_sizes(group_list, running=group_list_type == 0)
    if group_type == 0:
        weights = [in_base_format(one) for one in weight]
        if len(weights) == 1 and weights[0].dim() == 3:
            weights = list(weights[0])
        return [_by_rows(x[0], weights, sizes)]
    if group_type == 2 and len(weight) == 1:
        return [_by_summed_axis(x[0], in_base_format(weight[0]), sizes)]
    leave_out(operator, group_type=group_type)


def group_sizes(group_list: torch.Tensor | list[int], running: bool) -> list[int]:
    """Group sizes from sizes or from running sums."""
    numbers = [int(number) for number in group_list]
    if not running:
        return numbers
    return [number - before for before, number in zip([0, *numbers], numbers, strict=False)]


def _by_rows(x: torch.Tensor, weights: list[torch.Tensor], sizes: list[int]) -> torch.Tensor:
    if len(sizes) != len(weights) or sum(sizes) > x.shape[0]:
        raise ValueError(
            f"npu::npu_grouped_matmul: {len(sizes)} groups of {sum(sizes)} rows for {len(weights)} weights and "
            f"{x.shape[0]} rows"
        )
    if weights[0].shape[0] != x.shape[1]:
        raise ValueError(
            f"npu::npu_grouped_matmul: x {tuple(x.shape)} and weight {tuple(weights[0].shape)}: "
            f"{x.shape[1]} columns against {weights[0].shape[0]} rows"
        )
    product = x.new_full((x.shape[0], weights[0].shape[-1]), UNWRITTEN)
    start = 0
    for group, size in enumerate(sizes):
        if size:
            rows = x[start : start + size].float() @ weights[group].float()
            product[start : start + size] = rows.to(x.dtype)
        start += size
    return product


def _by_summed_axis(x: torch.Tensor, weight: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    product = x.new_zeros(len(sizes), x.shape[0], weight.shape[-1])  # an empty group sums to 0
    start = 0
    for group, size in enumerate(sizes):
        rows = x[:, start : start + size].float() @ weight[start : start + size].float()
        product[group] = rows.to(x.dtype)
        start += size
    return product


@implements("atb::_npu_matmul_add_fp32")
def npu_matmul_add_fp32(x: torch.Tensor, weight: torch.Tensor, C: torch.Tensor) -> None:
    """C += x.T @ weight, in place, in fp32: x (K, M), weight (K, N), C (M, N).

    Source: op-plugin atb/MatmulAddFp32Atb.cpp; ATB "LinearOperation" with einsum accumulation.
    """
    C.add_(x.float().t() @ in_base_format(weight).float())
