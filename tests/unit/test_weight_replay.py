"""Later syncs repeat the first: on plain torch layers with the loaders that vLLM's models have, without an engine."""

from __future__ import annotations

import logging
import types
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from test_weight_layouts import EXPERTS, Method, Model, checkpoint, processed

from verl_ascend_rollout.worker.weights import bracket, layout
from verl_ascend_rollout.worker.weights.blocks import Blocks, Sample
from verl_ascend_rollout.worker.weights.plan import Plan, Recorder, Region
from verl_ascend_rollout.worker.weights.verify import Manifest, WeightSyncError

CONFIG = types.SimpleNamespace(dtype=torch.bfloat16)
HIDDEN, INTERMEDIATE = 8, 6


def sync(model: torch.nn.Module, tensors: Iterable[tuple[str, torch.Tensor]], plan: Plan, **options: Any) -> Manifest:
    manifest = Manifest(**options)
    with bracket.reload(model, CONFIG, manifest, plan) as load:
        load(tensors)
    return manifest


def fresh(tensors: dict[str, torch.Tensor], model: type[Model] = Model) -> torch.nn.Module:
    """A model of which all weights were loaded once, then processed: what every sync must come to."""
    made = model(HIDDEN, INTERMEDIATE)
    made.load_weights(tensors.items())
    layout.watch(made)
    for layer in (made.experts, made.gate):
        layer.quant_method.process_weights_after_loading(layer)
    return made


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
    return all(name == also and torch.equal(a, b) for (name, a), (also, b) in pairs)


