"""The manifest of a weight sync: what it finds wrong, and how it says so."""

from __future__ import annotations

import pytest
import torch

from verl_ascend_rollout.worker.weights.manifest import LISTED, Manifest, WeightSyncError

GOOD = torch.ones(4, 2, dtype=torch.bfloat16)


def error_of(manifest: Manifest, missing: list[str] | None = None) -> str:
    with pytest.raises(WeightSyncError) as error:
        manifest.check(missing or [])
    return str(error.value)


def test_a_whole_model_passes_and_is_counted() -> None:
    manifest = Manifest()
    assert manifest.receive("a.weight", GOOD)
    assert manifest.receive("a.bias", torch.zeros(3, dtype=torch.float32))
    manifest.check(missing=[])
    assert manifest.names == {"a.weight": 16, "a.bias": 12}
    assert manifest.bytes == 28


def test_missing_parameters_are_an_error_that_says_what_follows() -> None:
    manifest = Manifest(sync=3)
    manifest.receive("a.weight", GOOD)
    assert error_of(manifest, ["b.weight", "c.weight"]) == (
        "Weight sync 3 (1 tensors, 16 bytes) is not the whole model: 2 parameters missing from the stream: b.weight, "
        "c.weight. The engine generates nothing until a full sync has passed"
    )


def test_a_duplicate_is_not_loaded_and_is_an_error() -> None:
    manifest = Manifest()
    assert manifest.receive("a.weight", GOOD) is True
    assert manifest.receive("a.weight", torch.zeros(100)) is False
    assert "1 parameters sent more than once: a.weight" in error_of(manifest)
    assert manifest.bytes == GOOD.nbytes


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e5m2])
def test_one_value_that_is_not_finite_is_found(bad: float, dtype: torch.dtype) -> None:
    tensor = torch.ones(1000)
    tensor[737] = bad
    manifest = Manifest()
    assert manifest.receive("good", GOOD)
    assert manifest.receive("bad", tensor.to(dtype).reshape(10, 100))
    assert "1 parameters holding NaN or Inf: bad." in error_of(manifest)


def test_fp8_that_has_no_isfinite_is_checked_too() -> None:
    manifest = Manifest()
    manifest.receive("good", torch.ones(4).to(torch.float8_e4m3fn))
    manifest.receive("bad", torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn))
    assert "1 parameters holding NaN or Inf: bad." in error_of(manifest)


def test_infinities_that_cancel_are_found() -> None:
    manifest = Manifest()
    manifest.receive("bad", torch.tensor([float("inf"), float("-inf")]))
    assert "holding NaN or Inf: bad" in error_of(manifest)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.full((1000,), 3e38),  # the sum overflows float32
        torch.full((2,), 1e300, dtype=torch.float64),  # so does each value
        torch.tensor([1, 2], dtype=torch.int64),
        torch.tensor([True]),
    ],
)
def test_what_is_finite_is_not_accused(tensor: torch.Tensor) -> None:
    manifest = Manifest()
    assert manifest.receive("good", tensor)
    manifest.check(missing=[])


def test_everything_wrong_is_in_one_error() -> None:
    manifest = Manifest()
    manifest.receive("a", GOOD)
    manifest.receive("a", GOOD)
    manifest.receive("b", torch.tensor([float("nan")]))
    message = error_of(manifest, ["c"])
    for part in ("missing from the stream: c", "sent more than once: a", "holding NaN or Inf: b"):
        assert part in message
    assert message.count("Weight sync 1") == 1
    assert "\n" not in message


@pytest.mark.parametrize(
    ("count", "more"), [(LISTED, ""), (LISTED + 1, " and 1 more"), (4659, f" and {4659 - LISTED} more")]
)
def test_a_long_list_is_cut_and_counted(count: int, more: str) -> None:
    names = [f"layers.{number}.weight" for number in range(count)]
    message = error_of(Manifest(), names)
    assert f"{count} parameters missing from the stream: layers.0.weight, " in message
    assert f"{names[LISTED - 1]}{more}. The engine" in message
    assert f"layers.{LISTED}.weight" not in message


def test_a_tensor_without_elements_is_a_shard_that_was_not_gathered() -> None:
    manifest = Manifest(finite=False)
    assert not manifest.receive("a", torch.empty((0, 8)))
    assert r"refused by the model: a (has no elements, shape (0, 8): is it a shard" in error_of(manifest)


@pytest.mark.parametrize(
    ("value", "dtype", "into"),
    [
        (70000.0, torch.bfloat16, torch.float16),
        (-70000.0, torch.float32, torch.float16),
        (3.4e38, torch.float32, torch.bfloat16),  # finite in both by exponent, and rounded up
        (1e300, torch.float64, torch.float32),
    ],
)
def test_a_value_that_its_parameter_cannot_hold_is_found(value: float, dtype: torch.dtype, into: torch.dtype) -> None:
    manifest = Manifest()
    tensor = torch.tensor([0.0, value], dtype=dtype)
    manifest.receive("a", tensor)
    manifest.look_after_cast("a", tensor, into)
    assert f"Inf after the cast: a ({dtype} cast to {into})" in error_of(manifest)


@pytest.mark.parametrize(
    ("dtype", "into"), [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.int64, torch.bfloat16)]
)
def test_a_value_that_its_parameter_can_hold_is_not_accused(dtype: torch.dtype, into: torch.dtype) -> None:
    manifest = Manifest()
    manifest.look_after_cast("a", torch.tensor([60000]).to(dtype), into)
    manifest.check()


def test_values_are_not_looked_at_where_that_is_not_checked() -> None:
    manifest = Manifest(finite=False)
    assert manifest.receive("bad", torch.tensor([float("nan")]))
    manifest.check(missing=[])
    assert "holding" not in error_of(manifest, ["b"])
