"""Tensors of a checkpoint that a model rightly leaves out.

Whatever else no parameter takes is refused: an expert or a bias too many is a sign of another model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

COMPUTED = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
"""Ends of names: tables that every engine computes by itself (vLLM 0.28, models/utils.py, AutoWeightsLoader)."""

MTP = ("mtp.", "model.mtp.")
"""Beginnings of names: layers for multi-token prediction, which an engine without speculative decoding does not have
(vLLM 0.28, models/qwen3_next.py)."""


def on_purpose(name: str, model: torch.nn.Module) -> bool:
    """Return whether the model has no place for a tensor, and needs none."""
    return name.endswith(COMPUTED) or _predicts_more_tokens(name, model) or _is_on_another_stage(name, model)


def _predicts_more_tokens(name: str, model: torch.nn.Module) -> bool:
    """Return whether it is of a layer after the last, as GLM-4.5 and DeepSeek-V3 have them
    (`num_nextn_predict_layers`)."""
    if name.startswith(MTP):
        return True
    config: Any = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    layers = getattr(config, "num_hidden_layers", None)
    more = getattr(config, "num_nextn_predict_layers", None)
    if not isinstance(layers, int) or not isinstance(more, int):
        return False
    _, found, rest = name.partition("layers.")
    number = rest.partition(".")[0]
    return bool(found) and number.isdigit() and layers <= int(number) < layers + more


def _is_on_another_stage(name: str, model: torch.nn.Module) -> bool:
    """Return whether pipeline parallelism has put its layer on another rank."""
    from vllm.model_executor.models.utils import get_pp_missing_layer_names

    missing: Iterable[str] = get_pp_missing_layer_names(model)
    return any(name.startswith(layer) for layer in missing)
