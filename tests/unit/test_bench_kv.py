"""`ascend-safe bench kv` without an engine: what it refuses, what it asks for, and what it makes of samples."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from verl_ascend_rollout.tools.bench import kv
from verl_ascend_rollout.tools.cli import main


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_PLATFORM", "cpu")


def measured(sleep_mode: bool, *rungs: str) -> dict[str, Any]:
    """An engine's samples: the floor takes 10 and 20, then each method 1 more for free and twice as long for init."""
    samples = []
    for number in range(3):
        for place, rung in enumerate([kv.FLOOR, *rungs]):
            for step, seconds in (("free", 0.010 + 0.001 * place), ("init", 0.020 * (1 + place))):
                late = 0.5 if number == 2 else 0.0  # one slow sample changes no median
                samples.append({"rung": rung, "step": step, "seconds": seconds + late, "bytes": 64, "system_bytes": 63})
    return {
        "rungs": [kv.FLOOR, *rungs], "chosen": rungs[0], "obstacles": ["sleep: the engine runs without sleep mode"],
        "kv_bytes": 64, "samples": samples, "sleep_mode": sleep_mode,
    }  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the engine's process is asked for, with its model's configuration."""
    found: list[dict[str, Any]] = []

    def engine(folder: str, specification: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
        config = json.loads((Path(specification["model"]) / "config.json").read_text())
        found.append({**specification, "config": config})
        return measured(specification["sleep_mode"], "reallocate")

    monkeypatch.setattr(kv, "_engine", engine)
    return found


def test_the_engine_is_asked_for_what_the_command_line_says(asked: list[dict[str, Any]]) -> None:
    assert main(["bench", "kv", "--gib", "0.25"]) == 0
    (engine,) = asked
    assert engine["config"]["num_hidden_layers"] == 4 and engine["config"]["num_key_value_heads"] == 2
    assert (engine["bytes"], engine["repeats"], engine["sleep_mode"]) == (2**28, 9, False)


def test_rows_go_to_the_screen_and_to_json_with_their_ratio_to_the_floor(
    asked: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "kv.json"
    assert main(["bench", "kv", "--json", str(file), "--plot", str(tmp_path / "kv.svg")]) == 0
    written = json.loads(file.read_text())
    rows = {(row["rung"], row["step"]): row for row in written["rows"]}
    assert set(rows) == {(rung, step) for rung in ("floor", "reallocate") for step in ("free", "init")}
    assert rows["reallocate", "free"]["seconds"] == pytest.approx(0.011)
    assert rows["reallocate", "free"]["ratio_to_floor"] == pytest.approx(1.1)
    assert rows["reallocate", "init"]["ratio_to_floor"] == pytest.approx(2.0)
    assert rows["floor", "init"]["ratio_to_floor"] == 1.0
    assert rows["reallocate", "init"]["slowest_seconds"] == pytest.approx(0.54)
    assert written["chosen"] == "reallocate" and written["platform"] == "cpu"
    out = capsys.readouterr().out
    assert "chosen here: reallocate" in out and "not here: sleep: the engine runs without sleep mode" in out
    assert (tmp_path / "kv.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("options", "status", "sentence"),
    [
        (["--model", "/nowhere"], 2, "/nowhere has no config.json"),
        (["--model", "{broken}"], 2, "config.json cannot be read as a model's configuration"),
        (["--gib", "0"], 2, "'0' is no size in GiB"),
        (["--repeats", "0"], 2, "'0' is no whole number"),
        (["--json", "/dev/null/kv.json"], 2, "/dev/null/kv.json cannot be written"),
        (["--model", "{broken}", "--json", "{broken}/config.json"], 2, "config.json, which is read: name another file"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    asked: list[dict[str, Any]],
    options: list[str],
    status: int,
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.json").write_text("[]")
    assert main(["bench", "kv", *(option.format(broken=tmp_path) for option in options)]) == status
    assert sentence in capsys.readouterr().err


def test_an_engine_that_does_not_start_is_said_with_its_last_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'ValueError: no such device' >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    assert main(["bench", "kv"]) == 1
    assert "ValueError: no such device" in capsys.readouterr().err
