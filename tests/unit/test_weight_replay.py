"""Later syncs repeat the first: on plain torch layers with the loaders that vLLM's models have, without an engine."""

from __future__ import annotations

import logging
import types
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from test_weight_layouts import EXPERTS, Method, Model, checkpoint, load_expert, processed

from verl_ascend_rollout.worker.weights import layout, replay
from verl_ascend_rollout.worker.weights import sync as weight_sync
from verl_ascend_rollout.worker.weights.account import Account, Places
from verl_ascend_rollout.worker.weights.cpu import block_copy, packed_experts
from verl_ascend_rollout.worker.weights.cpu.packed_experts import PackedLayout, Sample
from verl_ascend_rollout.worker.weights.manifest import Manifest, WeightSyncError
from verl_ascend_rollout.worker.weights.plan import Plan, Route
from verl_ascend_rollout.worker.weights.recorder import Incoming, Recorder
from verl_ascend_rollout.worker.weights.region import Region, storage_of

CONFIG = types.SimpleNamespace(dtype=torch.bfloat16)
HIDDEN, INTERMEDIATE = 8, 6


def sync(model: torch.nn.Module, tensors: Iterable[tuple[str, torch.Tensor]], plan: Plan, **options: Any) -> Manifest:
    manifest = Manifest(**options)
    with weight_sync.reload(model, CONFIG, manifest, plan) as load:
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
    for part in ("missing from the stream: 2.w2", "sent more than once: gate", "0.w1 (", "x.w9 (", "NaN or Inf: 1.w3"):
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


@pytest.mark.parametrize("form", [(3, 8, 1), (8, 3), (24,), (1, 3, 8)])
def test_a_route_is_taken_by_the_shape_that_it_was_written_down_for(form: tuple[int, ...]) -> None:
    route = Route((3, 8), torch.bfloat16, ())
    assert route.takes(torch.zeros(3, 8, dtype=torch.bfloat16))
    assert not route.takes(torch.zeros(form, dtype=torch.bfloat16))
    assert not route.takes(torch.zeros(3, 8, dtype=torch.float16))


def test_a_transposed_tensor_of_as_many_elements_is_refused_in_both_passes() -> None:
    model, plan = processed(HIDDEN, INTERMEDIATE), Plan()
    tensors = checkpoint(HIDDEN, INTERMEDIATE, 0)
    turned = {**tensors, "1.w1": tensors["1.w1"].t().contiguous(), "gate": tensors["gate"].t().contiguous()}
    for _ in range(2):
        with pytest.raises(WeightSyncError, match=r"1\.w1 \(") as failure:
            sync(model, turned.items(), plan)
        assert "gate (" in str(failure.value)
        sync(model, tensors.items(), plan)


def test_a_plan_with_anything_that_is_no_copy_is_not_replayable() -> None:
    route = Route((1,), torch.float32, ())
    assert Plan({"a": route}).replayable
    assert not Plan({"a": route}, not_plain={"b": "more than a copy"}).replayable
    assert not Plan({}).replayable


class Collecting(Model):
    """A loader that takes the whole stream before it writes anything, as vLLM's Granite-MoE does."""

    def load_weights(self, weights: Any) -> set[str]:
        return super().load_weights(dict(weights).items())


@pytest.mark.parametrize("bucket", [1, 3, 100])
def test_a_loader_that_collects_first_is_right_in_every_sync(bucket: int) -> None:
    model, plan = Collecting(HIDDEN, INTERMEDIATE), Plan()
    layout.watch(model)
    for layer in (model.experts, model.gate):
        layer.quant_method.process_weights_after_loading(layer)
    for seed in range(4):
        tensors = list(checkpoint(HIDDEN, INTERMEDIATE, seed).items())
        with weight_sync.reload(model, CONFIG, Manifest(compare=True), plan) as load:
            for first in range(0, len(tensors), bucket):
                load(tensors[first : first + bucket])
        assert same(model, fresh(dict(tensors)))
        assert plan.replayable
    wrong = {**dict(tensors), "1.w1": torch.ones(INTERMEDIATE + 1, HIDDEN), "2.w2": torch.ones(3)}
    plan.forget()
    with pytest.raises(WeightSyncError, match=r"1\.w1 \(") as failure:
        sync(model, wrong.items(), plan)
    assert "2.w2 (" in str(failure.value)


