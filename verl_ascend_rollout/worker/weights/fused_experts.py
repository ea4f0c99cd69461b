"""Experts that come as one 3-D tensor a layer, taken apart into the names of a checkpoint.

transformers 5 keeps the experts of most mixtures in two parameters (5.10.4, models/qwen2_moe/modeling_qwen2_moe.py):
`mlp.experts.gate_up_proj` of shape (experts, 2 * intermediate, hidden), gate above up, and `mlp.experts.down_proj` of
shape (experts, hidden, intermediate).  Files have one tensor an expert, and that is what vLLM's loaders expect up to
0.23: Qwen2-MoE refuses another name (KeyError), Qwen3-MoE of 0.18 and 0.23 passes over it without a word and keeps its
old experts (models/qwen3_moe.py).  verl 0.9.1 takes them apart in its FSDP engine
(workers/engine/fsdp/utils.py:90); a trainer that does not is served here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from verl_ascend_rollout.worker.weights.verify import WeightSyncError

NamedTensor = tuple[str, torch.Tensor]

MERGED_BY_TRANSFORMERS = frozenset(
    {
        *("qwen2_moe", "qwen3_moe", "qwen3_next", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe"),
        *("exaone_moe", "glm4_moe", "glm4_moe_lite", "hunyuan_v1_moe", "olmoe", "flex_olmo", "longcat_flash"),
    }
)
"""Model types whose experts transformers merges in that way (5.10.4, conversion_mapping.py, "qwen2_moe").  Others use
the same names for other layouts (gpt_oss, qwen3_vl_moe: transposed, and so in their files), which vLLM's loaders of
these models know; shapes would not tell."""

GATE_UP = ".mlp.experts.gate_up_proj"
DOWN = ".mlp.experts.down_proj"


def split(weights: Iterable[NamedTensor], model_config: Any) -> Iterator[NamedTensor]:
    """The same weights with merged experts under one name each; everything else passes through.

    Args:
        weights: names and tensors in checkpoint form.
        model_config: vLLM's ModelConfig, whose model type says how experts are merged.

    Yields:
        Names and tensors; those of experts are views.

    Raises:
        WeightSyncError: a merged tensor does not have the shape that this model's merged experts have.
    """
    config = getattr(model_config, "hf_text_config", None)
    if getattr(config, "model_type", None) not in MERGED_BY_TRANSFORMERS:
        yield from weights
        return
    for name, tensor in weights:
        if name.endswith(GATE_UP):
            _check(name, tensor, hidden_axis=2, config=config)
            gate, up = tensor.chunk(2, dim=1)
            yield from _each(name.removesuffix("gate_up_proj"), {"gate_proj": gate, "up_proj": up})
        elif name.endswith(DOWN):
            _check(name, tensor, hidden_axis=1, config=config)
            yield from _each(name.removesuffix("down_proj"), {"down_proj": tensor})
        else:
            yield name, tensor


def _each(prefix: str, projections: dict[str, torch.Tensor]) -> Iterator[NamedTensor]:
    for expert in range(len(next(iter(projections.values())))):
        for projection, tensors in projections.items():
            yield f"{prefix}{expert}.{projection}.weight", tensors[expert]


def _check(name: str, tensor: torch.Tensor, hidden_axis: int, config: Any) -> None:
    hidden = int(config.hidden_size)
    halves = hidden_axis == 1 or (tensor.dim() == 3 and tensor.shape[1] % 2 == 0)
    if tensor.dim() != 3 or tensor.shape[hidden_axis] != hidden or not halves:
        wanted = "(experts, 2 * intermediate, hidden)" if hidden_axis == 2 else "(experts, hidden, intermediate)"
        raise WeightSyncError(
            f"{name} came with shape {tuple(tensor.shape)}; the merged experts of a {config.model_type} have {wanted} "
            f"with hidden {hidden}, as transformers 5 lays them out: send them so, or one tensor an expert"
        )
