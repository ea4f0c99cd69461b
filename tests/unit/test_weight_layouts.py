"""Layouts are recorded by looking, and weights are loaded through them: on plain torch layers, without an engine."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import pytest
import torch

from verl_ascend_rollout.worker.weights import expert_format, layout
from verl_ascend_rollout.worker.weights import sync as weight_sync
from verl_ascend_rollout.worker.weights.manifest import Manifest, WeightSyncError

EXPERTS = 3


class Method:
    """A quantization method as vLLM has them: one object a layer, with one function that processes its weights."""

    def __init__(self, process: Any) -> None:
        self.process = process

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.process(layer)


def transpose(layer: torch.nn.Module) -> None:
    """What vllm-ascend 0.13 to 0.23 does: new parameters, without what hung on the old ones."""
    for name in ("w13_weight", "w2_weight"):
        data = getattr(layer, name).data.transpose(1, 2).contiguous()
        setattr(layer, name, torch.nn.Parameter(data, requires_grad=False))


def load_expert(
    param: torch.nn.Parameter,
    loaded_weight: torch.Tensor,
    weight_name: str,
    shard_id: str,
    expert_id: int,
    return_success: bool = False,
) -> bool | None:
    rows = param.data[expert_id]
    half = rows.shape[0] // 2
    target = {"w1": rows[:half], "w3": rows[half:], "w2": rows}[shard_id]
    target.copy_(loaded_weight)
    return True if return_success else None


class Experts(torch.nn.Module):
    def __init__(self, hidden: int, intermediate: int, process: Any = transpose) -> None:
        super().__init__()
        for name, shape in (("w13_weight", (2 * intermediate, hidden)), ("w2_weight", (hidden, intermediate))):
            parameter = torch.nn.Parameter(torch.randn(EXPERTS, *shape), requires_grad=False)
            parameter.weight_loader = load_expert
            setattr(self, name, parameter)
        self.quant_method = Method(process)


class Router(torch.nn.Linear):
    """A router that keeps an fp32 copy of its weight, as vllm-ascend 0.23's does."""

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden, EXPERTS, bias=False, dtype=torch.bfloat16)
        self.weight.requires_grad_(False)
        self.quant_method = Method(self.derive)

    @staticmethod
    def derive(layer: Any) -> None:
        layer.weight_fp32 = layer.weight.data.float()


class Model(torch.nn.Module):
    def __init__(self, hidden: int, intermediate: int, process: Any = transpose) -> None:
        super().__init__()
        self.experts = Experts(hidden, intermediate, process)
        self.gate = Router(hidden)

    def load_weights(self, weights: Any) -> set[str]:
        """As vLLM's models do: each tensor goes to its parameter's loader, experts by number."""
        loaded = set()
        for name, tensor in weights:
            if name == "gate":
                self.gate.weight.data.copy_(tensor)
                loaded.add("gate.weight")
                continue
            expert, shard = name.split(".")
            parameter = self.experts.w2_weight if shard == "w2" else self.experts.w13_weight
            parameter.weight_loader(parameter, tensor, name, shard_id=shard, expert_id=int(expert))
        return loaded


