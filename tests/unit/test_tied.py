"""A head that is tied to the embedding may come or not, and must be the embedding."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from verl_ascend_rollout.worker.weights import layout, tied
from verl_ascend_rollout.worker.weights import sync as weight_sync
from verl_ascend_rollout.worker.weights.manifest import Manifest, WeightSyncError
from verl_ascend_rollout.worker.weights.plan import Plan

EMBEDDING, HEAD = "embed.weight", "lm_head.weight"


def load_rows(param: torch.nn.Parameter, loaded_weight: torch.Tensor) -> None:
    param.data.copy_(loaded_weight)


class FakeModel(torch.nn.Module):
    """A tied model whose loader, as vLLM 0.30's, takes no head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(4, 2)
        self.embed.weight.weight_loader = load_rows  # type: ignore[assignment]
        self.lm_head = torch.nn.Linear(2, 4, bias=False)
        self.lm_head.weight = self.embed.weight
        setattr(self.embed, layout.RECORD, layout.LayerRecord({}, ()))

    def load_weights(self, weights: Any) -> set[str]:
        names = set()
        for name, tensor in weights:
            if name != EMBEDDING:
                raise ValueError(f"{name} was skipped")
            self.embed.weight.weight_loader(self.embed.weight, tensor)  # type: ignore[operator]
            names.add(name)
        return names


def sync(model: FakeModel, stream: list[tuple[str, torch.Tensor]]) -> None:
    with weight_sync.reload(model, types.SimpleNamespace(dtype=torch.float32), Manifest()) as load:
        for pair in stream:
            load([pair])


def test_the_head_is_known_by_the_embeddings_name() -> None:
    assert tied.aliases(FakeModel()) == {HEAD: EMBEDDING}


@pytest.mark.parametrize("names", [[EMBEDDING], [EMBEDDING, HEAD], [HEAD, EMBEDDING], [HEAD]])
def test_the_same_tensor_may_come_under_either_name_or_both(names: list[str]) -> None:
    model, tensor = FakeModel(), torch.randn(4, 2)
    sync(model, [(name, tensor) for name in names])
    assert torch.equal(model.lm_head.weight, tensor)


@pytest.mark.parametrize("names", [[EMBEDDING, HEAD], [HEAD, EMBEDDING]])
def test_another_head_cannot_be_this_models(names: list[str]) -> None:
    stream = [(name, torch.randn(4, 2)) for name in names]
    with pytest.raises(WeightSyncError, match=rf"{names[1]} \(is not the same as the other of {EMBEDDING} and {HEAD}"):
        sync(FakeModel(), stream)


def test_a_parameter_that_two_modules_hold_is_no_tied_head() -> None:
    model = torch.nn.Module()
    model.shared_expert = torch.nn.Linear(2, 2)
    model.experts = torch.nn.Module()
    model.experts.shared_experts = model.shared_expert
    assert tied.aliases(model) == {}


@pytest.mark.parametrize("names", [[EMBEDDING], [EMBEDDING, HEAD], [HEAD, EMBEDDING], [HEAD]])
def test_later_syncs_take_either_name_as_well(names: list[str]) -> None:
    model, plan = FakeModel(), Plan()
    for _ in range(3):
        tensor = torch.randn(4, 2)
        with weight_sync.reload(model, types.SimpleNamespace(dtype=torch.float32), Manifest(), plan) as load:
            for name in names:
                load([(name, tensor)])
        assert torch.equal(model.lm_head.weight, tensor)
    assert plan.replayable