def forbid_loading(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_weights(weights: Any) -> set[str]:
        raise AssertionError("the model's own loader was asked")

    monkeypatch.setattr(model, "load_weights", load_weights)


def test_the_second_sync_never_asks_the_loader_and_is_what_a_fresh_load_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = processed(HIDDEN, INTERMEDIATE), Plan()
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    sync(model, checkpoint(HIDDEN, INTERMEDIATE, 0).items(), plan)
    assert plan.replayable
    forbid_loading(model, monkeypatch)
    for seed in (1, 2, 3):
        tensors = checkpoint(HIDDEN, INTERMEDIATE, seed)
        order = list(tensors.items()) if seed != 2 else list(reversed(tensors.items()))
        sync(model, order, plan, compare=True)
        assert same(model, fresh(tensors))
        assert torch.equal(model.gate.weight_fp32, tensors["gate"].float())
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses


def test_another_dtype_is_asked_for_once_said_once_and_copied_from_then_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, plan = processed(HIDDEN, INTERMEDIATE), Plan()
    sync(model, checkpoint(HIDDEN, INTERMEDIATE, 0).items(), plan)
    wider = {name: tensor.double() for name, tensor in checkpoint(HIDDEN, INTERMEDIATE, 1).items()}
    with caplog.at_level(logging.INFO, logger="verl_ascend_rollout.worker"):
        sync(model, wider.items(), plan)
        assert same(model, fresh(wider))
        forbid_loading(model, monkeypatch)
        sync(model, wider.items(), plan)
    assert sum("did not come as in the one before" in line for line in caplog.messages) == 1


def test_other_names_for_the_same_weights_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = processed(HIDDEN, INTERMEDIATE), Plan()
    sync(model, checkpoint(HIDDEN, INTERMEDIATE, 0).items(), plan)
    tensors = checkpoint(HIDDEN, INTERMEDIATE, 1)
    renamed = {f"0{name}" if name.endswith("w2") else name: tensor for name, tensor in tensors.items()}
    sync(model, renamed.items(), plan)
    assert same(model, fresh(tensors))
    forbid_loading(model, monkeypatch)
    sync(model, renamed.items(), plan)


@pytest.mark.parametrize("left_out", ["gate", "1.w3", "2.w2"])
def test_what_never_came_is_named_and_the_next_sync_goes_by_the_loader(left_out: str) -> None:
    model, plan = processed(HIDDEN, INTERMEDIATE), Plan()
    tensors = checkpoint(HIDDEN, INTERMEDIATE, 0)
    sync(model, tensors.items(), plan)
    with pytest.raises(WeightSyncError, match=rf"1 parameters missing from the stream: {left_out}\."):
        sync(model, [(name, tensor) for name, tensor in tensors.items() if name != left_out], plan)
    assert not plan.routes
    sync(model, tensors.items(), plan)
    assert plan.replayable


def test_a_place_that_is_written_twice_by_two_names_is_an_error() -> None:
    model, plan = processed(HIDDEN, INTERMEDIATE), Plan()
    tensors = checkpoint(HIDDEN, INTERMEDIATE, 0)
    sync(model, tensors.items(), plan)
    with pytest.raises(WeightSyncError, match=r"sent more than once: 01\.w1 \(the place of 1\.w1\)"):
        sync(model, [*tensors.items(), ("01.w1", tensors["1.w1"])], plan)


def test_all_that_is_wrong_is_in_one_error() -> None:
    model, plan = processed(HIDDEN, INTERMEDIATE), Plan()
    tensors = checkpoint(HIDDEN, INTERMEDIATE, 0)
    sync(model, tensors.items(), plan)
    wrong = dict(tensors)
    del wrong["2.w2"]
    wrong["0.w1"] = torch.ones(INTERMEDIATE + 1, HIDDEN)
    wrong["7.w9"] = torch.ones(3)
    wrong["1.w3"] = torch.full((INTERMEDIATE, HIDDEN), float("nan"))
    with pytest.raises(WeightSyncError) as failure:
        sync(model, [*wrong.items(), ("gate", tensors["gate"])], plan)
    said = str(failure.value)
    assert "missing from the stream: 2.w2" in said
    assert "sent more than once: gate" in said
    assert f"0.w1 (came as torch.float32 of shape ({INTERMEDIATE + 1}, {HIDDEN}) instead of" in said
    assert "7.w9 (came as torch.float32 of shape (3,): " in said
    assert "holding NaN or Inf: 1.w3" in said


def test_the_same_holds_for_the_first_sync() -> None:
    model = processed(HIDDEN, INTERMEDIATE)
    wrong = dict(checkpoint(HIDDEN, INTERMEDIATE, 0))
    del wrong["2.w2"]
    wrong["0.w1"] = torch.ones(INTERMEDIATE + 1, HIDDEN)
    wrong["x.w9"] = torch.ones(3)
    wrong["1.w3"] = torch.full((INTERMEDIATE, HIDDEN), float("nan"))
    with pytest.raises(WeightSyncError) as failure:
        sync(model, [*wrong.items(), ("gate", wrong["gate"])], Plan())
    said = str(failure.value)
    for part in ("experts.w2_weight", "sent more than once: gate", "0.w1 (", "x.w9 (", "NaN or Inf: 1.w3"):
        assert part in said


class CastingModel(Model):
    """A model whose loader does more than copy."""

    def load_weights(self, weights: Any) -> set[str]:
        return super().load_weights((name, tensor * 1) for name, tensor in weights)


def test_a_loader_that_does_more_than_copy_is_asked_every_time(caplog: pytest.LogCaptureFixture) -> None:
    model, plan = CastingModel(HIDDEN, INTERMEDIATE), Plan()
    layout.watch(model)
    for layer in (model.experts, model.gate):
        layer.quant_method.process_weights_after_loading(layer)
    with caplog.at_level(logging.INFO, logger="verl_ascend_rollout.worker"):
        for seed in (0, 1):
            tensors = checkpoint(HIDDEN, INTERMEDIATE, seed)
            sync(model, tensors.items(), plan)
            assert not plan.replayable
            assert same(model, fresh(tensors))
    assert sum("goes through the model's own loader" in line for line in caplog.messages) == 1


def test_a_copy_that_did_not_happen_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = processed(HIDDEN, INTERMEDIATE), Plan()
    tensors = checkpoint(HIDDEN, INTERMEDIATE, 0)
    sync(model, tensors.items(), plan)
    original = torch._foreach_copy_

    def all_but_the_first(destinations: Any, sources: Any) -> None:
        original(destinations[1:], sources[1:])

    monkeypatch.setattr(torch, "_foreach_copy_", all_but_the_first)
    changed = checkpoint(HIDDEN, INTERMEDIATE, 1)
    sync(model, changed.items(), plan)
    with pytest.raises(WeightSyncError, match="1 parameters not in the model as they came: gate"):
        sync(model, checkpoint(HIDDEN, INTERMEDIATE, 2).items(), plan, compare=True)


# --------------------------------------------------------------------------------------------------------------------
# layers that are rebuilt


def reverse(layer: Any) -> None:
    """A processing whose result is no view of the checkpoint's form, and which leaves an emptied parameter behind."""
    for name in ("w13_weight", "w2_weight"):
        setattr(layer, f"packed_{name}", getattr(layer, name).data.flatten().flip(0).clone())
        setattr(layer, name, torch.nn.Parameter(torch.empty(0), requires_grad=False))


def test_repacked_layers_are_rebuilt_from_every_sync_and_nothing_stays_staged() -> None:
    model, plan = processed(HIDDEN, INTERMEDIATE, reverse), Plan()
    for seed in (0, 1, 2):
        tensors = checkpoint(HIDDEN, INTERMEDIATE, seed)
        sync(model, tensors.items(), plan, compare=True)
        for name, shards in (("w13_weight", ("w1", "w3")), ("w2_weight", ("w2",))):
            expected = torch.stack(
                [torch.cat([tensors[f"{expert}.{shard}"] for shard in shards]) for expert in range(EXPERTS)]
            )
            assert torch.equal(getattr(model.experts, f"packed_{name}").flip(0), expected.flatten())
            assert getattr(model.experts, name).numel() == 0
    assert plan.replayable


def test_a_failed_sync_leaves_the_kernels_parameters_in_place() -> None:
    model, plan = processed(HIDDEN, INTERMEDIATE, reverse), Plan()
    tensors = checkpoint(HIDDEN, INTERMEDIATE, 0)
    sync(model, tensors.items(), plan)
    with pytest.raises(WeightSyncError, match=r"missing from the stream: 0\.w1"):
        sync(model, list(tensors.items())[2:], plan)
    assert model.experts.w13_weight.numel() == 0
    sync(model, tensors.items(), plan)
    assert torch.equal(model.experts.packed_w2_weight.flip(0)[: HIDDEN * INTERMEDIATE], tensors["0.w2"].flatten())


def test_without_verification_a_layer_that_never_came_keeps_what_it_had() -> None:
    model, plan = processed(HIDDEN, INTERMEDIATE, reverse), Plan()
    sync(model, checkpoint(HIDDEN, INTERMEDIATE, 0).items(), plan)
    before = model.experts.packed_w2_weight.clone()
    for fresh_plan in (plan, Plan()):
        sync(model, [("gate", checkpoint(HIDDEN, INTERMEDIATE, 1)["gate"])], fresh_plan, complete=False, finite=False)
        assert torch.equal(model.experts.packed_w2_weight, before)
        assert model.experts.w2_weight.numel() == 0


# --------------------------------------------------------------------------------------------------------------------
# experts that a CPU's kernels want in blocks


ROWS, COLUMNS = 64, 96


def pack_whole(weight: torch.Tensor, isa: str) -> torch.Tensor:
    pytest.importorskip("vllm._custom_ops", reason="vLLM's CPU build packs, and is not installed")
    packed = torch.empty_like(weight)
    torch.ops._C.prepack_moe_weight(weight, packed, isa)
    return packed


class PackedExperts(torch.nn.Module):
    """Experts as vLLM 0.28's CPU method leaves them: packed, with a kernel that knows for what."""

    def __init__(self, isa: str) -> None:
        super().__init__()
        self.w13_weight = torch.nn.Parameter(torch.randn(4, 2 * ROWS, COLUMNS).bfloat16(), requires_grad=False)
        self.w2_weight = torch.nn.Parameter(torch.randn(4, COLUMNS, ROWS).bfloat16(), requires_grad=False)
        self.quant_method: Any = Method(self.pack)
        self.isa = isa

    def pack(self, layer: Any) -> None:
        for name in ("w13_weight", "w2_weight"):
            setattr(layer, name, torch.nn.Parameter(pack_whole(getattr(layer, name).data, self.isa), False))


BLOCKS = {"vec": Blocks(16, 1), "amx": Blocks(16, 2)}


@pytest.mark.parametrize("isa", ["vec", "amx"])
def test_packed_experts_are_recognised_and_written_region_by_region(isa: str) -> None:
    layer = PackedExperts(isa)
    layout.watch(layer)
    layer.quant_method.process_weights_after_loading(layer)
    found = layout.record(layer)
    assert found is not None
    assert {name: (weight.layout, weight.blocks) for name, weight in found.weights.items()} == {
        "w13_weight": ("blocked", BLOCKS[isa]),
        "w2_weight": ("blocked", BLOCKS[isa]),
    }
    blocks = BLOCKS[isa]
    weight = torch.randn(4, 2 * ROWS, COLUMNS).bfloat16()
    regions = torch.empty_like(weight)
    for expert in range(4):
        for start in (0, ROWS):
            part = weight[expert, start : start + ROWS]
            region = Region.of(part)
            assert blocks.fits(region, tuple(weight.shape))
            blocks.region(blocks.integers(regions), region).copy_(blocks.plain(part))
    assert torch.equal(regions, pack_whole(weight, isa))
    whole = torch.empty_like(weight)
    blocks.packed(whole).copy_(blocks.plain(weight))
    assert torch.equal(whole, regions)


def test_a_part_of_a_wider_tensor_is_written_into_blocks() -> None:
    wide = torch.randn(ROWS, 2 * COLUMNS + 1).bfloat16()
    blocks = Blocks(16, 2)
    for part in (wide[:, :COLUMNS], wide[:, 1 : COLUMNS + 1], wide[:, COLUMNS : 2 * COLUMNS]):
        packed = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16)
        blocks.packed(packed).copy_(blocks.plain(part))
        assert torch.equal(packed.view(-1)[: 16 * 2].view(16, 2), part[:16, :2])
        assert torch.equal(blocks.packed(packed), blocks.packed(packed.clone()).contiguous())
        assert torch.equal(packed, pack_whole(part.contiguous()[None], "amx")[0])


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_blocks_that_cannot_be_told_apart_are_none(fill: float) -> None:
    weight = torch.full((2, ROWS, COLUMNS), fill).bfloat16()
    sample = Sample.of("w2_weight", weight)
    assert sample is not None
    assert sample.blocks_in(weight) is None


