"""Experts that come as one 3-D tensor a layer, taken apart into the names of a checkpoint.

transformers 5 keeps the experts of most mixtures in two parameters (5.10.4, models/qwen2_moe/modeling_qwen2_moe.py):
`mlp.experts.gate_up_proj` of shape (experts, 2 * intermediate, hidden), gate above up, and `mlp.experts.down_proj` of
shape (experts, hidden, intermediate).  Files have one tensor an expert, and that is what vLLM's loaders expect up to
0.23: Qwen2-MoE refuses another name (KeyError), Qwen3-MoE of 0.18 and 0.23 passes over it without a word and keeps its
old experts (models/qwen3_moe.py).  verl 0.9.1 takes them apart in its FSDP engine
(workers/engine/fsdp/utils.py:90); a trainer that does not is served here.
"""

from __future__ import annotations

from typing import Any

import torch

from verl_ascend_rollout.transport.stream import NamedTensor, parse_slice_name

MERGED_BY_TRANSFORMERS = frozenset(
    {
        *("qwen2_moe", "qwen3_moe", "qwen3_next", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe"),
        *("exaone_moe", "glm4_moe", "glm4_moe_lite", "hunyuan_v1_moe", "olmoe", "flex_olmo", "longcat_flash"),
    }
)
"""Model types whose experts transformers merges in that way (5.10.4, conversion_mapping.py, "qwen2_moe").  Others use
the same names for other layouts (gpt_oss, qwen3_vl_moe: transposed, and so in their files), which vLLM's loaders of
these models know; shapes would not tell."""

MERGED_LIKE_MIXTRAL = frozenset({"mixtral", "minimax", "minimax_m2"})
"""Model types whose experts are merged in the same way out of other names, and whose `.mlp.` is `.block_sparse_moe.` in
files (the same, "mixtral")."""

GATE_UP = ".mlp.experts.gate_up_proj"
DOWN = ".mlp.experts.down_proj"


class MergedExpertsError(ValueError):
    """Merged experts do not have the shape that this model's merged experts have."""


def come_merged(model_config: Any) -> bool:
    """Return whether a trainer may send this model's experts merged, in slices or whole."""
    config = getattr(model_config, "hf_text_config", None)
    return getattr(config, "model_type", None) in MERGED_BY_TRANSFORMERS


def parts(name: str, tensor: torch.Tensor, model_config: Any) -> list[NamedTensor]:
    """Return merged experts under the names of a checkpoint, as views; nothing, if it is not merged experts that came.

    Args:
        name: the stream's; may be that of a slice (see `stream`).
        tensor: contiguous.
        model_config: vLLM's ModelConfig, whose model type says how experts are merged.

    Raises:
        MergedExpertsError: it does not have the shape that this model's merged experts have.
    """
    config = getattr(model_config, "hf_text_config", None)
    model_type = getattr(config, "model_type", None)
    slice_of = parse_slice_name(name)
    whole, first = slice_of[:2] if slice_of is not None else (name, 0)
    if model_type in MERGED_BY_TRANSFORMERS:
        gate_name, up_name, down_name = "gate_proj", "up_proj", "down_proj"
        in_file = whole
    elif model_type in MERGED_LIKE_MIXTRAL:
        gate_name, up_name, down_name = "w1", "w3", "w2"
        in_file = whole.replace(".mlp.", ".block_sparse_moe.")
    else:
        return []
    if whole.endswith(DOWN):
        _check(name, tensor, hidden_axis=1, config=config)
        found = _each(in_file.removesuffix("down_proj"), down_name, tensor, first)
    elif whole.endswith(GATE_UP):
        _check(name, tensor, hidden_axis=2, config=config)
        prefix = in_file.removesuffix("gate_up_proj")
        gate, up = tensor.chunk(2, dim=1)
        # All of one kind first: the loader's copies of them are equally far apart, so that later they are one copy.
        found = [*_each(prefix, gate_name, gate, first), *_each(prefix, up_name, up, first)]
    else:
        return [(in_file, tensor)] if in_file != name else []
    if slice_of is not None and slice_of[2] - first != len(tensor):
        raise MergedExpertsError(f"has {len(tensor)} experts, and its name says {slice_of[2] - first}")
    return found


def _each(prefix: str, projection: str, experts: torch.Tensor, first: int) -> list[NamedTensor]:
    return [(f"{prefix}{first + index}.{projection}.weight", each) for index, each in enumerate(experts.unbind())]


def _check(name: str, tensor: torch.Tensor, hidden_axis: int, config: Any) -> None:
    hidden = int(config.hidden_size)
    halves = hidden_axis == 1 or (tensor.dim() == 3 and tensor.shape[1] % 2 == 0)
    if tensor.dim() != 3 or tensor.shape[hidden_axis] != hidden or not halves:
        wanted = "(experts, 2 * intermediate, hidden)" if hidden_axis == 2 else "(experts, hidden, intermediate)"
        raise MergedExpertsError(
            f"has shape {tuple(tensor.shape)}; the merged experts of a {config.model_type} have {wanted} with hidden "
            f"{hidden}, as transformers 5 lays them out: send them so, or one tensor an expert"
        )
