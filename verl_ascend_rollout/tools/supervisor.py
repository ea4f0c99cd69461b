"""One child process with everything that it starts: its messages, its log, its time limit, and its end.

The child has a session of its own, so that Ctrl-C reaches only us.  What it and its own children print goes into a log.
While it runs we are a "child subreaper" (Linux prctl): a process whose parent dies becomes ours instead of init's, so
that Ray's and vLLM's processes stay in our tree, even those that a killed parent left.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

TICK = 0.2
PATIENCE = 10.0
"""Seconds that the child has after a SIGTERM, to end what it started: Ray's driver and vLLM's engine do so."""

LEFTOVER = 3.0
"""Seconds that what the child left has to end by itself, and again after a SIGTERM.  vLLM's processes take two."""

LOOK = 5.0
"""Seconds between two looks at what shared memory the processes have."""

FD_VARIABLE = "ASCEND_SAFE_SMOKE_FD"
"""Names the descriptor that the child writes its messages to: JSON objects, one a line."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SHARED_MEMORY = Path("/dev/shm")
PR_SET_CHILD_SUBREAPER = 36

Message = dict[str, Any]


@dataclass(frozen=True)
class Ended:
    """How a child process ended."""

    status: int  # its exit status; negative: the signal that ended it
    timed_out: bool = False  # it ran past its time limit, and we ended it
    signal: int = 0  # by which the user asked us to stop, so that we ended it; 0: nobody asked
    seconds: float = 0.0  # how long it ran
    # the log's size in bytes when we began to end it: what comes after is about the end; `None`: it ended by itself
    printed: int | None = None
    left: int = 0  # processes that outlived it and did not end by themselves

    @property
    def well(self) -> bool:
        """It ended by itself and without an error."""
        return self.status == 0 and not self.timed_out and not self.signal


def supervise(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    seconds: float,
    *,
    on_message: Callable[[Message], None] | None = None,
    on_line: Callable[[str], None] = lambda line: None,
    on_tick: Callable[[], None] = lambda: None,
) -> Ended:
    """Run a child process to its end, or to the end of its time; nothing that it started is left behind.

    Args:
        command: the program and its arguments.
        log: what it prints is added to this file.
        environment: variables beside those that we have ourselves.
        seconds: its time limit.
        on_message: called with each message of the child; without it the child is given no descriptor for any.
        on_line: called with each line that it, or a process of it, prints.
        on_tick: called a few times a second.

    Raises:
        OSError: the log cannot be written, or the program cannot be started.
    """
    started = time.monotonic()
    variables, descriptors = {**os.environ, **environment}, []
    timed_out = False
    with contextlib.ExitStack() as stack:
        family = stack.enter_context(_Family())
        printed = stack.enter_context(log.open("ab"))
        followed = [(Follower(log, log.stat().st_size), on_line)]
        if on_message is not None:
            hear = on_message
            descriptors = [stack.enter_context(tempfile.TemporaryFile()).fileno()]
            variables[FD_VARIABLE] = str(descriptors[0])
            messages = Follower(Path(f"/dev/fd/{descriptors[0]}"))
            followed.insert(0, (messages, lambda text: hear(json.loads(text))))

        def look() -> None:
            for follower, tell in followed:
                for line in follower.read():
                    tell(line)

        asked = stack.enter_context(_stop_asked())
        child = family.leader = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            env=variables,
            pass_fds=descriptors,
            start_new_session=True,
        )
        while child.poll() is None and not asked and not timed_out:
            time.sleep(TICK)
            look()
            on_tick()
            family.look()
            timed_out = time.monotonic() - started > seconds
        by_itself = child.poll() is not None
        size = None if by_itself else log.stat().st_size
        left = family.end()
        look()  # what was written between the last look and the end
    signal_number = asked[0] if asked else 0
    return Ended(child.returncode, timed_out and not by_itself, signal_number, time.monotonic() - started, size, left)


class Follower:
    """Reads what was appended to a file since the last look; a file that is not there yet is empty."""

    def __init__(self, file: Path, start: int = 0) -> None:
        self._file, self._offset, self._rest = file, start, b""

    def read(self) -> list[str]:
        """Return the complete lines that are new."""
        try:
            with self._file.open("rb") as stream:
                stream.seek(self._offset)
                new = stream.read()
        except FileNotFoundError:
            return []
        self._offset += len(new)
        *whole, self._rest = (self._rest + new).split(b"\n")
        return [line.decode("utf-8", "replace") for line in whole]


@contextlib.contextmanager
def _stop_asked() -> Iterator[list[int]]:
    """Yield a list that has a signal once Ctrl-C was pressed, or another of `STOP_SIGNALS` came."""
    asked: list[int] = []
    before = {}
    for number in STOP_SIGNALS:
        if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
            continue  # nohup
        with contextlib.suppress(ValueError):  # not in the main thread: then nobody can ask
            before[number] = signal.signal(number, lambda signum, frame: asked.append(signum))
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Family:
    """Everything that was started while it is entered, however deep, and the shared memory that it has names for.

    No process that was there before is ever looked at, nor any of its children; no segment that was there before is
    removed.
    """

    def __init__(self) -> None:
        self.leader: subprocess.Popen[bytes] | None = None
        self._others = set(psutil.Process().children())
        self._before = _segments()
        self._segments: set[Path] = set()
        self._next_look = 0.0

    def __enter__(self) -> _Family:
        _subreaper(True)
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.end()
        finally:
            _subreaper(False)

    def members(self) -> list[psutil.Process]:
        """Return the living processes; a process that became ours and has ended is waited for."""
        living = []
        for own in psutil.Process().children():
            if own in self._others:
                continue
            for process in (own, *_below(own)):
                with contextlib.suppress(psutil.Error, ChildProcessError):
                    if process.status() != psutil.STATUS_ZOMBIE:
                        living.append(process)
                    elif process is own and (self.leader is None or own.pid != self.leader.pid):
                        os.waitpid(own.pid, os.WNOHANG)
        return living

    def look(self) -> None:
        """Remember which segments there are, every `LOOK` seconds."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK
            self._note_segments()

    def _note_segments(self) -> None:
        for process in self.members():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{process.pid}/maps").read_text(errors="replace").splitlines():
                    _, found, name = line.partition(f" {SHARED_MEMORY}/")
                    if found and not name.endswith("(deleted)"):
                        self._segments.add(SHARED_MEMORY / name)

    def end(self) -> int:
        """End all of them: ask, wait, kill; then remove the segments that they left.

        Returns:
            How many did not end by themselves after the leader had.
        """
        self._note_segments()
        if self.leader is not None and self.leader.poll() is None:
            self.leader.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.leader.wait(PATIENCE)
        left = self._wait(LEFTOVER)
        _send(left, psutil.Process.terminate)
        # A resource tracker ends by itself, once it has removed the segments of the processes that it watched.
        _send([process for process in self._wait(LEFTOVER) if not _is_tracker(process)], psutil.Process.kill)
        _send(self._wait(LEFTOVER), psutil.Process.kill)
        self._wait(LEFTOVER)
        if self.leader is not None:
            self.leader.wait()
        for segment in self._segments - self._before:
            segment.unlink(missing_ok=True)
        self._segments.clear()
        return len(left)

    def _wait(self, seconds: float) -> list[psutil.Process]:
        deadline = time.monotonic() + seconds
        while (left := self.members()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left


def _subreaper(on: bool) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0)


def _segments() -> set[Path]:
    with contextlib.suppress(OSError):
        return set(SHARED_MEMORY.iterdir())
    return set()


def _below(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        found: list[psutil.Process] = process.children(recursive=True)
        return found
    return []


def _is_tracker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "resource_tracker" in " ".join(process.cmdline())
    return False


def _send(processes: Sequence[psutil.Process], how: Callable[[psutil.Process], None]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            how(process)
