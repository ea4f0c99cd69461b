"""The file of lifecycle events, which several processes write at once and a killed one may tear."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
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
    monkeypatch.setattr(events, "_complained_in", None)


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
        detail={"rung": "reallocate", "reason": 'a "quoted"\nreason, in Grüße'},
    )
    before = time.time()
    events.emit(written, file)
    (read,) = events.read(file)
    assert Event(**read) == written
    assert read["pid"] == os.getpid()
    assert read["host"] == socket.gethostname()
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


def unwritable(name: str, folder: Path) -> Path:
    """A path to which no event can be written."""
    (folder / "file").touch()
    os.mkfifo(folder / "pipe")
    return folder / name


@pytest.mark.parametrize(
    "name",
    [
        "/dev/full",
        "/proc/version",  # may be read only, also by root
        "missing/events.jsonl",
        "file/events.jsonl",
        ".",
        "pipe",  # that nobody reads
        "x" * 300,
        "a\0b",
    ],
)
def test_a_file_that_cannot_be_written_is_one_line_and_no_error(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = unwritable(name, tmp_path)
    for step in ("free", "init", "sync"):
        events.emit(Event(step=step, process="worker", seconds=0), path)
    (record,) = caplog.records
    assert (record.name, record.levelno) == (events.__name__, logging.ERROR)
    sentence = record.getMessage()
    assert f"The event 'free' of process {os.getpid()} is lost" in sentence
    assert str(path) in sentence and "engine_kwargs.ascend_safe.events" in sentence and "\n" not in sentence


def test_an_event_that_is_no_json_is_lost_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    circular: dict[str, object] = {}
    circular["self"] = circular
    for detail in ({"fine": 1}, circular, {(1, 2): "no name"}, {"fine": 2}):
        events.emit(Event(step="free", process="worker", seconds=0, detail=detail), tmp_path / "events")  # type: ignore[arg-type]
    assert [event["detail"] for event in events.read(tmp_path / "events")] == [{"fine": 1}, {"fine": 2}]
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


FORK = """
import os
from verl_ascend_rollout import events
def lose():
    for _ in range(3):
        events.emit(events.Event("free", "worker", 0.0), "/dev/full")
lose()
if os.fork():
    os.wait()
else:
    lose()
"""


def test_each_process_says_so_once_also_a_forked_one() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert len(lines) == len(set(lines)) == 2
    assert all("/dev/full cannot be written (No space left on device)" in line for line in lines)


# A limit on the size of files tears a line as a full disk does: what fits is written.
FULL = """
import json, os, resource, sys
from verl_ascend_rollout import events
file, kept, mended = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "mended"
def emit(step):
    events.emit(events.Event(step, "worker", 0.0), file)
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
emit("first")
limit(os.path.getsize(file) + kept)
emit("torn")
emit("full")
limit(resource.RLIM_INFINITY)
if mended:
    emit("second")
    emit("third")
"""


@pytest.mark.parametrize("kept", [0, 1, 50])
@pytest.mark.parametrize("after", ["mended", "ended"], ids=["the same process goes on", "another one goes on"])
def test_a_line_that_a_full_disk_tore_does_not_take_the_next_with_it(kept: int, after: str, tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(file), str(kept), after], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert "The event 'torn' of process" in line
    if after == "ended":
        assert not file.read_bytes().endswith(b"\n") or not kept
        for step in ("second", "third"):
            events.emit(Event(step=step, process="worker", seconds=0), file)
    log = events.load(file)
    assert [event["step"] for event in log.events] == ["first", "second", "third"]
    assert log.torn == (kept > 0)


@pytest.mark.parametrize("cut", [1, 20])
def test_a_line_that_a_kill_tore_does_not_take_the_next_with_it(cut: int, tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    for step in ("first", "torn"):
        events.emit(Event(step=step, process="worker", seconds=0), file)
    os.truncate(file, file.stat().st_size - cut)
    for step in ("second", "third"):
        events.emit(Event(step=step, process="worker", seconds=0), file)
    assert [event["step"] for event in events.read(file)] == ["first", "second", "third"]


def test_a_file_that_cannot_be_read_back_is_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for step in ("free", "init"):
        events.emit(Event(step=step, process="worker", seconds=0), pipe)
    assert [json.loads(line)["step"] for line in os.read(reader, 1 << 16).splitlines()] == ["free", "init"]
    os.close(reader)
    assert caplog.records == []


def test_an_event_of_which_only_a_part_was_taken_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    capacity = fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    events.emit(Event(step="free", process="worker", seconds=0, detail={"long": "x" * capacity}), pipe)
    os.close(reader)
    (record,) = caplog.records
    assert f"({capacity} of " in record.getMessage()


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
