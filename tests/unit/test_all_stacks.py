"""`make all-stacks` without a run: the table of made-up summaries, what would be run, the Python that a stack wants."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
OLD, NEW = "verl0.8.0-vllm0.18", "verl0.9.1-vllm0.24"
"""A stack with an emulator and one without."""


def _load(file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(file).stem, ROOT / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


all_stacks = _load("recipes/grpo_tiny_cpu/all_stacks.py")
interpreters = _load("requirements/interpreters.py")


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(all_stacks, "OUTPUTS", tmp_path)
    return tmp_path


def _ran(outputs: Path, name: str, **changes: Any) -> None:
    summary = {
        **{"steps": 6, "reward_first": 0.1, "reward_last": 0.4, "pearson_min": 0.9997, "problem": None},
        **{"kv_bytes_freed": 2**28, "kv_bytes_restored": 2**28, "sleep_bytes_freed": None},
        **{"rollout": "ascend_safe", "set_up_seconds": 61.0, "seconds_to_first_step": 80.4, "date": "2026-01-02"},
        **{"sync_paths": "loader, 6 replay", "versions": {"python": "3.11.7"}},
    }
    (outputs / name).mkdir()
    (outputs / name / "summary.json").write_text(json.dumps(summary | changes))


def test_the_table_has_a_line_for_each_run_also_for_those_by_hand(
    outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _ran(outputs, OLD)
    _ran(outputs, f"npu-{OLD}", sleep_bytes_freed=272 * 2**20)
    nothing = dict.fromkeys(("reward_first", "reward_last", "pearson_min", "kv_bytes_freed", "kv_bytes_restored"))
    said = "RuntimeError: 64 against 128 | w2"
    _ran(outputs, f"npu-{OLD}-stock", **nothing, steps=0, rollout="vllm", sync_paths=None, problem=said)
    _ran(outputs, "something-else")
    assert all_stacks.main(["--table"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.replace(r"\|", "/").strip("|").split("|")] for line in lines]
    assert {len(row) for row in rows} == {len(all_stacks.COLUMNS)}
    assert [row[:2] for row in rows[2:]] == [[OLD, "CPU"], [OLD, "emulated NPU"], [OLD, "emulated NPU"]]
    measured = ["61", "80", "6", "0.100 to 0.400", "0.9997"]
    assert rows[2][3:] == ["ascend_safe", *measured, "256", "256", "loader, 6 replay", "2026-01-02", ""]
    assert rows[3][9:11] == ["272", "256"]
    assert rows[4][6:] == ["0", "-", "-", "-", "-", "-", "2026-01-02", said.replace("|", "/")]
    assert (outputs / "all-stacks.md").read_text().splitlines() == lines
    assert [row["device"] for row in json.loads((outputs / "all-stacks.json").read_text())] == [
        row[1] for row in rows[2:]
    ]


def test_each_run_is_makes_and_one_that_fails_is_named(
    outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []

    def run(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(words)
        return subprocess.CompletedProcess(words, 1 if "npu-demo" in words or "vllm " in words[-1] else 0)

    monkeypatch.setattr(all_stacks.subprocess, "run", run)
    assert all_stacks.main(["--only", OLD, NEW, "--control", "--steps", "7"]) == 1
    assert [words[1:4] for words in ran] == [
        *[[target, f"STACK={OLD}", "STEPS=7"] for target in ("demo", "demo", "npu-demo", "npu-demo")],
        *[["demo", f"STACK={NEW}", "STEPS=7"]] * 2,
    ]
    controls = [words[4].split()[-1] for words in ran if len(words) == 5]
    assert controls == [f"outputs/{OLD}-stock", f"outputs/npu-{OLD}-stock", f"outputs/{NEW}-stock"]
    # The control's failure is its result, and no failure of ours.
    assert f"did not train: npu-{OLD}; " in capsys.readouterr().err


def test_an_unknown_stack_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        all_stacks.main(["--only", "verl9-vllm9"])
    assert exit_.value.code == 2
    assert "verl9-vllm9" in capsys.readouterr().err


def test_a_shim_that_does_not_run_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = "3.98"  # which no machine has
    shim, real = (
        tmp_path / "shims" / f"python{version}",
        tmp_path / "versions" / f"{version}.1" / "bin" / f"python{version}",
    )
    for file, status in ((shim, 127), (real, 0)):
        file.parent.mkdir(parents=True)
        file.write_text(f"#!/bin/sh\necho {version}\nexit {status}\n")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shim.parent}{os.pathsep}/bin{os.pathsep}/usr/bin")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setenv("UV_PYTHON_INSTALL_DIR", str(tmp_path / "none"))
    assert interpreters.find(version) == real
    real.unlink()
    assert interpreters.find("3.99") is None
    assert "the stack x needs Python 3.99, which is neither" in interpreters.lacking("3.99", "the stack x")
