"""What of padded expert parameters a checkpoint fills, and that nothing else is waited for."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from typing import Any

import pytest
import torch

from verl_ascend_rollout.worker.weights import layout, padding
from verl_ascend_rollout.worker.weights import sync as weight_sync
from verl_ascend_rollout.worker.weights.account import Account, Places
from verl_ascend_rollout.worker.weights.manifest import Manifest, WeightSyncError
from verl_ascend_rollout.worker.weights.plan import Plan
from verl_ascend_rollout.worker.weights.region import Region, storage_of

EXPERTS, INTERMEDIATE, HIDDEN = 3, 6, 10
SHAPES = {
    "w13_weight": lambda rows, columns: (EXPERTS, 2 * rows, columns),
    "w2_weight": lambda rows, columns: (EXPERTS, columns, rows),
    "w13_bias": lambda rows, columns: (EXPERTS, 2 * rows),
    "w2_bias": lambda rows, columns: (EXPERTS, columns),
}


def layer(padded_intermediate: int = INTERMEDIATE, padded_hidden: int = HIDDEN, gated: bool = True) -> Any:
    found: Any = torch.nn.Module()
    found.moe_config = types.SimpleNamespace(
        intermediate_size_per_partition_unpadded=INTERMEDIATE, hidden_dim_unpadded=HIDDEN, is_act_and_mul=gated
    )
    for name, shape in SHAPES.items():
        size = list(shape(padded_intermediate, padded_hidden))
        if name.startswith("w13") and not gated:
            size[1] //= 2
        setattr(found, name, torch.nn.Parameter(torch.zeros(size), requires_grad=False))
    return found


def test_what_has_the_checkpoints_sizes_is_filled_as_a_whole() -> None:
    model = torch.nn.ModuleDict({"experts": layer()})
    assert padding.padded(model) == {}
    for name, parameter in layer().named_parameters():
        assert padding.filled(layer(), name, parameter)[0] is parameter


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("intermediate", "hidden"), [(8, HIDDEN), (INTERMEDIATE, 16), (8, 16)])
def test_of_what_is_larger_the_checkpoints_part_is_filled(intermediate: int, hidden: int, gated: bool) -> None:
    experts = layer(intermediate, hidden, gated)
    model = torch.nn.ModuleDict({"experts": experts})
    parts = padding.padded(model)
    assert parts.keys() >= {"experts.w13_weight", "experts.w2_weight"}
    for name, parameter in experts.named_parameters():
        for part in parts.get(f"experts.{name}", []):
            part.fill_(1.0)
        unpadded = SHAPES[name](INTERMEDIATE, HIDDEN)
        halves = 2 if gated or not name.startswith("w13") else 1
        elements = torch.Size(unpadded).numel() * halves // 2
        if f"experts.{name}" in parts:
            assert int(parameter.sum()) == elements
    if gated:
        # The up half begins where the kernel has it.
        assert bool((experts.w13_weight[:, intermediate : intermediate + INTERMEDIATE, :HIDDEN] == 1).all())
        assert not bool(experts.w13_weight[:, INTERMEDIATE:intermediate].any())


def test_a_padded_parameter_is_whole_without_its_padding_and_not_before() -> None:
    experts = layer(8, 16)
    model = torch.nn.ModuleDict({"experts": experts})
    places = Places(dict(model.named_parameters()), padding.padded(model))
    account = Account(places.wanted())
    storage = storage_of(experts.w13_weight)
    for expert in range(EXPERTS):
        for begin in (0, 8):
            assert not account.is_whole(storage)
            written = experts.w13_weight[expert, begin : begin + INTERMEDIATE, :HIDDEN]
            account.copied(storage, Region.of(written, places.bases[storage]))
    assert account.is_whole(storage)


def test_layers_that_are_no_experts_and_parameters_of_other_names_are_as_they_are() -> None:
    linear = torch.nn.Linear(4, 4)
    assert padding.filled(linear, "weight", linear.weight)[0] is linear.weight
    other = torch.nn.Parameter(torch.zeros(EXPERTS, 99, 99))
    assert padding.filled(layer(), "e_score_correction_bias", other)[0] is other


class KimiDeltaAttention(torch.nn.Module):
    """vLLM 0.28's with a gate of full rank: a merged projection, and rows that fill it up to a multiple of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj_padding = 5
        self.in_proj_qkvgfab: Any = torch.nn.Linear(4, 16, bias=False)
        self.in_proj_qkvgfab.weight.requires_grad_(False)
        self.in_proj_qkvgfab.quant_method = types.SimpleNamespace(process_weights_after_loading=lambda layer: None)

    def load_weights(self, weights: Any) -> None:
        for name, tensor in weights:
            self.in_proj_qkvgfab.weight.data[{"q": 0, "beta": 8}[name] :][: len(tensor)].copy_(tensor)


def test_rows_that_fill_a_projection_up_are_not_waited_for_and_are_clear_after_each_sync() -> None:
    model = KimiDeltaAttention()
    layout.watch(model)
    model.in_proj_qkvgfab.quant_method.process_weights_after_loading(model.in_proj_qkvgfab)
    # Not a CPU's: there the layer would be rebuilt.
    record = dataclasses.replace(layout.record(model.in_proj_qkvgfab), device="cuda")
    setattr(model.in_proj_qkvgfab, layout.RECORD, record)
    plan = Plan()
    stream = {"q": torch.ones(8, 4), "beta": torch.full((3, 4), 2.0)}
    for lost in (None, "beta", None, None):
        model.in_proj_qkvgfab.weight.fill_(float("nan"))  # as after a sleep of level 2
        given = [(name, tensor) for name, tensor in stream.items() if name != lost]
        refused = pytest.raises(WeightSyncError, match="1 parameters missing from the stream: beta")
        with (
            refused if lost else contextlib.nullcontext(),
            weight_sync.reload(model, types.SimpleNamespace(dtype=torch.float32), Manifest(), plan) as load,
        ):
            load(given)
        if not lost:
            assert torch.equal(model.in_proj_qkvgfab.weight, torch.cat([*stream.values(), torch.zeros(5, 4)]))
            assert plan.replayable
