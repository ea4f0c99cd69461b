"""What layers make of weights follows every sync, where captured graphs read it.  Faked are vLLM's and vllm-ascend's
layers, each with the lines of theirs that matter."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from test_weight_layouts import Model, checkpoint, sync

from verl_ascend_rollout.worker.weights import derived, layout
from verl_ascend_rollout.worker.weights.manifest import WeightSyncError


class AttentionLayerBase:
    """vLLM's base class of attention layers."""


@pytest.fixture(autouse=True)
def _attention_of_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    place = "vllm.model_executor.layers.attention_layer_base"
    monkeypatch.setitem(sys.modules, place, types.SimpleNamespace(AttentionLayerBase=AttentionLayerBase))


class Attention(torch.nn.Module, AttentionLayerBase):
    def __init__(self, impl: Any) -> None:
        super().__init__()
        self.impl = impl

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        self.impl.process_weights_after_loading(act_dtype)


class AbsorbedEachTime:
    """vllm-ascend 0.13 with graphs of whole decode steps (attention/mla_v1.py:807)."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        self.weight = weight
        self.dtype = torch.float32

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        self.W_UV = self.weight.data.t().contiguous().to(self.dtype)


class SinksCastOnce:
    """vLLM's FlashInfer attention before vllm#48251."""

    def __init__(self, sinks: torch.Tensor) -> None:
        self.sinks = sinks

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        if self.sinks.dtype != torch.float32:
            self.sinks = self.sinks.to(torch.float32)


class SinksCastEachTime(SinksCastOnce):
    """vLLM's since then: the source is kept."""

    def __init__(self, sinks: torch.Tensor) -> None:
        super().__init__(sinks)
        self._sinks_source = sinks

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        self.sinks = self._sinks_source.to(torch.float32)


class Runner(torch.nn.Module):
    """vLLM's MoERunner (0.28, moe_runner.py:325)."""

    def __init__(self, gate: torch.nn.Module) -> None:
        super().__init__()
        self.gate, self.shared_expert_gate = gate, torch.nn.Linear(8, 1, bias=False, dtype=torch.bfloat16)
        self.shared_expert_gate.weight.requires_grad_(False)
        self._combined_gate_weight: torch.Tensor | None = None

    def use(self) -> None:
        if self._combined_gate_weight is None:
            self._combined_gate_weight = torch.cat([self.gate.weight, self.shared_expert_gate.weight])


def processed(change: Any) -> Any:
    """The model of the layouts' tests, with something more in it, loaded and processed as vLLM does it."""
    model: Any = Model(8, 6)
    change(model)
    layout.watch(model)
    for layer in (model.experts, model.gate):
        layer.quant_method.process_weights_after_loading(layer)
    for layer in model.modules():
        if isinstance(layer, Attention):
            layer.process_weights_after_loading(torch.bfloat16)
    return model


def absorbed(model: Any) -> None:
    model.attention = Attention(AbsorbedEachTime(model.gate.weight))


def test_what_an_attention_layer_makes_anew_is_at_the_old_address() -> None:
    model = processed(absorbed)
    captured = model.attention.impl.W_UV
    for seed in (1, 2):
        tensors = checkpoint(8, 6, seed)
        sync(model, tensors)
        assert torch.equal(captured, tensors["gate"].t().float())
        assert model.attention.impl.W_UV is captured


def test_what_an_attention_layer_makes_in_another_form_is_refused() -> None:
    model = processed(absorbed)
    model.attention.impl.dtype = torch.float64
    with pytest.raises(WeightSyncError, match=r"attention\.impl\.W_UV, which is derived .* torch.float64 of shape"):
        sync(model, checkpoint(8, 6, 1))


@pytest.mark.parametrize("implementation", [SinksCastOnce, SinksCastEachTime])
def test_sinks_that_were_cast_follow_their_weight_at_the_old_address(implementation: Any) -> None:
    def change(model: Any) -> None:
        model.self_attn = torch.nn.Module()
        model.self_attn.sinks = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16), requires_grad=False)
        model.self_attn.attn = Attention(implementation(model.self_attn.sinks))

    model = processed(change)
    captured = model.self_attn.attn.impl.sinks
    assert captured.dtype == torch.float32
    model.self_attn.sinks.fill_(2)
    derived.process_attention(model, torch.bfloat16)
    derived.make_again(model)
    assert captured.tolist() == [2.0] * 4
    assert model.self_attn.attn.impl.sinks is captured


def test_sinks_of_which_nobody_knows_the_weight_are_refused() -> None:
    def change(model: Any) -> None:
        model.attention = Attention(SinksCastOnce(torch.ones(4, dtype=torch.bfloat16)))

    with pytest.raises(WeightSyncError, match=r"attention\.impl\.sinks is a copy of a weight"):
        derived.make_again(processed(change))


def test_what_a_layer_made_when_it_was_first_used_follows_every_sync_at_its_address() -> None:
    model = processed(lambda model: setattr(model, "runner", Runner(model.gate)))
    model.runner.use()
    captured = model.runner._combined_gate_weight
    for seed in (1, 2):
        model.gate.weight.data.copy_(checkpoint(8, 6, seed)["gate"])
        derived.make_again(model)
        model.runner.use()
        assert torch.equal(captured[:-1], model.gate.weight)
        assert model.runner._combined_gate_weight is captured
    del model.runner.shared_expert_gate
    with pytest.raises(WeightSyncError, match=r"runner\._combined_gate_weight was made of weights when .* first used"):
        derived.make_again(model)


def test_merged_convolutions_and_positions_are_made_as_their_layers_make_them() -> None:
    """vllm-ascend 0.28, models/glm5next/kda.py:370; vLLM 0.28, models/hunyuan_vision.py:335."""
    delta: Any = torch.nn.Module()
    for name in ("q_conv1d", "k_conv1d", "v_conv1d"):
        setattr(delta, name, torch.nn.Conv1d(1, 6, 4))
    weights = [getattr(delta, name).weight.squeeze(1) for name in ("q_conv1d", "k_conv1d", "v_conv1d")]
    delta._merged_conv_weight = torch.zeros(4, 18, dtype=torch.bfloat16)
    patches: Any = torch.nn.Module()
    patches.position_edge, patches.embed_dim, patches.position_embedding = 3, 5, torch.nn.Embedding(10, 5)
    patches.patch_pos_embed = torch.zeros(1, 5, 3, 3)
    derived.make_again(torch.nn.ModuleList([delta, patches]))
    assert torch.equal(delta._merged_conv_weight, torch.cat(weights).t().bfloat16())
    assert torch.equal(patches.patch_pos_embed[0, :, 1, 2], patches.position_embedding.weight[1 + 1 * 3 + 2])
