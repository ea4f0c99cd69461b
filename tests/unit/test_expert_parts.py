"""Merged experts are taken apart exactly as transformers merges them."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from verl_ascend_rollout.transport.stream import slice_name
from verl_ascend_rollout.worker.weights import merged_experts

EXPERTS, HIDDEN, INTERMEDIATE = 3, 8, 4


def model_config(model_type: str = "qwen2_moe") -> Any:
    return types.SimpleNamespace(hf_text_config=types.SimpleNamespace(model_type=model_type, hidden_size=HIDDEN))


def taken_apart(tensors: dict[str, torch.Tensor], model_type: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors.items():
        yield from merged_experts.parts(name, tensor, model_config(model_type)) or [(name, tensor)]


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
    split = dict(taken_apart(merged, "qwen2_moe"))
    assert set(split) == set(written)
    assert all(torch.equal(split[name], written[name]) for name in written)


def test_mixtrals_experts_come_apart_as_transformers_writes_them_too(tmp_path: Any) -> None:
    from safetensors.torch import load_file
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=16,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
    )
    model = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    split = dict(taken_apart(dict(model.state_dict()), "mixtral"))
    assert set(split) == set(written)
    assert all(torch.equal(split[name], written[name]) for name in written)


def test_the_model_types_are_those_that_transformers_merges_so() -> None:
    from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as pattern_of

    assert {name for name in merged_experts.MERGED_BY_TRANSFORMERS if pattern_of.get(name) != "qwen2_moe"} == {
        "qwen2_moe"
    }
    mixtrals = merged_experts.MERGED_LIKE_MIXTRAL
    assert {name for name in mixtrals if pattern_of.get(name) != "mixtral"} == {"mixtral"}


def test_nothing_is_copied() -> None:
    tensor = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN)
    parts = dict(merged_experts.parts("model.layers.0.mlp.experts.gate_up_proj", tensor, model_config()))
    assert len(parts) == 2 * EXPERTS
    assert {part.untyped_storage().data_ptr() for part in parts.values()} == {tensor.untyped_storage().data_ptr()}
    assert all(part.is_contiguous() for part in parts.values())


@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen3_vl_moe", "llama4_text", None])
def test_another_models_merged_experts_are_left_to_its_own_loader(model_type: Any) -> None:
    name, tensor = "model.layers.0.mlp.experts.gate_up_proj", torch.zeros(EXPERTS, HIDDEN, 2 * INTERMEDIATE)
    assert merged_experts.parts(name, tensor, model_config(model_type)) == []


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
    with pytest.raises(merged_experts.MergedExpertsError, match=r"has shape .* of a qwen2_moe have "):
        merged_experts.parts(f"model.layers.0.mlp.experts.{name}", torch.zeros(shape), model_config())


@pytest.mark.parametrize("step", [1, 2, 3])
def test_slices_of_experts_come_apart_as_the_whole_does(step: int) -> None:
    for name, shape in (("gate_up_proj", (2 * INTERMEDIATE, HIDDEN)), ("down_proj", (HIDDEN, INTERMEDIATE))):
        whole, tensor = f"model.layers.0.mlp.experts.{name}", torch.randn(EXPERTS, *shape)
        wanted = dict(merged_experts.parts(whole, tensor, model_config()))
        found = {}
        for first in range(0, EXPERTS, step):
            part = tensor[first : first + step]
            found.update(merged_experts.parts(slice_name(whole, first, first + len(part)), part, model_config()))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[each], wanted[each]) for each in wanted)


def test_a_slice_of_other_than_its_name_says_is_refused() -> None:
    tensor = torch.zeros(2, HIDDEN, INTERMEDIATE)
    with pytest.raises(merged_experts.MergedExpertsError, match="has 2 experts, and its name says 3"):
        merged_experts.parts("model.layers.0.mlp.experts.down_proj[0:3]", tensor, model_config())
