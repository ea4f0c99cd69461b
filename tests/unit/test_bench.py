"""The benches' own parts that need no engine: geometries, rows, files, and what is said of a bad command."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from verl_ascend_rollout.tools import cli
from verl_ascend_rollout.tools.arguments import UsageError
from verl_ascend_rollout.tools.bench import weights
from verl_ascend_rollout.tools.bench.table import BenchError, Column, show, write
from verl_ascend_rollout.tools.toy_model import Geometry, scaled_to


def test_the_full_geometry_is_qwen1_5_moe() -> None:
    # 14.3 billion parameters, two bytes each (the model card of Qwen1.5-MoE-A2.7B).
    assert Geometry().bytes() / 2 == pytest.approx(14.3e9, rel=0.01)
    assert sum(1 for _ in Geometry().tensors()) == 24 * (2 + 7 + 2 + 61 * 3) + 3


@pytest.mark.parametrize("size", [1 << 28, 1 << 30, 3 << 30])
def test_widths_follow_the_size_and_depth_does_not(size: int) -> None:
    geometry = scaled_to(size)
    assert (geometry.layers, geometry.experts) == (24, 60)
    assert 0.7 * size < geometry.bytes() <= size
    assert geometry.hidden % geometry.head_size == 0
    assert geometry.moe_intermediate % 64 == geometry.shared_intermediate % 64 == 0


def test_what_does_not_fit_is_said_with_the_numbers() -> None:
    with pytest.raises(BenchError, match=r"1048576\.00 GiB of weights are wanted 5 times, and .* are available"):
        weights.fitting_geometry(1 << 50, 24, 60)
    with pytest.raises(UsageError, match=r"a model of 1000 layers and 60 experts takes \d+ bytes at least"):
        weights.fitting_geometry(1 << 20, 1000, 60)


def test_by_itself_the_widths_are_real_and_the_layers_are_those_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    for memory, layers in ((16 << 30, 1), (24 << 30, 2), (1 << 40, 2)):
        monkeypatch.setattr(weights.psutil, "virtual_memory", lambda memory=memory: SimpleNamespace(available=memory))
        geometry = weights.fitting_geometry(None, None, 60)
        assert (geometry.hidden, geometry.moe_intermediate, geometry.vocabulary) == (2048, 1408, 151936)
        assert geometry.layers == layers
    assert weights.fitting_geometry(None, 24, 60) == Geometry()


def test_merged_experts_are_the_same_bytes_in_two_tensors_a_layer() -> None:
    geometry = Geometry(layers=2)
    merged = dict(geometry.tensors(merged=True))
    assert len(merged) == 2 * (2 + 7 + 2 + 3 + 2) + 3
    assert sum(math.prod(shape) for shape in merged.values()) * 2 == geometry.bytes()
    assert merged["model.layers.1.mlp.experts.gate_up_proj"] == (60, 2816, 2048)
    assert merged["model.layers.1.mlp.experts.down_proj"] == (60, 2048, 1408)


def rows() -> list[dict[str, Any]]:
    found = {
        "plain_copy": {"seconds": 0.5, "ratio": 1.0, "peak_extra_bytes": 0, "error": None},
        "verl": {"seconds": None, "ratio": None, "peak_extra_bytes": None, "error": "AttributeError: gone"},
        "ours_later": {"seconds": 0.75, "ratio": 1.4, "peak_extra_bytes": 5 << 20, "error": None},
    }
    return [weights.row(path, row, 1_000_000_000) for path, row in found.items()]


def test_rows_have_a_ratio_to_the_plain_copy() -> None:
    plain, verl, ours = rows()
    assert (plain["ratio"], plain["gb_per_second"]) == (1.0, 2.0)
    assert (verl["ratio"], verl["seconds"], verl["error"]) == (None, None, "AttributeError: gone")
    assert ours["ratio"] == 1.4, "to the copies beside it"


def test_the_files_hold_what_the_screen_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    always = weights.row("ours_later", {"seconds": 1.0, "ratio": 2.0, "peak_extra_bytes": 0, "error": None}, 10**9)
    facts = {"bytes": 10**9, "tensors": 3, "device": "cpu", "threads": 1, "verify_always": always}
    written, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    weights.report(rows(), facts, Namespace(json=str(written), plot=str(picture)))
    assert json.loads(written.read_text())["rows"] == rows()
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "AttributeError: gone" in shown
    assert "with verify: always a later sync takes 1.000 s, 2.00 x plain copy" in shown


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written: No such file"):
        write(Namespace(json=tmp_path / "no" / "rows.json", plot=None), [], {}, "title", "unit", {})
    with pytest.raises(UsageError, match="cannot be drawn"):
        write(Namespace(json=None, plot=tmp_path / "rows.nonsense"), [], {}, "title", "unit", {"a": 1.0})


def test_a_value_that_is_missing_is_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    show("title", (Column("a", "A", ".1f", 2.0), Column("b", "B")), [{"a": 1.0, "b": None}])
    assert "2.0" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_no_number_is_cut_or_broken(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    show("title", weights.COLUMNS, [{**row, "tensors": 4659, "copies": 12345} for row in rows()])
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["ours_later", "4,659", "12,345", "0.750", "1.33", "1.40", "5"] in shown
    assert ["verl", "4,659", "12,345", "-", "-", "-", "-"] in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gib", "0"], "'0' is no size in GiB"),
        (["--gib", "many"], "'many' is no size in GiB"),
        (["--layers", "0"], "'0' is no whole number of at least 1"),
        (["--repeats", "x"], "'x' is no whole number of at least 1"),
    ],
)
def test_a_bad_command_is_one_sentence_and_exit_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "weights", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "file", "said"),
    [
        ("--json", "", "cannot be written"),
        ("--json", "missing/rows.json", "cannot be written"),
        ("--plot", "missing/bars.png", "cannot be written"),
        ("--plot", "bars.xyz", "cannot be drawn: a picture's name ends in"),
    ],
)
@pytest.mark.parametrize("what", ["weights", "kv"])
def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(
    what: str, option: str, file: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """100,000 GiB fit nowhere: what is wrong with the file is said before that."""
    assert cli.main(["bench", what, "--gib", "100000", option, f"{tmp_path}/{file}"]) == 2
    assert said in capsys.readouterr().err


def test_one_file_that_cannot_be_written_does_not_cost_the_other(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--json /dev/full cannot be written: No space left"):
        write(Namespace(json="/dev/full", plot=tmp_path / "rows.svg"), [], {}, "title", "unit", {"a": 1.0})
    assert (tmp_path / "rows.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("gib", "status", "says"),
    [
        ("100000", 1, "ask for less with --gib"),  # this machine's memory
        ("0.0001", 2, "ask for fewer with --layers or --experts, or for more with --gib"),  # no machine's
    ],
)
def test_a_geometry_that_cannot_be_is_one_sentence(
    gib: str, status: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "weights", "--gib", gib]) == status
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
