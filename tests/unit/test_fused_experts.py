"""Merged experts are taken apart exactly as transformers merges them."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from verl_ascend_rollout.worker.weights import fused_experts
from verl_ascend_rollout.worker.weights.verify import WeightSyncError

EXPERTS, HIDDEN, INTERMEDIATE = 3, 8, 4


def model_config(model_type: str = "qwen2_moe") -> Any:
    return types.SimpleNamespace(hf_text_config=types.SimpleNamespace(model_type=model_type, hidden_size=HIDDEN))


def test_what_transformers_merged_comes_apart_as_it_writes_it_to_a_file(tmp_path: Any) -> None:
    from safetensors.torch import load_file
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        vocab_size=16,
        hidden_size=HIDDEN,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=EXPERTS,
        moe_intermediate_size=INTERMEDIATE,
        shared_expert_intermediate_size=4,
    )
    model = Qwen2MoeForCausalLM(config)
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    merged = dict(model.state_dict())
    assert "model.layers.0.mlp.experts.gate_up_proj" in merged
    split = dict(fused_experts.split(merged.items(), model_config()))
    assert set(split) == set(written)
    assert all(torch.equal(split[name], written[name]) for name in written)


def test_the_model_types_are_those_that_transformers_merges_so() -> None:
    from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as pattern_of

    assert {name for name in fused_experts.MERGED_BY_TRANSFORMERS if pattern_of.get(name) != "qwen2_moe"} == {
        "qwen2_moe"
    }


def test_nothing_is_copied() -> None:
    tensor = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN)
    parts = dict(fused_experts.split([("model.layers.0.mlp.experts.gate_up_proj", tensor)], model_config()))
    assert len(parts) == 2 * EXPERTS
    assert {part.untyped_storage().data_ptr() for part in parts.values()} == {tensor.untyped_storage().data_ptr()}
    assert all(part.is_contiguous() for part in parts.values())


@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen3_vl_moe", "mixtral", None])
def test_another_models_merged_experts_are_left_to_its_own_loader(model_type: Any) -> None:
    stream = [("model.layers.0.mlp.experts.gate_up_proj", torch.zeros(EXPERTS, HIDDEN, 2 * INTERMEDIATE))]
    assert list(fused_experts.split(stream, model_config(model_type))) == stream


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("gate_up_proj", (EXPERTS, HIDDEN, 2 * INTERMEDIATE + 2)),
        ("gate_up_proj", (EXPERTS, 7, HIDDEN)),
        ("gate_up_proj", (2 * INTERMEDIATE, HIDDEN)),
        ("down_proj", (EXPERTS, INTERMEDIATE, HIDDEN)),
    ],
)
def test_another_layout_is_refused(name: str, shape: tuple[int, ...]) -> None:
    stream = [(f"model.layers.0.mlp.experts.{name}", torch.zeros(shape))]
    with pytest.raises(WeightSyncError, match=rf"mlp\.experts\.{name} came with shape .* of a qwen2_moe have "):
        list(fused_experts.split(stream, model_config()))