class Foreign(Model):
    """A rank of two that has the first of three experts; `_map_...` as vLLM's layer has it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for parameter in self.experts.parameters():
            parameter.weight_loader = self.load_own

    def _map_global_expert_id_to_local_expert_id(self, expert_id: int) -> int:
        return expert_id if expert_id < EXPERTS else -1

    def load_own(self, param: Any, loaded_weight: Any, weight_name: str, shard_id: str, expert_id: int) -> None:
        local = self._map_global_expert_id_to_local_expert_id(expert_id)
        if local != -1:
            load_expert(param, loaded_weight, weight_name, shard_id, local)

    def load_weights(self, weights: Any) -> set[str]:
        # There are twice as many, and the others belong to the other rank.
        return super().load_weights(pair for pair in weights if pair[0] == "gate" or int(pair[0][0]) < 2 * EXPERTS)


def of_both_ranks(seed: int) -> dict[str, torch.Tensor]:
    mine, others = checkpoint(HIDDEN, INTERMEDIATE, seed), checkpoint(HIDDEN, INTERMEDIATE, seed + 100)
    return {**mine, **{f"{int(n[0]) + EXPERTS}{n[1:]}": t for n, t in others.items() if n != "gate"}}


def test_another_ranks_experts_are_neither_counted_nor_refused_and_nobodys_are() -> None:
    model, plan = Foreign(HIDDEN, INTERMEDIATE), Plan()
    layout.watch(model)
    for layer in (model.experts, model.gate):
        layer.quant_method.process_weights_after_loading(layer)
    for seed in range(3):
        sync(model, of_both_ranks(seed).items(), plan, compare=True)
        assert same(model, fresh(checkpoint(HIDDEN, INTERMEDIATE, seed)))
    for replayed in (True, False):
        for lost in ("1.w3", "0.w2"):
            if not replayed:
                plan.forget()
            tensors = of_both_ranks(1)
            del tensors[lost]
            with pytest.raises(WeightSyncError, match=f"1 parameters missing from the stream: {lost}\\."):
                sync(model, tensors.items(), plan)
            sync(model, of_both_ranks(0).items(), plan)
        if not replayed:
            plan.forget()
        with pytest.raises(WeightSyncError, match=r"7\.w1 \(.*no parameter of this model takes it"):
            sync(model, [*of_both_ranks(1).items(), ("7.w1", torch.ones(INTERMEDIATE, HIDDEN))], plan)
        sync(model, of_both_ranks(0).items(), plan)


# --------------------------------------------------------------------------------------------------------------------
# layers that are rebuilt


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("last", ["0.w1", "1.w3", "2.w2"])
def test_a_layer_is_rebuilt_once_and_not_before_its_last_element(replayed: bool, last: str) -> None:
    model, plan = processed(HIDDEN, INTERMEDIATE, reverse), Plan()
    if replayed:
        sync(model, checkpoint(HIDDEN, INTERMEDIATE, 0).items(), plan)
    rebuilt: list[str] = []
    process = model.experts.quant_method.process_weights_after_loading
    model.experts.quant_method.process_weights_after_loading = lambda layer: (rebuilt.append(name), process(layer))
    tensors = checkpoint(HIDDEN, INTERMEDIATE, 1)
    order = [*(name for name in tensors if name != last), last]
    with weight_sync.reload(model, CONFIG, Manifest(), plan) as load:
        for name in order:
            load([(name, tensors[name])])
    assert rebuilt == [last]


def test_a_tensor_for_a_layer_that_was_rebuilt_is_named() -> None:
    model, plan = blocked(), Plan()
    tensors = expert_tensors(1)
    with (
        pytest.raises(WeightSyncError, match=r"sent more than once: .*experts\.w2_weight was whole"),
        weight_sync.reload(model, CONFIG, Manifest(), plan) as load,
    ):
        load(tensors.items())
        load([("02", tensors["2"])])
    assert not plan.routes


@pytest.mark.parametrize("replayed", [False, True])
def test_what_did_not_reach_its_block_is_seen(replayed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = blocked(), Plan()
    if replayed:
        sync(model, expert_tensors(1).items(), plan)
    copy, module = block_copy.copy_into_blocks, replay if replayed else packed_experts
    monkeypatch.setattr(module, "copy_into_blocks", lambda to, of: copy(to[1:], of[1:]) if len(to) > 1 else None)
    with pytest.raises(WeightSyncError, match="not in the model as they came: 0"):
        sync(model, expert_tensors(2).items(), plan, compare=True)


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


def test_a_layer_of_which_nothing_came_is_an_error_whether_or_not_values_are_looked_at() -> None:
    model, plan = processed(HIDDEN, INTERMEDIATE, reverse), Plan()
    sync(model, checkpoint(HIDDEN, INTERMEDIATE, 0).items(), plan)
    before = model.experts.packed_w2_weight.clone()
    for fresh_plan in (plan, Plan()):
        with pytest.raises(WeightSyncError, match="missing from the stream"):
            sync(model, [("gate", checkpoint(HIDDEN, INTERMEDIATE, 1)["gate"])], fresh_plan, finite=False)
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


BLOCKS = {"vec": PackedLayout(16, 1), "amx": PackedLayout(16, 2)}


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
    blocks = PackedLayout(16, 2)
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
    assert PackedLayout(16, 2).fits(region, (4, 2 * ROWS, COLUMNS)) is fits


# --------------------------------------------------------------------------------------------------------------------
# the recorder


def watched(recorder: Recorder, tensors: dict[str, torch.Tensor]) -> dict[str, Incoming]:
    incoming = {name: Incoming(name, tensor) for name, tensor in tensors.items()}
    recorder.expect(incoming.values())
    return incoming


def test_a_tensor_in_a_bucket_is_not_mistaken_for_its_neighbour() -> None:
    bucket = torch.arange(12.0)
    first, second = bucket[:6].view(2, 3), bucket[6:].view(2, 3)
    parameter = torch.zeros(4, 3)
    recorder = Recorder(Places({"weight": parameter}))
    incoming = watched(recorder, {"first": first, "second": second})
    with recorder:
        for name, _ in recorder.stream():
            # The other one than the loader has just taken.
            parameter[2:].copy_(second) if name == "first" else parameter[:2].copy_(first)
    assert [copy.destination for copy in incoming["second"].copies] == [Region((2, 3), (3, 1), 6)]
    assert [copy.destination for copy in incoming["first"].copies] == [Region((2, 3), (3, 1), 0)]
    assert not recorder.not_plain


def test_what_a_loader_writes_after_it_has_taken_everything_is_traced() -> None:
    parameter = torch.zeros(4, 3)
    recorder = Recorder(Places({"weight": parameter}))
    incoming = watched(recorder, {"first": torch.ones(2, 3), "second": torch.ones(2, 3)})
    with recorder:
        collected = dict(recorder.stream())
        parameter[:2].copy_(collected["second"])
        parameter[2:].copy_(collected["first"] * 2)
    assert [copy.destination for copy in incoming["second"].copies] == [Region((2, 3), (3, 1), 0)]
    assert recorder.not_plain == {"first": "a copy of something made of it into weight"}
    assert not recorder.unexplained


def test_a_write_that_no_tensor_explains_is_counted_and_never_repeated() -> None:
    parameter = torch.zeros(4, 3)
    places = Places({"weight": parameter})
    account = Account(places.wanted())
    recorder = Recorder(places, account)
    watched(recorder, {"first": torch.ones(2, 3)})
    with recorder:
        dict(recorder.stream())
        parameter.copy_(torch.full((4, 3), 2.0))
    assert recorder.unexplained
    assert recorder.not_plain
    assert account.is_whole(storage_of(parameter))


def test_one_element_that_a_loader_reads_and_fills_in_is_a_copy() -> None:
    """vLLM's default_weight_loader does so; a later sync must bring the new value."""
    scale, other = torch.zeros(1), torch.zeros(2)
    recorder = Recorder(Places({"scale": scale, "other": other}))
    incoming = watched(recorder, {"scale": torch.tensor(3.0), "other": torch.ones(2)})
    with recorder:
        for name, tensor in recorder.stream():
            scale.fill_(tensor.item()) if name == "scale" else other.copy_(tensor)
    (copy,) = incoming["scale"].copies
    assert copy.source is not None
    assert copy.source.in_tensor(torch.tensor(5.0)).shape == scale.shape
    assert torch.equal(scale, torch.tensor([3.0]))
    assert not recorder.fills


