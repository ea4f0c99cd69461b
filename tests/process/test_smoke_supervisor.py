"""The supervisor of smoke's child processes, on children made for the purpose."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import psutil
import pytest

from verl_ascend_rollout.tools import supervisor
from verl_ascend_rollout.tools.supervisor import FD_VARIABLE, Ended, supervise

HEAD = f"""
import json, os, signal, subprocess, sys, time
pipe = os.fdopen(int(os.environ[{FD_VARIABLE!r}]), "w", buffering=1)
def tell(**message):
    pipe.write(json.dumps(message) + "\\n")
"""

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "PATIENCE", 0.5)
    monkeypatch.setattr(supervisor, "LEFTOVER", 0.5)
    monkeypatch.setattr(supervisor, "LOOK", 0.1)
    monkeypatch.setattr(supervisor, "TICK", 0.02)


def run(
    program: str,
    log: Path,
    seconds: float = 60.0,
    environment: Mapping[str, str] | None = None,
    on_message: Callable[[dict[str, Any]], None] = lambda message: None,
) -> tuple[Ended, list[dict[str, Any]], list[str]]:
    messages: list[dict[str, Any]] = []
    lines: list[str] = []
    command = [sys.executable, "-c", HEAD + textwrap.dedent(program)]

    def told(message: dict[str, Any]) -> None:
        messages.append(message)
        on_message(message)

    ended = supervise(command, log, environment or {}, seconds, on_message=told, on_line=lines.append)
    return ended, messages, lines


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_messages_and_lines_arrive_and_the_log_has_what_is_printed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"from before\n")
    program = """
        print("to stdout", flush=True); print("to stderr", file=sys.stderr, flush=True)
        tell(kind="fact", name="x", value=float("nan")); tell(kind="fact", name="y", value=os.environ["GIVEN"])
        pipe.write('{"half')
        """
    ended, messages, lines = run(program, log, environment={"GIVEN": "here"})
    assert ended.well and ended.status == 0
    assert [message["name"] for message in messages] == ["x", "y"]
    assert messages[1]["value"] == "here"
    assert sorted(lines) == ["to stderr", "to stdout"]
    assert log.read_text().splitlines()[0] == "from before"


@pytest.mark.parametrize(
    ("program", "status"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", -9), ("os.abort()", -6)]
)
def test_a_crash_is_told_by_its_status(program: str, status: int, tmp_path: Path) -> None:
    ended, messages, _ = run(f"tell(kind='phase', name='engine', state='begin')\n{program}", tmp_path / "log")
    assert (ended.status, ended.timed_out, ended.signal, ended.well) == (status, False, 0, False)
    assert messages == [{"kind": "phase", "name": "engine", "state": "begin"}]


def test_out_of_time_ends_the_whole_group_also_who_does_not_listen(tmp_path: Path) -> None:
    program = f"""
        child = subprocess.Popen([sys.executable, "-c", {STUBBORN!r}], stdout=subprocess.PIPE, text=True)
        alone = subprocess.Popen(
            [sys.executable, "-c", {STUBBORN!r}], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        child.stdout.readline(); alone.stdout.readline()
        tell(pids=[os.getpid(), child.pid, alone.pid])
        time.sleep(600)
        """
    started = time.monotonic()
    ended, messages, _ = run(program, tmp_path / "log", seconds=1.5)
    assert ended.timed_out and not ended.well
    assert time.monotonic() - started < 30
    assert len(messages[0]["pids"]) == 3
    assert not [pid for pid in messages[0]["pids"] if alive(pid)]


def test_a_straggler_of_a_child_that_ended_well_is_ended_too(tmp_path: Path) -> None:
    program = """
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        tell(pid=child.pid); time.sleep(0.5)
        """
    ended, messages, _ = run(program, tmp_path / "log")
    assert ended.well
    assert not alive(messages[0]["pid"])


def test_shared_memory_that_a_killed_process_leaves_is_taken_away(tmp_path: Path) -> None:
    """vLLM's message queues are such segments."""
    program = """
        from multiprocessing import resource_tracker, shared_memory
        resource_tracker.register = lambda *arguments: None
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        segment = shared_memory.SharedMemory(create=True, size=4096)
        tell(name=segment.name); time.sleep(600)
        """
    ended, messages, _ = run(program, tmp_path / "log", seconds=1.5)
    assert ended.timed_out
    assert messages[0]["name"].startswith("psm_")
    assert not Path("/dev/shm", messages[0]["name"]).exists()


def test_what_was_there_before_is_left_alone(tmp_path: Path) -> None:
    """Another child of ours, and a segment that the child only looks into."""
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    segment = shared_memory.SharedMemory(create=True, size=4096)
    program = f"""
        from multiprocessing import resource_tracker, shared_memory
        resource_tracker.register = lambda *arguments: None
        segment = shared_memory.SharedMemory({segment.name!r})
        tell(name=segment.name); time.sleep(600)
        """
    try:
        ended, messages, _ = run(program, tmp_path / "log", seconds=1.5)
        assert ended.timed_out and messages[0]["name"] == segment.name
        assert Path("/dev/shm", segment.name).exists()
        assert bystander.poll() is None
    finally:
        segment.close()
        segment.unlink()
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_user_can_stop_it_and_our_handlers_come_back(number: signal.Signals, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    program = "tell(pid=os.getpid()); time.sleep(600)"
    ended, messages, _ = run(program, tmp_path / "log", on_message=lambda _: os.kill(os.getpid(), number))
    assert ended.signal == number and not ended.timed_out
    assert not alive(messages[0]["pid"])
    assert signal.getsignal(number) is before


def test_nothing_is_printed_by_a_child_that_is_not_in_the_log(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from verl_ascend_rollout.tools.supervisor import supervise; "
        "supervise([sys.executable, '-c', 'print(1); raise ValueError(2)'], Path(sys.argv[1]), {}, 60)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "log")], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "ValueError: 2" in (tmp_path / "log").read_text()
