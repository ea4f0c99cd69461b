"""Every element exactly once: regions as a sum, copies joined, and what an error names."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from verl_ascend_rollout.worker.weights.account import Account, Findings, Places, find
from verl_ascend_rollout.worker.weights.expected import Expected
from verl_ascend_rollout.worker.weights.plan import Copy, joined
from verl_ascend_rollout.worker.weights.recorder import Incoming, Recorder, used_whole
from verl_ascend_rollout.worker.weights.region import BASE, PRIME, Region, Tally, storage_of


def tally(*regions: Region) -> Tally:
    found = Tally()
    for region in regions:
        found.add(region)
    return found


@given(
    some.lists(some.tuples(some.integers(1, 5), some.integers(0, 40)), max_size=3),
    some.integers(0, 50),
)
def test_the_checksum_of_a_region_is_that_of_its_elements(axes: list[tuple[int, int]], offset: int) -> None:
    region = Region(tuple(size for size, _ in axes), tuple(stride for _, stride in axes), offset)
    positions = [
        offset + sum(index * stride for index, stride in zip(indices, region.stride, strict=True))
        for indices in itertools.product(*map(range, region.size))
    ]
    assert region.checksum == sum(pow(BASE, position, PRIME) for position in positions) % PRIME
    assert region.elements == len(positions)


@given(some.lists(some.integers(0, 7), min_size=8, max_size=8))
def test_eight_rows_are_a_whole_only_if_each_came_once(rows: list[int]) -> None:
    whole = tally(Region((8, 4), (4, 1), 0))
    assert (tally(*(Region((4,), (1,), 4 * row) for row in rows)) == whole) is (sorted(rows) == list(range(8)))


def test_padding_may_come_before_or_after_and_not_over_what_came() -> None:
    whole, above, below = Region((4,), (1,), 0), Region((2,), (1,), 0), Region((2,), (1,), 2)
    for steps, is_whole in (
        ([("copied", above), ("filled", below)], True),
        ([("filled", below), ("copied", above)], True),
        ([("filled", whole), ("copied", whole)], True),
        ([("copied", whole), ("filled", below)], False),
        ([("filled", whole), ("copied", above)], False),
        ([("copied", above), ("copied", above)], False),
    ):
        account = Account({1: tally(whole)})
        for step, region in steps:
            getattr(account, step)(1, region)
        assert account.is_whole(1) is is_whole, steps


# --------------------------------------------------------------------------------------------------------------------
# joined copies


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("order", ["kinds first", "experts first"])
def test_the_experts_of_a_layer_are_few_copies_and_the_same_bytes(ranks: int, turned: bool, order: str) -> None:
    experts, rows, columns = 6, 8, 16
    merged = torch.randn(experts, 2 * rows, columns)
    share = rows // ranks
    for rank in range(ranks):
        kernel = torch.zeros(experts, 2 * share, columns)
        target = torch.zeros(experts, columns, 2 * share).transpose(1, 2) if turned else kernel
        copies = []
        for kind, expert in itertools.product(range(2), range(experts)):
            source = merged[expert, kind * rows + rank * share : kind * rows + (rank + 1) * share]
            place = target[expert, kind * share : (kind + 1) * share]
            copies.append(Copy("w13", Region.of(place), Region.of(source)))
        if order == "experts first":
            copies = [copies[kind * experts + expert] for expert in range(experts) for kind in range(2)]
        few = joined(copies, {"w13": tuple(target.shape)}.__getitem__)
        assert len(few) <= (1 if ranks == 1 else 2 if order == "kinds first" else 2 * experts)
        for copy in few:
            assert copy.source is not None
            copy.destination.in_tensor(target).copy_(copy.source.in_tensor(merged))
        wanted = torch.cat([merged[:, :rows].chunk(ranks, 1)[rank], merged[:, rows:].chunk(ranks, 1)[rank]], dim=1)
        assert torch.equal(target, wanted)


@given(some.randoms(use_true_random=False), some.integers(1, 12))
def test_joined_copies_do_what_the_single_ones_do(chance: random.Random, count: int) -> None:
    source = torch.arange(400.0)
    rows = chance.sample(range(40), count)
    places = chance.sample(range(40), count) if chance.random() < 0.5 else rows
    copies = [
        Copy("w", Region((10,), (1,), 10 * place), Region((10,), (1,), 10 * row))
        for row, place in zip(sorted(rows), sorted(places), strict=True)
    ]
    one, other = torch.zeros(40, 10), torch.zeros(40, 10)
    for target, group in ((one, copies), (other, joined(copies, lambda name: (40, 10)))):
        for copy in group:
            assert copy.source is not None
            copy.destination.in_tensor(target).copy_(copy.source.in_tensor(source))
    assert torch.equal(one, other)


# --------------------------------------------------------------------------------------------------------------------
# whether a tensor was used whole


def used(shape: tuple[int, ...], parts: list[torch.Tensor], ranks: list[tuple[int, int]]) -> str | None:
    incoming = Incoming("name", parts[0]._base if parts and parts[0]._base is not None else torch.zeros(shape))
    for part in parts:
        incoming.copies.append(Copy("target", Region.of(part), Region.of(part)))
    return used_whole(incoming, ranks)


def test_what_no_parameter_takes_is_said() -> None:
    assert used((3,), [], [(0, 1)]) == "no parameter of this model takes it"


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_takes_its_share_of_either_axis_and_not_another_ranks(ranks: int) -> None:
    tensor = torch.zeros(8, 12)
    for axis, size in ((0, 8), (1, 12)):
        for rank in range(ranks):
            for taken in range(ranks):
                part = tensor.narrow(axis, taken * (size // ranks), size // ranks)
                assert (used((8, 12), [part], [(rank, ranks)]) is None) is (taken == rank)


def test_a_tensor_with_rows_that_no_rank_takes_is_refused_on_every_rank() -> None:
    twice = torch.zeros(16, 4)
    for rank in range(2):
        assert used((16, 4), [twice.narrow(0, rank * 4, 4)], [(rank, 2)]) is not None


def test_keys_of_fewer_heads_than_ranks_are_held_by_several() -> None:
    tensor = torch.zeros(8, 4)
    for rank in range(4):
        assert used((8, 4), [tensor.narrow(0, rank // 2 * 4, 4)], [(rank, 4)]) is None


def test_a_padded_vocabulary_leaves_the_last_rank_less() -> None:
    tensor = torch.zeros(500, 4)
    assert used((500, 4), [tensor[:256]], [(0, 2)]) is None
    assert used((500, 4), [tensor[256:]], [(1, 2)]) is None
    assert used((500, 4), [tensor[256:400]], [(1, 2)]) is not None
    # 192 rows for eight ranks, of which 160 are no padding: 24 each, 16 for the seventh, none for the last.
    small = torch.zeros(160, 4)
    for rank in range(8):
        rows = small[24 * rank : 24 * rank + 24] if rank < 7 else small.narrow(0, 160, 0)
        assert used((160, 4), [rows], [(rank, 8)]) is None
    assert used((160, 4), [small.narrow(0, 160, 0)], [(0, 8)]) is not None


def test_q_k_and_v_in_one_tensor_are_three_shares() -> None:
    tensor = torch.zeros(16 + 4 + 4, 3)  # two ranks; keys and values of one head are held by both
    complaints = []
    for rank in range(2):
        q = tensor[rank * 8 : rank * 8 + 8]
        assert used((24, 3), [q, tensor[16:20], tensor[20:24]], [(rank, 2)]) is None
        complaints.append(used((24, 3), [q, tensor[16:20]], [(rank, 2)]))
    # To the first rank its part of the keys could be half of keys for two; the sync fails where one rank refuses.
    assert any(complaint is not None for complaint in complaints)


# --------------------------------------------------------------------------------------------------------------------
# what an error names


PART = Region((4, 6, 8), (48, 8, 1), 0)


def writers(layer: int, *, but: tuple[int, str] | None = None, rows: int = 3) -> list[tuple[str, Region]]:
    return [
        (f"layers.{layer}.experts.{expert}.{kind}", Region((rows, 8), (8, 1), expert * 48 + at * 24))
        for expert in range(4)
        for at, kind in enumerate(("gate", "up"))
        if (expert, kind) != but
    ]


def found(target: str, written: dict[str, list[tuple[str, Region]]]) -> Findings:
    findings = Findings()
    mine = written.get(target, [])
    came = {name for each in written.values() for name, _ in each}
    find(target, [PART], mine, [], Expected({}, written).of(target, PART), came, set(), findings)
    return findings


@pytest.mark.parametrize("expert", range(4))
@pytest.mark.parametrize("kind", ["gate", "up"])
def test_a_missing_expert_is_named_in_the_first_sync_of_all(expert: int, kind: str) -> None:
    findings = found("layers.2.w13", {"layers.2.w13": writers(2, but=(expert, kind))})
    assert findings.missing == [f"layers.2.experts.{expert}.{kind}"]
    assert not findings.short and not findings.twice


def test_a_missing_layer_is_named_by_the_one_beside() -> None:
    findings = found("layers.2.w13", {"layers.11.w13": writers(11)})
    assert findings.missing == [name for name, _ in writers(2)]


def test_half_of_every_expert_names_every_one() -> None:
    findings = found("layers.2.w13", {"layers.2.w13": writers(2, rows=2)})
    assert list(findings.short) == [name for name, _ in writers(2)]
    assert not findings.missing


def test_half_of_one_expert_names_that_one() -> None:
    written = writers(2)
    written[5] = (written[5][0], Region((2, 8), (8, 1), written[5][1].offset))
    findings = found("layers.2.w13", {"layers.2.w13": written})
    assert list(findings.short) == [written[5][0]]


def test_what_a_loader_writes_again_of_the_same_tensor_is_no_error() -> None:
    findings = Findings()
    again = [*writers(2), (writers(2)[0][0], Region((1, 8), (8, 1), 0))]
    assert find("w13", [PART], again, [], [], set(), set(), findings)
    assert findings == Findings()


def test_what_is_made_after_a_parameter_has_gone_is_not_taken_for_it() -> None:
    """The memory of a layer goes when it is processed; a storage made next would get the same identity."""
    parameters = {f"layer.{number}.weight": torch.nn.Parameter(torch.zeros(8, 8)) for number in range(50)}
    places = Places(parameters)
    known = [storage_of(parameter) for parameter in parameters.values()]
    for parameter in parameters.values():
        parameter.data = torch.empty(0)
    made = [torch.zeros(8, 8) for _ in range(500)]
    assert places.names.keys() == set(known)
    assert not {storage_of(tensor) for tensor in made} & set(known)


# --------------------------------------------------------------------------------------------------------------------
# what a loader fills with a constant


class Clearing(torch.nn.Module):
    """A model of one weight, whose loader clears, copies the tensors that come by their rows, and pads."""

    def __init__(self, *steps: str) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4, 2), requires_grad=False)
        self.steps = steps

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for step in self.steps:
            if step == "copy":
                for name, tensor in weights:
                    self.weight.data[int(name) : int(name) + len(tensor)].copy_(tensor)
            elif step == "clear":
                self.weight.data.zero_()
            else:
                self.weight.data[int(step) :].fill_(0)


ROWS = {str(row): torch.full((1, 2), 2.0 + row) for row in range(4)}


@pytest.mark.parametrize(
    ("steps", "calls", "missing"),
    [
        (("clear", "copy"), ["0123"], []),
        (("copy", "2"), ["01"], []),
        (("clear", "copy", "2"), ["01"], []),
        (("clear", "copy"), ["013"], ["weight"]),
        (("clear", "copy"), [""], ["weight"]),
        # A loader that clears whenever it is called leaves what came with the last call.
        (("clear", "copy"), ["01", "23"], ["weight"]),
        (("clear", "copy"), ["0123", ""], ["weight"]),
        (("clear", "copy"), ["", "0123"], []),
        (("copy", "2"), ["01", "01"], []),
    ],
)
def test_what_a_loader_clears_and_does_not_copy_is_missing(
    steps: tuple[str, ...], calls: list[str], missing: list[str]
) -> None:
    model = Clearing(*steps)
    places = Places(dict(model.named_parameters()))
    account = Account(places.wanted())
    recorder = Recorder(places, account)
    for rows in calls:
        recorder.expect([Incoming(row, ROWS[row].clone()) for row in rows])
        with recorder:
            model.load_weights(recorder.stream())
    (storage,) = places.names
    findings = Findings()
    whole = account.is_whole(storage) or find(
        "weight", places.regions(storage), recorder.writers.get("weight", ()), recorder.fills, [], [], [], findings
    )
    assert whole is not bool(missing)
    assert bool(findings.missing or findings.short) is bool(missing)
