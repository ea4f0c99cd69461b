"""Lost and wrapped loaders of experts, on plain fakes of what vLLM's layers look like from outside.

The real classes of each release: tests/npu/test_weight_matrix.py.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import torch

from verl_ascend_rollout.worker.weights import expert_format, layout, sync
from verl_ascend_rollout.worker.weights import weight_loader as loaders
from verl_ascend_rollout.worker.weights.manifest import Manifest, WeightSyncError


class FakeFusedMoE(torch.nn.Module):
    """vLLM up to 0.23: the layer itself has the parameters and the loader."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size = 4
        for name, shape in (("w13_weight", (2, 4, 4)), ("w2_weight", (2, 4, 2))):
            setattr(self, name, torch.nn.Parameter(torch.zeros(shape), requires_grad=False))

    def weight_loader(
        self, param: Any, loaded_weight: torch.Tensor, weight_name: str, shard_id: str, expert_id: int
    ) -> None:
        rows = param.data[expert_id]
        half = rows.shape[0] // 2
        {"w1": rows[:half], "w3": rows[half:], "w2": rows}[shard_id].copy_(loaded_weight)


class FakeRunner(torch.nn.Module):
    """vLLM from 0.24 on: the parameters are one level down, in RoutedExperts; what the model holds has no loader."""

    def __init__(self) -> None:
        super().__init__()
        self.routed_experts = FakeFusedMoE()


class LayerWithoutLoader(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w13_weight = torch.nn.Parameter(torch.zeros(2, 4, 4), requires_grad=False)


class FakeModel(torch.nn.Module):
    def __init__(self, experts: torch.nn.Module) -> None:
        super().__init__()
        self.experts = experts
        self.norm = torch.nn.LayerNorm(4)


@pytest.fixture(params=[FakeFusedMoE, FakeRunner])
def model(request: pytest.FixtureRequest) -> FakeModel:
    return FakeModel(request.param())


def parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.endswith(("w13_weight", "w2_weight"))}


def test_each_expert_parameter_gets_its_layers_loader(model: FakeModel) -> None:
    assert sorted(loaders.attach(model)) == sorted(parameters(model))
    for parameter in parameters(model).values():
        parameter.weight_loader(parameter, torch.ones(4, parameter.shape[2]), "", shard_id="w2", expert_id=1)  # type: ignore[attr-defined]
        assert parameter[1].eq(1).all()
        assert parameter[0].eq(0).all()
    assert not hasattr(model.norm.weight, "weight_loader")
    assert loaders.complaint(model) == ""


def test_attaching_twice_is_as_once_and_detaching_takes_it_back(model: FakeModel) -> None:
    loaders.attach(model)
    first = {name: p.weight_loader for name, p in parameters(model).items()}  # type: ignore[attr-defined]
    assert loaders.attach(model) == []
    assert {name: p.weight_loader for name, p in parameters(model).items()} == first  # type: ignore[attr-defined]
    assert all(hasattr(p, loaders.MARK) for p in parameters(model).values())
    assert sorted(loaders.detach(model)) == sorted(parameters(model))
    assert not any(hasattr(p, name) for p in parameters(model).values() for name in ("weight_loader", loaders.MARK))
    assert loaders.detach(model) == []


def test_a_loader_that_is_there_stays(model: FakeModel) -> None:
    def own(*args: Any) -> None:
        """A loader that a model set itself."""

    for parameter in parameters(model).values():
        parameter.weight_loader = own  # type: ignore[attr-defined]
    assert loaders.attach(model) == []
    assert all(p.weight_loader is own for p in parameters(model).values())  # type: ignore[attr-defined]


def verls_wrapper(function: Any) -> Any:
    """What verl 0.9.1 puts over the method on an NPU: a guess by shape (utils/vllm/npu_vllm_patch.py:241)."""

    @functools.wraps(function)
    def wrapper(self: Any, param: Any, loaded_weight: Any, weight_name: str, shard_id: str, expert_id: int) -> Any:
        if shard_id in ("w1", "w3") and param.shape[1] == self.hidden_size:
            param.data = param.data.transpose(1, 2)
        return function(self, param, loaded_weight, weight_name, shard_id, expert_id)

    setattr(wrapper, loaders.VERLS_MARK, True)
    return wrapper


@pytest.mark.parametrize("set_before", [True, False])
def test_verls_wrapper_is_passed_over_where_the_shape_says_nothing(
    set_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeFusedMoE, "weight_loader", verls_wrapper(FakeFusedMoE.weight_loader))
    layer = FakeFusedMoE()
    parameter: Any = layer.w13_weight
    if set_before:
        parameter.weight_loader = layer.weight_loader
    gate, up = torch.arange(8.0).view(2, 4), torch.arange(8.0, 16.0).view(2, 4)

    loaders.attach(layer)
    parameter.weight_loader(parameter, gate, "", shard_id="w1", expert_id=0)
    parameter.weight_loader(parameter, up, "", shard_id="w3", expert_id=0)
    assert torch.equal(parameter[0], torch.cat([gate, up]))
    assert parameter.is_contiguous()

    loaders.detach(layer)
    assert hasattr(parameter, "weight_loader") is set_before
    # The control: through the wrapper the same two loads end up somewhere else, and nothing is raised.
    layer.weight_loader(parameter, gate, "", "w1", 0)
    layer.weight_loader(parameter, up, "", "w3", 0)
    assert not torch.equal(parameter[0], torch.cat([gate, up]))


def test_a_model_whose_experts_have_no_loader_is_named_and_refused_at_a_sync() -> None:
    model = FakeModel(LayerWithoutLoader())
    assert loaders.attach(model) == []
    assert loaders.complaint(model) == (
        "1 expert parameters of FakeModel have no weight_loader, and their layer (LayerWithoutLoader) has none to "
        "give: experts.w13_weight; new weights cannot be loaded into this model in this vLLM"
    )
    record = layout.WeightRecord("identity", (2, 4, 4), torch.float32, {})
    setattr(model.experts, layout.RECORD, layout.LayerRecord({"w13_weight": record}, ()))
    model.load_weights = lambda weights: set()  # type: ignore[assignment]
    with (
        pytest.raises(WeightSyncError, match="expert parameters of FakeModel have no weight_loader"),
        sync.reload(model, types.SimpleNamespace(dtype=torch.float32), Manifest()),
    ):
        pass


def test_settling_gives_loaders_to_layers_that_nobody_recorded(model: FakeModel) -> None:
    assert expert_format.restore_kernel_format(model) == []
    assert all(hasattr(p, "weight_loader") for p in parameters(model).values())