def test_experts_that_are_packed_otherwise_are_repacked() -> None:
    layer = PackedExperts("vec")

    def pack_and_shift(given: Any) -> None:
        layer.pack(given)
        given.w2_weight.data.add_(1)

    layer.quant_method.process = pack_and_shift
    layout.watch(layer)
    layer.quant_method.process_weights_after_loading(layer)
    found = layout.record(layer)
    assert found is not None
    assert {weight.layout for weight in found.weights.values()} == {"repacked"}, "a layer is rebuilt as a whole"


@pytest.mark.parametrize(
    ("region", "fits"),
    [
        (Region((ROWS, COLUMNS), (COLUMNS, 1), 0), True),
        (Region((ROWS, COLUMNS), (COLUMNS, 1), ROWS * COLUMNS), True),
        (Region((2 * ROWS, COLUMNS), (COLUMNS, 1), 2 * ROWS * COLUMNS), True),
        (Region((ROWS, COLUMNS), (COLUMNS, 1), 16 * COLUMNS), True),
        (Region((ROWS, COLUMNS), (COLUMNS, 1), 8 * COLUMNS), False),
        (Region((ROWS + 8, COLUMNS), (COLUMNS, 1), 0), False),
        (Region((2 * ROWS, COLUMNS), (COLUMNS, 1), ROWS * COLUMNS), False),
        (Region((ROWS, COLUMNS // 2), (COLUMNS, 1), 0), False),
        (Region((ROWS // 2, COLUMNS), (COLUMNS, 1), 0), True),
        (Region((4, 2 * ROWS, COLUMNS), (2 * ROWS * COLUMNS, COLUMNS, 1), 0), True),
        (Region((2, ROWS, COLUMNS), (4 * ROWS * COLUMNS, COLUMNS, 1), 0), False),
    ],
)
def test_only_whole_blocks_of_an_expert_are_written_directly(region: Region, fits: bool) -> None:
    assert Blocks(16, 2).fits(region, (4, 2 * ROWS, COLUMNS)) is fits


# --------------------------------------------------------------------------------------------------------------------
# the recorder


def test_a_tensor_in_a_bucket_is_not_mistaken_for_its_neighbour() -> None:
    bucket = torch.arange(12.0)
    first, second = bucket[:6].view(2, 3), bucket[6:].view(2, 3)
    parameter = torch.zeros(4, 3)
    recorder = Recorder({"weight": parameter})
    with recorder:
        for _, tensor in recorder.watched([("first", first), ("second", second), ("third", first)]):
            parameter[2:].copy_(second[:, :] if tensor is not first else first)
    assert recorder.routes["second"].copies[0].destination == Region((2, 3), (3, 1), 6)
    assert set(recorder.routes) == {"first", "second", "third"}
    recorder = Recorder({"weight": parameter})
    with recorder:
        for _ in recorder.watched([("first", first)]):
            parameter[:2].copy_(second)
    assert recorder.not_plain == {"first": "a copy of something made of it into weight"}


def test_asking_writes_nothing() -> None:
    parameter = torch.zeros(2, 3)
    recorder = Recorder({"weight": parameter}, write=False)
    with recorder:
        for _, tensor in recorder.watched([("name", torch.ones(3, 2))]):
            parameter.copy_(tensor.t())
    assert torch.equal(parameter, torch.zeros(2, 3))
    (copy,) = recorder.routes["name"].copies
    assert copy.source == Region((2, 3), (1, 2), 0)


def test_a_constant_written_into_memory_of_one_sync_must_be_written_again() -> None:
    kept, passing = torch.ones(4), torch.ones(4)
    from verl_ascend_rollout.worker.weights.storage import storage_of

    recorder = Recorder({"kept": kept, "passing": passing}, temporary={storage_of(passing)})
    with recorder:
        for name, _ in recorder.watched([("kept", torch.ones(2)), ("passing", torch.ones(2))]):
            {"kept": kept, "passing": passing}[name][2:].fill_(0)
    assert set(recorder.routes) == {"kept"}
    assert set(recorder.not_plain) == {"passing"}


# --------------------------------------------------------------------------------------------------------------------
# a loader that does not know that its experts lie in blocks


class BlockedModel(torch.nn.Module):
    """Experts in blocks beside a router, and a loader like vLLM's; `change` is done to each expert after its copy."""

    def __init__(self, change: Any = None) -> None:
        super().__init__()
        self.experts = torch.nn.Module()
        self.experts.w2_weight = torch.nn.Parameter(torch.randn(3, ROWS, COLUMNS).bfloat16(), requires_grad=False)
        self.experts.w2_weight.weight_loader = self.load_expert
        self.gate = torch.nn.Parameter(torch.zeros(ROWS, COLUMNS).bfloat16(), requires_grad=False)
        self.experts.quant_method = Method(self.pack)
        self.change = change

    def load_expert(self, parameter: torch.nn.Parameter, tensor: torch.Tensor, expert_id: int) -> None:
        place = parameter.data[expert_id]
        place.copy_(tensor)
        if self.change is not None:
            self.change(self, place, tensor)

    def pack(self, layer: Any) -> None:
        packed = torch.empty_like(layer.w2_weight.data)
        Blocks(16, 2).packed(packed).copy_(Blocks(16, 2).plain(layer.w2_weight.data))
        layer.w2_weight = torch.nn.Parameter(packed, requires_grad=False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        for name, tensor in weights:
            self.experts.w2_weight.weight_loader(self.experts.w2_weight, tensor, expert_id=int(name))
        return {"experts.w2_weight", "gate"}


def blocked(change: Any = None) -> Any:
    model = BlockedModel(change)
    layout.watch(model)
    model.experts.quant_method.process_weights_after_loading(model.experts)
    found = layout.record(model.experts)
    assert found is not None
    assert found.weights["w2_weight"].layout == "blocked"
    return model


def expert_tensors(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {str(expert): torch.randn(ROWS, COLUMNS, generator=generator).to(dtype) for expert in range(3)}


def packed_from(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    whole = torch.stack([tensor.bfloat16() for tensor in tensors.values()])
    packed = torch.empty_like(whole)
    Blocks(16, 2).packed(packed).copy_(Blocks(16, 2).plain(whole))
    return packed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_first_sync_already_writes_into_the_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = blocked(), Plan()
    kernel = model.experts.w2_weight
    seen: list[torch.Tensor] = []
    model.change = lambda model, place, tensor: seen.append(model.experts.w2_weight)
    sync(model, expert_tensors(1, dtype).items(), plan, compare=True)
    assert model.experts.w2_weight is kernel
    assert torch.equal(kernel, packed_from(expert_tensors(1, dtype)))
    assert not any(parameter is kernel for parameter in seen), "the loader saw the packed weight"
    assert plan.replayable
    forbid_loading(model, monkeypatch)
    sync(model, expert_tensors(2, dtype).items(), plan, compare=True)
    assert torch.equal(kernel, packed_from(expert_tensors(2, dtype)))


def _read(model: Any, place: torch.Tensor, tensor: torch.Tensor) -> None:
    assert torch.equal(place, tensor.to(place.dtype)), "the loader does not find what it wrote"


def _read_into(model: Any, place: torch.Tensor, tensor: torch.Tensor) -> None:
    assert torch.equal(torch.zeros(ROWS, COLUMNS).copy_(place), tensor.float())


def _double(model: Any, place: torch.Tensor, tensor: torch.Tensor) -> None:
    place.mul_(2)


def _foreach(model: Any, place: torch.Tensor, tensor: torch.Tensor) -> None:
    torch._foreach_mul_([place], 2)


def _a_row(model: Any, place: torch.Tensor, tensor: torch.Tensor) -> None:
    place[3].copy_(tensor[3] * 2)


def _into_out(model: Any, place: torch.Tensor, tensor: torch.Tensor) -> None:
    """Written as the keyword of an operator whose first argument is another parameter."""
    torch.add(model.gate, tensor * 2, out=place)


@pytest.mark.parametrize("change", [_read, _read_into, _double, _foreach, _a_row, _into_out])
def test_a_loader_that_does_more_than_copy_finds_what_it_expects(change: Any) -> None:
    model = blocked(change)
    kernel = model.experts.w2_weight
    tensors = expert_tensors(1)
    wanted = {name: tensor.clone() for name, tensor in tensors.items()}
    for tensor in wanted.values():
        if change in (_double, _foreach, _into_out):
            tensor.mul_(2)
        elif change is _a_row:
            tensor[3].mul_(2)
    for _ in range(2):
        sync(model, tensors.items(), Plan())
        assert model.experts.w2_weight is kernel
        assert torch.equal(kernel, packed_from(wanted))


def test_a_first_sync_that_breaks_off_leaves_the_kernels_weight_in_place() -> None:
    model, plan = blocked(), Plan()
    kernel = model.experts.w2_weight
    tensors = expert_tensors(1)
    with pytest.raises(WeightSyncError, match=r"missing from the stream: .*experts\.w2_weight; 1 parameters refused"):
        sync(model, [("0", tensors["0"]), ("1", tensors["1"][:, :5])], plan)
    assert model.experts.w2_weight is kernel
    sync(model, tensors.items(), plan)
    assert torch.equal(kernel, packed_from(tensors))


def _halves(seed: int, rows: int) -> dict[str, torch.Tensor]:
    return {
        f"{expert}{part}": half.contiguous()
        for expert, tensor in expert_tensors(seed).items()
        for part, half in (("a", tensor[:rows]), ("b", tensor[rows:]))
    }


@pytest.mark.parametrize("rows", [16, 24])
def test_experts_that_come_in_parts_are_packed_whether_or_not_a_part_is_whole_blocks(rows: int) -> None:
    model, plan = blocked(), Plan()
    kernel = model.experts.w2_weight

    def load_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        for name, tensor in weights:
            place = model.experts.w2_weight.data[int(name[0])]
            (place[:rows] if name[1] == "a" else place[rows:]).copy_(tensor)
        return {"experts.w2_weight", "gate"}

    model.load_weights = load_weights
    for seed in range(3):
        sync(model, _halves(seed, rows).items(), plan, compare=True)
        assert model.experts.w2_weight is kernel
        assert torch.equal(kernel, packed_from(expert_tensors(seed)))
        assert bool(plan.packed) is (rows == 16)


def test_a_tensor_that_comes_otherwise_finds_its_place_in_a_layer_that_is_rebuilt() -> None:
    """Where nothing has come yet, the layer has no memory when its loader is asked."""
    model, plan = processed(HIDDEN, INTERMEDIATE, reverse), Plan()
    tensors = checkpoint(HIDDEN, INTERMEDIATE, 0)
    sync(model, tensors.items(), plan)
    first, *rest = checkpoint(HIDDEN, INTERMEDIATE, 1).items()
    sync(model, [(first[0], first[1].float()), *rest], plan, compare=True)
    again = processed(HIDDEN, INTERMEDIATE, reverse)
    sync(again, checkpoint(HIDDEN, INTERMEDIATE, 1).items(), Plan())
    assert torch.equal(model.experts.packed_w2_weight, again.experts.packed_w2_weight)
    assert torch.equal(model.experts.packed_w13_weight, again.experts.packed_w13_weight)


@pytest.mark.parametrize("replayed", [True, False])
def test_without_verification_a_layer_of_which_a_parameter_is_missing_is_not_made_up(replayed: bool) -> None:
    model, plan = processed(HIDDEN, INTERMEDIATE, reverse), Plan()
    tensors = checkpoint(HIDDEN, INTERMEDIATE, 0)
    sync(model, tensors.items(), plan)
    part = [(name, tensor) for name, tensor in tensors.items() if not name.endswith("w2")]
    with pytest.raises(WeightSyncError, match=r"Nothing came for experts\.w2_weight, and the rest of that layer did"):
        sync(model, part, plan if replayed else Plan(), complete=False)
    sync(model, tensors.items(), plan)
    assert torch.equal(model.experts.packed_w2_weight.flip(0)[: HIDDEN * INTERMEDIATE], tensors["0.w2"].flatten())
