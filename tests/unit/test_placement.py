"""Where elements of a weight lie in its kernel is known from the first load, and seen in every later one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from verl_ascend_rollout.worker.weights.placement import Placement, Probe

Form = Callable[[torch.Tensor], torch.Tensor]

EXPERTS, ROWS, COLUMNS = 5, 64, 48
ORDER = torch.randperm(ROWS, generator=torch.Generator().manual_seed(3))

FORMS: dict[str, Form] = {
    "as it was": lambda weight: weight.clone(),
    "blocked in four dimensions": lambda weight: weight[:, ORDER].reshape(EXPERTS, ROWS, 3, 16).permute(0, 2, 1, 3),
    "halves swapped": lambda weight: weight.reshape(EXPERTS, 2, ROWS // 2, COLUMNS).flip(1).reshape(weight.shape),
    "in pairs of columns": lambda weight: weight.reshape(EXPERTS, 4, 16, 24, 2).transpose(2, 3).reshape(weight.shape),
    "padded": lambda weight: torch.nn.functional.pad(weight, (0, 16, 0, 64)),
    "turned": lambda weight: weight.transpose(1, 2),
    "turned, in memory of its own": lambda weight: weight.transpose(1, 2).contiguous(),
}


def weight(seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(EXPERTS, ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)).to(dtype)


def found(form: Form, dtype: torch.dtype = torch.bfloat16) -> Placement:
    first = weight(0, dtype)
    probe = Probe.of(first)
    placement = probe.find_in(form(first)) if probe is not None else None
    assert placement is not None
    return placement


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", FORMS)
def test_other_values_in_the_same_form_are_at_their_places(name: str, dtype: torch.dtype) -> None:
    placement = found(FORMS[name], dtype)
    for seed in (1, 2, 3):
        later = weight(seed, dtype)
        assert placement.holds(placement.probe(later), FORMS[name](later))


@pytest.mark.parametrize("other", FORMS)
@pytest.mark.parametrize("name", FORMS)
def test_any_other_form_is_seen(name: str, other: str) -> None:
    placement, later = found(FORMS[name]), weight(1)
    same = torch.equal(FORMS[name](later), FORMS[other](later)) if name.startswith(other[:6]) else name == other
    assert placement.holds(placement.probe(later), FORMS[other](later)) is same


def test_old_values_in_the_right_form_are_seen() -> None:
    form = FORMS["blocked in four dimensions"]
    placement = found(form)
    assert not placement.holds(placement.probe(weight(1)), form(weight(0)))


def test_rows_in_another_order_are_seen() -> None:
    placement, later = found(FORMS["blocked in four dimensions"]), weight(1)
    other = later[:, ORDER.flip(0)].reshape(EXPERTS, ROWS, 3, 16).permute(0, 2, 1, 3)
    assert not placement.holds(placement.probe(later), other)


@pytest.mark.parametrize(
    ("layout", "form"), [("identity", FORMS["as it was"]), ("transposed", lambda weight: weight.transpose(-1, -2))]
)
@pytest.mark.parametrize("shape", [(7,), (6, 9), (4, 6, 9), (2, 3, 4, 5)])
def test_the_placement_of_a_view_needs_no_search(layout: str, form: Form, shape: tuple[int, ...]) -> None:
    if layout == "transposed" and len(shape) == 1:
        return  # it has no two axes
    placement = Placement.of_view(shape, layout)
    assert placement is not None
    later = torch.randn(shape)
    assert placement.holds(placement.probe(later), form(later))
    assert not placement.holds(placement.probe(later), form(torch.randn(shape)))


@pytest.mark.parametrize("layout", ["repacked", "blocked", "unknown"])
def test_other_layouts_are_no_views(layout: str) -> None:
    assert Placement.of_view((4, 4), layout) is None


def test_what_cannot_be_found_has_no_placement() -> None:
    probe = Probe.of(weight(0))
    assert probe is not None
    for kernel in (None, torch.empty(0), weight(1), weight(0).float(), weight(0)[:1]):
        assert probe.find_in(kernel) is None


def test_an_empty_weight_and_one_of_integers_have_no_probe() -> None:
    assert Probe.of(torch.empty(0)) is None
    assert Probe.of(torch.ones(4, dtype=torch.int8)) is None


def test_looking_draws_no_random_number_of_the_engines() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    found(FORMS["padded"])
    assert torch.equal(torch.rand(3), expected)
