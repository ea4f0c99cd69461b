"""The file of lifecycle events, which several processes write at once and a killed one may tear."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from verl_ascend_rollout import events
from verl_ascend_rollout.events import EVENTS_VARIABLE, Event, EventsError


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(EVENTS_VARIABLE, raising=False)


def test_an_event_comes_back_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    written = Event(
        step="free",
        process="worker",
        seconds=0.25,
        bytes_before=1 << 30,
        bytes_after=0,
        rss_before=2 << 30,
        rss_after=1 << 30,
        detail={"rung": "direct", "reason": 'a "quoted"\nreason, in Grüße'},
    )
    before = time.time()
    events.emit(written, file)
    (read,) = events.read(file)
    assert Event(**read) == written
    assert read["pid"] == os.getpid()
    assert before - 60 < read["time"] <= time.time()


def test_what_json_does_not_know_is_written_as_text(tmp_path: Path) -> None:
    events.emit(Event(step="decide", process="server", seconds=0, detail={"where": tmp_path}), tmp_path / "events")
    (read,) = events.read(tmp_path / "events")
    assert read["detail"] == {"where": str(tmp_path)}


def test_without_a_file_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    events.emit(Event(step="free", process="worker", seconds=0))
    events.emit(Event(step="free", process="worker", seconds=0), None)
    assert list(tmp_path.iterdir()) == []


def test_the_variable_names_the_file_and_an_argument_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_variable, by_argument = tmp_path / "variable", tmp_path / "argument"
    monkeypatch.setenv(EVENTS_VARIABLE, str(by_variable))
    events.emit(Event(step="first", process="worker", seconds=0))
    events.emit(Event(step="second", process="worker", seconds=0), by_argument)
    assert [event["step"] for event in events.read(by_variable)] == ["first"]
    assert [event["step"] for event in events.read(by_argument)] == ["second"]


@pytest.mark.parametrize("name", ["missing/events.jsonl", "."])
def test_a_file_that_cannot_be_written_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=name if name != "." else "directory"):
        events.emit(Event(step="free", process="worker", seconds=0), tmp_path / name)


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    for step in ("free", "init"):
        events.emit(Event(step=step, process="worker", seconds=0), file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    assert [event["step"] for event in events.read(file)] == ["free"]


def test_each_line_has_the_version_of_its_layout(tmp_path: Path) -> None:
    events.emit(Event(step="free", process="worker", seconds=0), tmp_path / "events")
    assert json.loads((tmp_path / "events").read_text())["schema"] == events.SCHEMA == "1.0"


@pytest.mark.parametrize("written", ["1.0", "1.7", None])
def test_a_layout_of_the_same_major_version_is_read(tmp_path: Path, written: str | None) -> None:
    file = tmp_path / "events"
    line = {"step": "free", "process": "worker", "seconds": 0, "time": 1.0, "new_field": 1}
    file.write_text(json.dumps(line if written is None else {**line, "schema": written}) + "\n")
    assert [event["step"] for event in events.read(file)] == ["free"]


def test_a_layout_of_another_major_version_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "events"
    events.emit(Event(step="free", process="worker", seconds=0), file)
    events.emit(Event(step="free", process="worker", seconds=0, schema="2.0"), file)
    with pytest.raises(
        EventsError, match=r"line 2 has the layout 2\.0 of events, and this release reads 1\.0"
    ) as error:
        events.load(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        "7",
        "null",
        '{"step": "free"}',
        '{"step": 1, "process": "worker", "seconds": 0, "time": 1}',
        '{"step": "free", "process": "worker", "seconds": "0", "time": 1}',
        '{"step": "free", "process": "worker", "seconds": true, "time": 1}',
        '{"step": "free", "process": "worker", "seconds": NaN, "time": 1}',
        '{"step": "free", "process": "worker", "seconds": 0, "time": 1, "bytes_before": "many"}',
        '{"step": "free", "process": "worker", "seconds": 0, "time": 1, "detail": []}',
    ],
)
def test_a_line_that_is_no_event_is_counted(tmp_path: Path, line: str) -> None:
    file = tmp_path / "events"
    events.emit(Event(step="free", process="worker", seconds=0), file)
    with file.open("a") as opened:
        opened.write(line + "\n\n")
    events.emit(Event(step="init", process="worker", seconds=0), file)
    log = events.load(file)
    assert [event["step"] for event in log.events] == ["free", "init"]
    assert log.torn == 1


def test_a_file_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(EventsError, match="cannot be read") as error:
        events.load(tmp_path / "missing")
    assert "\n" not in str(error.value)


WRITER = """
import sys
from verl_ascend_rollout import events
sys.stdin.readline()  # all writers start together
for number in range(int(sys.argv[3])):
    events.emit(events.Event("free", "worker", 0.0, detail={"writer": sys.argv[2], "number": number, "x": "x" * 900}),
                sys.argv[1])
"""


def test_several_processes_write_whole_lines(tmp_path: Path) -> None:
    file, writers, each = tmp_path / "events.jsonl", 6, 200
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(file), str(writer), str(each)], stdin=subprocess.PIPE)
        for writer in range(writers)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.close()
    for process in processes:
        process.wait(timeout=60)
    assert [process.returncode for process in processes] == [0] * writers
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for writer in range(writers):
        numbers = [line["detail"]["number"] for line in lines if line["detail"]["writer"] == str(writer)]
        assert numbers == list(range(each)), f"events of writer {writer} are lost or out of order"
    assert len(lines) == writers * each
