"""`ascend-safe timeline`: totals, phases and a picture of a file of events."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from verl_ascend_rollout import events
from verl_ascend_rollout.events import Event, Process
from verl_ascend_rollout.tools import timeline
from verl_ascend_rollout.tools.cli import main

GIB = 1 << 30


def write(file: Path, *recorded: Event) -> Path:
    for event in recorded:
        events.emit(event, file)
    return file


def at(end: float, seconds: float, step: str, process: Process, **fields: Any) -> Event:
    return Event(step=step, process=process, seconds=seconds, time=end, **fields)


def one_step_on_a_cpu(start: float, number: int) -> list[Event]:
    """Two workers free, train 4 s, sync, init, and generate for 10 s: what `reallocate` leaves, 16 s a step."""
    kv = {
        "bytes_before": GIB,
        "bytes_after": 0,
        "rss_before": 3 * GIB,
        "rss_after": 2 * GIB,
        "detail": {"rung": "reallocate"},
    }
    back = {
        "bytes_before": 0,
        "bytes_after": GIB,
        "rss_before": 2 * GIB,
        "rss_after": 3 * GIB,
        "detail": {"rung": "reallocate"},
    }
    return [
        at(start + 0.5, 0.5, "free", "worker", pid=1, **kv),
        at(start + 1.0, 1.0, "free", "worker", pid=2, **kv),
        at(start + 5.4, 0.3, "sync", "worker", pid=1, detail={"bytes": GIB // 2, "path": "replay"}),
        at(start + 5.45, 0.4, "sync", "server", detail={"replica": 0}),
        at(start + 5.5, 0.5, "sync", "trainer", detail={"global_steps": number}),
        at(start + 6.0, 0.5, "init", "worker", pid=1, **back),
        at(start + 6.0, 0.25, "init", "worker", pid=2, **back),
    ]


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """Three training steps, of 16 s each."""
    return write(
        tmp_path / "events.jsonl",
        at(100.0, 40.0, "decide", "server", detail={"replica": 0}),
        *(event for number in range(3) for event in one_step_on_a_cpu(110.0 + 16 * number, number)),
        at(158.0, 0.0, "abort", "server", detail={"replica": 0}),
    )


def test_totals_of_each_kind_of_step(recorded: Path) -> None:
    found = {(total.step, total.process): total for total in timeline.totals(events.load(recorded).events)}
    free = found["free", "worker"]
    assert (free.count, free.seconds, free.bytes) == (6, pytest.approx(4.5), 6 * GIB)
    assert found["sync", "worker"].bytes == 3 * GIB // 2
    assert found["sync", "trainer"].bytes is None
    assert found["abort", "server"].count == 1


def test_the_phases_of_each_step_follow_one_another(recorded: Path) -> None:
    found = timeline.phases(events.load(recorded).events)
    names = [phase.name for phase in found]
    assert names == ["generate", "free", "train", "sync", "init"] * 3
    for before, after in pairwise(found):
        assert after.start == pytest.approx(before.end), "a gap, or two phases at once"
    seconds = {name: [phase.end - phase.start for phase in found if phase.name == name] for name in timeline.PHASES}
    assert seconds["free"] == pytest.approx([1.0] * 3), "until the slower worker is done"
    assert seconds["train"] == pytest.approx([4.0] * 3)
    assert seconds["sync"] == pytest.approx([0.5] * 3), "the trainer's line spans the others"
    assert seconds["init"] == pytest.approx([0.5] * 3)
    assert seconds["generate"] == pytest.approx([10.0] * 3)


def test_phases_of_sleep_mode_which_wakes_in_two_goes(tmp_path: Path) -> None:
    """Weights first, then the sync, then the KV cache: only that makes the engine awake."""
    file = write(
        tmp_path / "events",
        at(0.0, 0.0, "decide", "server"),
        at(11.0, 1.0, "sleep", "server", bytes_before=9, bytes_after=1, detail={"rung": "sleep"}),
        at(21.0, 1.0, "wake_up", "server", detail={"rung": "sleep", "tags": ["weights"]}),
        at(23.0, 2.0, "sync", "server"),
        at(24.0, 1.0, "wake_up", "server", detail={"rung": "sleep", "tags": ["kv_cache"]}),
        at(34.0, 0.0, "sleep", "server", detail={"rung": "sleep"}),
    )
    found = [(phase.name, phase.end - phase.start) for phase in timeline.phases(events.load(file).events)]
    assert found == [
        ("generate", 10.0),
        ("free", 1.0),
        ("train", 9.0),
        ("init", 1.0),
        ("sync", 2.0),
        ("init", 1.0),
        ("generate", 10.0),
    ]


def test_a_step_that_changed_nothing_is_no_phase(tmp_path: Path) -> None:
    again = {"bytes_before": 0, "bytes_after": 0, "detail": {"rung": "reallocate", "changed": False}}
    file = write(
        tmp_path / "events",
        at(1.0, 1.0, "free", "worker"),
        at(3.0, 0.5, "free", "worker", **again),
        at(5.0, 1.0, "init", "worker"),
    )
    assert [phase.name for phase in timeline.phases(events.load(file).events)] == ["free", "train", "init"]


def test_text_has_totals_phases_and_torn_lines(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with recorded.open("ab") as opened:
        opened.write(b'{"step": "free", "proc')
    assert main(["timeline", str(recorded)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("23 events over 58.0 s, from ")
    assert lines[1].startswith("1 line(s) are no events and are left out")
    assert ["free", "worker", "6", "4.500", "750.0", "6.000"] in [line.split() for line in lines]
    assert ["asleep:", "training", "12.000", "25.0%"] in [line.split() for line in lines]


def test_json_has_the_same_numbers(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["timeline", str(recorded), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["events"], report["torn"], report["seconds"]) == (23, 0, 58.0)
    assert report["phases"]["train"] == {"seconds": pytest.approx(12.0), "share": pytest.approx(0.25)}
    assert sum(phase["share"] for phase in report["phases"].values()) == pytest.approx(1.0)
    assert {"step": "sync", "process": "trainer", "count": 3, "seconds": 1.5, "bytes": None} in report["steps"]
    assert len(report["timeline"]) == 15


def test_workers_of_two_nodes_with_one_process_number_are_two(tmp_path: Path) -> None:
    steps = [
        at(10.0 + second, 1.0, "free", "worker", pid=7, host=host, bytes_before=GIB, bytes_after=0)
        for second, host in enumerate("ab")
    ]
    found = timeline.curves(events.load(write(tmp_path / "events.jsonl", *steps)).events)
    assert set(found) == {"KV cache, worker 7 on a", "KV cache, worker 7 on b"}


def test_curves_are_the_memory_of_each_process(recorded: Path) -> None:
    found = timeline.curves(events.load(recorded).events)
    assert set(found) == {"KV cache, worker 1", "KV cache, worker 2", "resident, worker 1", "resident, worker 2"}
    assert found["KV cache, worker 2"][:4] == [(110.0, GIB), (111.0, 0), (115.75, 0), (116.0, GIB)]
    assert timeline.sync_numbers(events.load(recorded).events)[1] == (1, pytest.approx(131.25))


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture_is_drawn(recorded: Path, tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / f"picture.{ending}"
    assert main(["timeline", str(recorded), "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    assert picture.stat().st_size > 5000
    assert f"drawn into {picture}" in capsys.readouterr().out


def test_events_without_memory_and_of_no_length_are_drawn(tmp_path: Path) -> None:
    file = write(tmp_path / "events", at(5.0, 0.0, "abort", "server"))
    assert main(["timeline", str(file), "--out", str(tmp_path / "p.png")]) == 0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"", "is empty: the job wrote no event"),
        (b"\n \n", "is empty: the job wrote no event"),
        (b"\x00\xff\n{\n", "is no file of events: none of its 2 lines is one"),
        (b'{"step": 1, "data": {}}\n', "is no file of events: none of its 1 lines is one"),
        (b"\x00" * (1 << 21), "is no file of events: it has a line of more than 1 MiB"),
        (
            b'{"step": "free", "process": "worker", "seconds": 0, "time": 1, "schema": "9.1"}\n',
            "line 1 has the layout 9.1",
        ),
    ],
)
def test_a_file_without_events_is_one_sentence(
    tmp_path: Path, content: bytes | None, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "events.jsonl"
    if content is not None:
        file.write_bytes(content)
    assert main(["timeline", str(file), "--out", str(tmp_path / "p.png")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"ascend-safe: {file}")
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_file_without_an_end_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """A device, or a checkpoint without a line end in its gigabytes: no more than a line of it is held."""
    assert main(["timeline", "/dev/zero"]) == 2
    assert "/dev/zero is no file of events" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fields",
    [
        {"seconds": 10**400},
        {"time": 1e308},
        {"time": -1e308, "seconds": 1e308},
        {"detail": {"tags": 5}},
        {"bytes_before": 1e300, "bytes_after": 0},
        {"step": ["free"]},
        {"detail": None},
    ],
)
def test_a_line_that_cannot_be_an_event_is_left_out(
    recorded: Path, tmp_path: Path, fields: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    line = {"step": "wake_up", "process": "server", "seconds": 1.0, "time": 120.0, "schema": "1.0", **fields}
    with recorded.open("a") as opened:
        opened.write(json.dumps(line) + "\n" + "[" * 100_000 + "\n")
    assert main(["timeline", str(recorded), "--out", str(tmp_path / "p.png")]) == 0
    assert "\n2 line(s) are no events and are left out" in capsys.readouterr().out


def test_what_a_file_says_does_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "events\x1b[31m"
    event = {"step": "fr\x1b[2Jee [bold]", "process": "wor\rker\u009b", "seconds": 1, "time": 120, "host": ["a"]}
    file.write_text(json.dumps(event) + "\n")
    assert main(["timeline", str(file), "--out", str(tmp_path / "p\x07.png")]) == 0
    assert main(["timeline", str(tmp_path / "gone\x1b[31m")]) == 2
    told = "".join(capsys.readouterr())
    assert not set(told) & {"\x1b", "\r", "\x07", "\u009b"}
    assert "[bold]" in told


@pytest.mark.parametrize("out", ["missing/p.png", "p.nothing"])
def test_a_picture_that_cannot_be_drawn_is_one_sentence(
    recorded: Path, tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["timeline", str(recorded), "--out", str(tmp_path / out)]) == 2
    captured = capsys.readouterr()
    assert "cannot be drawn" in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("ending", ["png", "json"])
def test_events_are_not_drawn_over(
    recorded: Path, tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = recorded.read_bytes()
    link = tmp_path / f"link.{ending}"
    link.symlink_to(recorded)
    assert main(["timeline", str(recorded), "--out", str(link)]) == 2
    told = capsys.readouterr()
    assert told.err == f"ascend-safe: --out {link} would overwrite {recorded}, which is read: name another file\n"
    assert (told.out, recorded.read_bytes()) == ("", before)


@pytest.mark.parametrize(("ending", "said"), [("png", "drawn"), ("json", "written")])
def test_a_picture_that_cannot_be_written_costs_no_totals(
    recorded: Path, tmp_path: Path, ending: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / f"full.{ending}"
    full.symlink_to("/dev/full")
    assert main(["timeline", str(recorded), "--out", str(full)]) == 2
    told = capsys.readouterr()
    assert told.err == f"ascend-safe: --out {full} cannot be {said}: No space left on device\n"
    assert "asleep: training" in told.out and "drawn into" not in told.out


def test_without_matplotlib_only_the_picture_is_missing(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["timeline", str(recorded), "--out", "p.png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    assert main(["timeline", str(recorded)]) == 0