def test_a_tensor_that_a_loader_changes_before_it_copies_it_is_not_plain() -> None:
    parameter = torch.zeros(3)
    recorder = Recorder(Places({"weight": parameter}))
    watched(recorder, {"weight": torch.ones(3)})
    with recorder:
        for _, tensor in recorder.stream():
            parameter.copy_(tensor.add_(1))
    assert "add_" in recorder.not_plain["weight"]


def test_asking_writes_nothing() -> None:
    parameter = torch.zeros(2, 3)
    recorder = Recorder(Places({"weight": parameter}), write=False)
    incoming = watched(recorder, {"name": torch.ones(3, 2)})
    with recorder:
        for _, tensor in recorder.stream():
            parameter.copy_(tensor.t())
    assert torch.equal(parameter, torch.zeros(2, 3))
    (copy,) = incoming["name"].copies
    assert copy.source == Region((2, 3), (1, 2), 0)


# --------------------------------------------------------------------------------------------------------------------
# a loader that does not know that its experts lie in blocks


class BlockedModel(torch.nn.Module):
    """Experts in blocks, and a loader like vLLM's; `change` is done to each expert after its copy."""

    def __init__(self, change: Any = None) -> None:
        super().__init__()
        self.experts = torch.nn.Module()
        self.experts.w2_weight = torch.nn.Parameter(torch.randn(3, ROWS, COLUMNS).bfloat16(), requires_grad=False)
        self.experts.w2_weight.weight_loader = self.load_expert
        self.experts.quant_method = Method(self.pack)
        self.change = change

    def load_expert(self, parameter: torch.nn.Parameter, tensor: torch.Tensor, expert_id: int) -> None:
        place = parameter.data[expert_id]
        place.copy_(tensor)
        if self.change is not None:
            self.change(self, place, tensor)

    def pack(self, layer: Any) -> None:
        packed = torch.empty_like(layer.w2_weight.data)
        PackedLayout(16, 2).packed(packed).copy_(PackedLayout(16, 2).plain(layer.w2_weight.data))
        layer.w2_weight = torch.nn.Parameter(packed, requires_grad=False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        for name, tensor in weights:
            self.experts.w2_weight.weight_loader(self.experts.w2_weight, tensor, expert_id=int(name))
        return {"experts.w2_weight"}


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
    PackedLayout(16, 2).packed(packed).copy_(PackedLayout(16, 2).plain(whole))
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
    """Written as the keyword of an operator."""
    torch.add(torch.zeros(ROWS, COLUMNS).bfloat16(), tensor * 2, out=place)


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
    with pytest.raises(WeightSyncError, match=r"missing from the stream: 2; 1 parameters refused by the model: 1 \("):
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
        return {"experts.w2_weight"}

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
def test_a_layer_of_which_a_parameter_is_missing_is_not_made_up(replayed: bool) -> None:
    model, plan = processed(HIDDEN, INTERMEDIATE, reverse), Plan()
    tensors = checkpoint(HIDDEN, INTERMEDIATE, 0)
    sync(model, tensors.items(), plan)
    part = [(name, tensor) for name, tensor in tensors.items() if not name.endswith("w2")]
    with pytest.raises(
        WeightSyncError, match="missing from the stream: " + ("0.w2, 1.w2" if replayed else "experts.w2")
    ):
        sync(model, part, plan if replayed else Plan(), finite=False)
    sync(model, tensors.items(), plan)
    assert torch.equal(model.experts.packed_w2_weight.flip(0)[: HIDDEN * INTERMEDIATE], tensors["0.w2"].flatten())
