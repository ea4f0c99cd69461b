"""The trace of a run's events: made of events that were written as a job writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from verl_ascend_rollout import events
from verl_ascend_rollout.events import Event
from verl_ascend_rollout.tools.cli import main


def test_each_step_is_a_slice_in_its_process_and_memory_a_counter(tmp_path: Path) -> None:
    file, trace = tmp_path / "events.jsonl", tmp_path / "trace.json"
    for event in (
        Event("free", "worker", 0.5, 100, 0, 900, 800, {"rung": "sleep"}, time=10.0, pid=7, host="a"),
        Event("sync", "trainer", 2.0, time=13.0, pid=7, host="b"),
    ):
        events.emit(event, file)
    assert main(["timeline", str(file), "--out", str(trace)]) == 0
    found = json.loads(trace.read_text())["traceEvents"]
    assert [e["args"]["name"] for e in found if e["ph"] == "M"] == [
        "worker on a, process 7",
        "trainer on b, process 7",
    ]
    slices = [(e["name"], e["pid"], e["ts"], e["dur"], e["args"]) for e in found if e["ph"] == "X"]
    assert slices == [("free", 1, 9.5e6, 0.5e6, {"rung": "sleep"}), ("sync", 2, 11e6, 2e6, {})]
    counters = [(e["name"], e["ts"], e["args"]["bytes"]) for e in found if e["ph"] == "C"]
    assert counters == [
        ("memory of the step", 9.5e6, 100),
        ("memory of the step", 10e6, 0),
        ("resident", 9.5e6, 900),
        ("resident", 10e6, 800),
    ]


def test_a_trace_that_cannot_be_written_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "events.jsonl"
    events.emit(Event("free", "worker", 0.5), file)
    assert main(["timeline", str(file), "--out", str(tmp_path / "none" / "trace.json")]) == 2
    assert "trace.json cannot be written: No such file or directory" in capsys.readouterr().err