def checkpoint(hidden: int, intermediate: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {"gate": torch.randn(EXPERTS, hidden, generator=generator).bfloat16()}
    for expert in range(EXPERTS):
        for shard in ("w1", "w3"):
            tensors[f"{expert}.{shard}"] = torch.randn(intermediate, hidden, generator=generator)
        tensors[f"{expert}.w2"] = torch.randn(hidden, intermediate, generator=generator)
    return tensors


def processed(hidden: int = 8, intermediate: int = 6, process: Any = transpose) -> Model:
    model = Model(hidden, intermediate, process)
    layout.watch(model)
    for layer in (model.experts, model.gate):
        layer.quant_method.process_weights_after_loading(layer)
    return model


def sync(model: Model, tensors: dict[str, torch.Tensor], **options: Any) -> None:
    with weight_sync.reload(model, types.SimpleNamespace(dtype=torch.bfloat16), Manifest(**options)) as load:
        for name, tensor in tensors.items():
            load([(name, tensor)])


@pytest.mark.parametrize(("hidden", "intermediate"), [(8, 6), (8, 4), (16, 8), (4, 4)])
def test_transposed_experts_are_recognised_also_where_the_shape_says_nothing(hidden: int, intermediate: int) -> None:
    model = processed(hidden, intermediate)
    record = layout.record(model.experts)
    assert record is not None
    assert {name: weight.layout for name, weight in record.weights.items()} == {
        "w13_weight": "transposed",
        "w2_weight": "transposed",
    }
    assert record.weights["w13_weight"].attributes["weight_loader"] is load_expert


@pytest.mark.parametrize("turned", [True, False])
def test_a_square_weight_of_which_little_is_not_zero_is_looked_at_closely_enough(turned: bool) -> None:
    """A freshly added expert, a pruned one: a handful of elements would agree with either layout."""

    def process(layer: Any) -> None:
        if turned:
            transpose(layer)

    model = Model(64, 32, process)
    for name, weight in model.experts.named_parameters():
        weight.data.zero_()
        rows = torch.arange(weight.shape[1])
        weight.data[:, rows, (3 * rows + 1) % weight.shape[2]] = 1.0 if name == "w2_weight" else 2.0
    layout.watch(model)
    model.experts.quant_method.process_weights_after_loading(model.experts)
    found = layout.record(model.experts)
    assert found is not None
    assert found.weights["w13_weight"].layout == ("transposed" if turned else "identity")


def test_a_layer_that_keeps_its_weights_is_identity_and_its_copy_is_derived() -> None:
    record = layout.record(processed().gate)
    assert record is not None
    assert record.weights["weight"].layout == "identity"
    assert record.derived == ("weight_fp32",)


def repack(layer: Any) -> None:
    """The same shape and the same address, other contents: what AMX packing does."""
    layer.w13_weight.data.copy_(layer.w13_weight.data.flip(-1))


def transpose_a_constant(layer: Any) -> None:
    """Square and constant: nobody can see what was done."""
    layer.w13_weight.data.fill_(0.5)
    layer.w13_weight = torch.nn.Parameter(layer.w13_weight.data.transpose(1, 2).contiguous(), requires_grad=False)


def test_what_is_no_view_is_repacked_and_refused_where_it_cannot_be_staged() -> None:
    model = processed(process=repack)
    found = layout.record(model.experts)
    assert found is not None
    assert found.weights["w13_weight"].layout == "repacked"
    setattr(model.experts, layout.RECORD, dataclasses.replace(found, device="npu"))
    with pytest.raises(WeightSyncError, match=r"experts\.w13_weight \(repacked\).*VLLM_ASCEND_ENABLE_NZ=0"):
        sync(model, checkpoint(8, 6, 1))


def test_a_square_constant_weight_is_unknown_and_refused() -> None:
    model = Model(8, 4, transpose_a_constant)
    model.experts.w13_weight.data.fill_(0.5)
    layout.watch(model)
    model.experts.quant_method.process_weights_after_loading(model.experts)
    with pytest.raises(WeightSyncError, match=r"experts\.w13_weight \(unknown\)"):
        sync(model, checkpoint(8, 4, 1))


def test_a_weight_that_the_engine_threw_away_is_named() -> None:
    """vllm-ascend 0.13 to 0.25, utils.py, dispose_tensor."""
    model = processed()
    model.gate.weight.set_(torch.empty(0, dtype=torch.bfloat16))
    with pytest.raises(WeightSyncError, match=r"^gate\.weight was thrown away by the engine after loading"):
        sync(model, checkpoint(8, 6, 1))


def test_a_model_that_was_never_watched_is_refused() -> None:
    with pytest.raises(WeightSyncError, match="VLLM_PLUGINS"):
        sync(Model(8, 6), checkpoint(8, 6, 1))


@pytest.mark.parametrize(("hidden", "intermediate"), [(8, 6), (8, 4), (4, 4)])
def test_three_syncs_equal_a_fresh_load_at_the_same_addresses(hidden: int, intermediate: int) -> None:
    model = processed(hidden, intermediate)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    derived = model.gate.weight_fp32.data_ptr()
    for seed in (1, 2, 3):
        tensors = checkpoint(hidden, intermediate, seed)
        sync(model, tensors)
        for expert in range(EXPERTS):
            w13 = torch.cat([tensors[f"{expert}.w1"], tensors[f"{expert}.w3"]])
            assert torch.equal(model.experts.w13_weight[expert], w13.t())
            assert torch.equal(model.experts.w2_weight[expert], tensors[f"{expert}.w2"].t())
        assert model.experts.w13_weight.is_contiguous()
        assert torch.equal(model.gate.weight_fp32, tensors["gate"].float())
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    assert model.gate.weight_fp32.data_ptr() == derived


@pytest.mark.parametrize("lost", ["1.w3", "2.w2", "gate"])
def test_one_missing_part_is_named(lost: str) -> None:
    tensors = checkpoint(8, 6, 1)
    del tensors[lost]
    # In a first sync too, as the trainer names it: by the experts beside it.
    name = {"gate": "gate.weight"}.get(lost, lost)
    with pytest.raises(WeightSyncError, match=f"1 parameters missing from the stream: {name}"):
        sync(processed(), tensors)


def test_a_part_that_comes_twice_under_another_name_is_named() -> None:
    tensors = checkpoint(8, 6, 1)
    tensors["01.w1"] = tensors["1.w1"]
    with pytest.raises(WeightSyncError, match=r"sent more than once: 01\.w1 \(the place of 1\.w1\)"):
        sync(processed(), tensors)


def test_after_a_failure_the_kernel_form_is_back_and_a_full_sync_passes() -> None:
    model = processed()
    tensors = checkpoint(8, 6, 1)
    with pytest.raises(WeightSyncError, match=r"1\.w2 \(its place in experts\.w2_weight has shape"):
        sync(model, {**tensors, "1.w2": torch.zeros(5, 5)})
    assert model.experts.w13_weight.is_contiguous()
    sync(model, tensors)
    assert torch.equal(model.experts.w2_weight[1], tensors["1.w2"].t())


def test_a_wake_up_that_transposes_back_is_undone_and_the_loader_comes_back() -> None:
    model = processed()
    before = model.experts.w13_weight.detach().clone()
    # vllm-ascend 0.13 worker.py:188-208
    view = model.experts.w13_weight.data.transpose(1, 2)
    model.experts.w13_weight = torch.nn.Parameter(view, requires_grad=False)
    assert expert_format.restore_kernel_format(model) == ["experts.w13_weight"]
    assert torch.equal(model.experts.w13_weight, before)
    assert model.experts.w13_weight.is_contiguous()
    assert model.experts.w13_weight.weight_loader is load_expert
    assert expert_format.restore_kernel_format(model) == []


def test_weights_in_no_known_form_are_named() -> None:
    model = processed()
    model.experts.w13_weight = torch.nn.Parameter(torch.zeros(EXPERTS, 5, 5), requires_grad=False)
    with pytest.raises(expert_format.LayoutError, match=r"experts\.w13_weight has shape \(3, 5, 5\)"):
        expert_format.restore_kernel_format(model)
