"""One child process with everything that it starts: its messages, its log, its time limit, and its end.

The child has a session and a process group of its own, so that Ctrl-C reaches only us, and everything below it can be
ended together.  It writes JSON lines into a pipe; whatever it and its own children print goes into the log.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

TICK = 0.2
PATIENCE = 10.0
"""Seconds that processes have to end by themselves, before they are killed.  vLLM's take about two."""

LOOK = 1.0
"""Seconds between two looks at what shared memory the processes have."""

FD_VARIABLE = "ASCEND_SAFE_SMOKE_FD"

Message = dict[str, Any]


@dataclass(frozen=True)
class Ended:
    """How a child process ended.

    Attributes:
        status: its exit status; negative: the signal that ended it.
        timed_out: it ran past its time limit, and we ended it.
        signal: by which the user asked us to stop, so that we ended it; 0: nobody asked.
        seconds: how long it ran.
        printed: the log's size in bytes when we began to end it: what comes after is about the end; `None`: it ended by
            itself.
    """

    status: int
    timed_out: bool = False
    signal: int = 0
    seconds: float = 0.0
    printed: int | None = None

    @property
    def interrupted(self) -> bool:
        """The user asked us to stop."""
        return self.signal != 0

    @property
    def well(self) -> bool:
        """It ended by itself and without an error."""
        return self.status == 0 and not self.timed_out and not self.interrupted


def supervise(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    seconds: float,
    on_message: Callable[[Message], None],
    on_line: Callable[[str], None] = lambda line: None,
    on_tick: Callable[[], None] = lambda: None,
) -> Ended:
    """Run a child process to its end, or to the end of its time; nothing that it started is left behind.

    Args:
        command: the program and its arguments.
        log: what it prints is added to this file.
        environment: variables beside those that we have ourselves.
        seconds: its time limit.
        on_message: called with each message of the child.
        on_line: called with each line that it, or a process of it, prints.
        on_tick: called a few times a second.

    Raises:
        OSError: the log cannot be written, or the program cannot be started.
    """
    started = time.monotonic()
    reader, writer = os.pipe()
    with log.open("ab") as printed:
        before = log.stat().st_size
        try:
            child = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment, FD_VARIABLE: str(writer)},
                pass_fds=(writer,),
                start_new_session=True,
            )
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
    family = _Family(child.pid)
    timed_out = False
    asked = 0
    messages, lines = _Lines(reader), _Tail(log, before)
    try:
        with _stop_asked() as stop:
            while child.poll() is None:
                for text in messages.read(TICK):
                    _give(text, on_message)
                for line in lines.read():
                    on_line(line)
                on_tick()
                family.look()
                if stop:
                    asked = stop[0]
                    break
                if time.monotonic() - started > seconds:
                    timed_out = True
                    break
            size = log.stat().st_size if child.poll() is None else None
            family.end()
            child.wait()
            # What was written between the last look and the end.
            for text in messages.read(0.0):
                _give(text, on_message)
            for line in lines.read():
                on_line(line)
    finally:
        family.end()
        os.close(reader)
        lines.close()
    return Ended(child.returncode, timed_out, asked, time.monotonic() - started, size)


def _give(text: bytes, on_message: Callable[[Message], None]) -> None:
    try:
        message = json.loads(text)
    except ValueError:
        return  # a line that a killed child did not finish
    if isinstance(message, dict):
        on_message(message)


@contextlib.contextmanager
def _stop_asked() -> Iterator[list[int]]:
    """A list that is not empty any more once Ctrl-C was pressed, or SIGTERM came."""
    asked: list[int] = []
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # not in the main thread: then nobody can ask
            before[number] = signal.signal(number, lambda signum, frame: asked.append(signum))
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Lines:
    """Lines from a pipe, without waiting for more than a moment."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._rest = b""
        self._open = True

    def read(self, seconds: float) -> list[bytes]:
        if not self._open:
            time.sleep(seconds)
            return []
        found: list[bytes] = []
        while select.select([self._descriptor], [], [], 0.0 if found else seconds)[0]:
            data = os.read(self._descriptor, 1 << 16)
            if not data:
                self._open = False
                break
            *whole, self._rest = (self._rest + data).split(b"\n")
            found += whole
            seconds = 0.0
        return found


class _Tail:
    """New lines of a file."""

    def __init__(self, path: Path, start: int) -> None:
        self._file = path.open("rb")
        self._file.seek(start)
        self._rest = b""

    def read(self) -> list[str]:
        *whole, self._rest = (self._rest + self._file.read()).split(b"\n")
        return [line.decode("utf-8", "replace") for line in whole]

    def close(self) -> None:
        self._file.close()


class _Family:
    """A process and what it started, and the shared memory that they have names for."""

    def __init__(self, group: int) -> None:
        self._group = group
        self._known: dict[int, psutil.Process] = {}
        self._segments: set[str] = set()
        self._looked = 0.0
        self._ended = False

    def look(self) -> None:
        """Remember who there is.  A process that leaves the group is known by its parent."""
        if time.monotonic() - self._looked < LOOK:
            return
        self._looked = time.monotonic()
        self._look()

    def _look(self) -> None:
        with contextlib.suppress(psutil.Error):
            leader = psutil.Process(self._group)
            for process in (leader, *leader.children(recursive=True)):
                self._known.setdefault(process.pid, process)
        for pid in self._known:
            with contextlib.suppress(OSError):
                maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
                # Python's own prefix for a segment without a name (multiprocessing.shared_memory), which vLLM's message
                # queues have.
                self._segments.update(word for word in maps.split() if word.startswith("/dev/shm/psm_"))

    def end(self) -> None:
        """End all of them: ask, wait, kill; then take away the shared memory that they left.  Once."""
        if self._ended:
            return
        self._ended = True
        self._look()
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        while self._alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        # Also those of the group that nobody has seen start.  The leader is not waited for yet: its number is no
        # other's.
        self._signal(signal.SIGKILL)
        deadline = time.monotonic() + PATIENCE
        while self._alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        for segment in self._segments:
            with contextlib.suppress(OSError):
                os.unlink(segment)
        self._segments.clear()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._group, number)
        for process in self._known.values():
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)

    def _alive(self) -> bool:
        for process in self._known.values():
            with contextlib.suppress(psutil.Error):
                # The leader is ours to wait for, and a zombie until then.
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    return True
        return False
