"""One typed event for each step of the rollout's life: what was done, how many bytes moved, how long it took.

An event is one line of JSON, appended with a single `write` to a file opened with O_APPEND, so that the trainer, the
server and vLLM's workers can share one file (POSIX keeps appends apart; a line is far below a page).  No step fails for
the sake of an event: one that cannot be written is lost, alone, and each process says so once.

The schema, 1.0.  Every line has every field of `Event`; a field that does not apply is null.  Its `step` is one of:

    step     process  bytes before and after                       detail
    decide   server   none                                         replica, rung, decisions, workers
    free     worker   KV cache, by the allocator                   rung, changed (false: it was free), reason
    init     worker   KV cache, by the allocator                   rung, changed, reason
    sleep    server   used of the replica's devices, by the driver replica, rung, tags (none: everything)
    wake_up  server   used of the replica's devices, by the driver replica, rung, tags (none: everything)
    sync     worker   none; detail.bytes is what was loaded        tensors, bytes, path, what the transport measured
    sync     server   none                                         replica, rung
    sync     trainer  none; detail.bytes is what was sent          global_steps, replica, rank, the transport's
    abort    server   none                                         replica, rung, what was aborted
    routing  trainer  none                                         pass (log_prob, update), and what the replayed record
                                                                   agrees to (integration.routing_replay, Agreement)
    restart  server   none; detail.bytes: the snapshot             replica, cause, number, sync, seconds of both parts

`rung` is how the KV cache is given back: the method of the option `kv_release`, by that option's old name.

One weight sync leaves a line in each process that took part; the trainer's spans the server's, and that the worker's.
More steps and more in `detail` may come with any release (the schema's minor number); a field that changes its meaning
or goes is a new major number, which `load` refuses.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import socket
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger(__name__)

EVENTS_VARIABLE = "ASCEND_SAFE_EVENTS"
"""The environment variable by which the server actor tells vLLM's worker processes where the events go."""

Process = Literal["driver", "trainer", "server", "worker"]

SCHEMA = "1.0"
"""The version of a line's layout.  Files from before it was written (0.1.0) have that of 1.0."""


class EventsError(ValueError):
    """The file is no file of events that can be read here.  One sentence: what is wrong, where, what to do."""


@dataclass(frozen=True)
class Event:
    """One lifecycle step.

    Attributes:
        step: what was done: `free`, `init`, `sleep`, `wake_up`, `sync`, `abort`, `decide`, ...
        process: the kind of process that did it.
        seconds: how long it took.
        bytes_before, bytes_after: the memory that the step is about (KV cache, weights) before and after, by the
            allocator's own count, in bytes; `None` where the step moves no memory.
        rss_before, rss_after: resident memory of the process, in bytes; `None` where it was not read.
        detail: what else is worth knowing, as JSON values.
        time: seconds since the epoch at which the step ended.
        pid: the process id.
        host: the name of the node that it ran on: the nodes of a cluster may share one file.
        schema: `SCHEMA` of the release that wrote the line.
    """

    step: str
    process: Process
    seconds: float
    bytes_before: int | None = None
    bytes_after: int | None = None
    rss_before: int | None = None
    rss_after: int | None = None
    detail: dict[str, Any] = field(default_factory=dict)
    time: float = field(default_factory=time.time)
    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)
    schema: str = SCHEMA

    def to_json(self) -> str:
        """Return the event as one line of JSON, without the newline."""
        return json.dumps(dataclasses.asdict(self), default=str)


_complained_in: int | None = None
"""The process that has said that events are lost; one that is forked from it says so for itself."""


def emit(event: Event, path: str | os.PathLike[str] | None = None) -> None:
    """Append `event` to `path`, or to the file that ASCEND_SAFE_EVENTS names; without either, do nothing.

    Never raises: the step that the event is about is done.  The first event that a process cannot write (a full disk, a
    folder that is not there) is an ERROR line.
    """
    global _complained_in
    target = path or os.environ.get(EVENTS_VARIABLE)
    if not target:
        return
    try:
        _append(target, event.to_json().encode() + b"\n")
    except Exception as error:  # also a path or a detail that Python cannot make anything of
        if _complained_in != os.getpid():
            _complained_in = os.getpid()
            logger.error(
                "The event %r of process %d is lost, and further ones may be, which is not said again: %s cannot be "
                "written (%s). The run goes on; free the disk, or let engine_kwargs.ascend_safe.events name a file in "
                "a folder that is there",
                event.step,
                os.getpid(),
                target,
                getattr(error, "strerror", None) or error,
            )


def _append(path: str | os.PathLike[str], line: bytes) -> None:
    """Append a line; once more where the file ended within one, since the first copy is now that line's end.

    Raises:
        OSError: it was not written, or not to its end.
    """
    # O_NONBLOCK: a named pipe that nobody reads is an error and no wait.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o644)
    try:
        _write(descriptor, line)
        if _follows_a_torn_line(path, descriptor, len(line)):
            _write(descriptor, line)
    finally:
        os.close(descriptor)


def _write(descriptor: int, line: bytes) -> None:
    written = os.write(descriptor, line)
    if written < len(line):
        raise OSError(errno.ENOSPC, f"{written} of {len(line)} bytes were taken")


def _follows_a_torn_line(path: str | os.PathLike[str], descriptor: int, length: int) -> bool:
    """Return whether what was written last, of this length, did not begin a line: a full disk or a kill tore the one
    before.

    Looked for after the write: before it, another process may be within its own.
    """
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return False
    start = os.lseek(descriptor, 0, os.SEEK_CUR) - length
    if start <= 0:
        return False
    try:
        with open(path, "rb") as opened:
            opened.seek(start - 1)
            return opened.read(1) != b"\n"
    except OSError:  # a file that may be written and not read
        return False


LONGEST = 1 << 20
"""Bytes in a line: an event has some hundred."""

LARGEST = 1e15
"""No event has a number like it: it is a petabyte, or in the year of 31 million."""


@dataclass(frozen=True)
class Log:
    """What a file of events holds.

    Attributes:
        events: the events, in the order in which they were written.
        torn: how many lines are no events: cut off when a job was killed or the disk was full, or written by something
            else.
    """

    events: tuple[dict[str, Any], ...]
    torn: int


def load(path: str | os.PathLike[str]) -> Log:
    """Return the events of a file; lines that are none are counted.

    Raises:
        EventsError: there is no such file, or a later release wrote it in a layout that is not known here.
    """
    events: list[dict[str, Any]] = []
    torn = 0
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):  # no JSON, or no UTF-8
            torn += 1
            continue
        if not _is_event(event):
            torn += 1
            continue
        written = str(event.get("schema", SCHEMA))
        if written.partition(".")[0] != SCHEMA.partition(".")[0]:
            raise EventsError(
                f"{path} line {number} has the layout {written} of events, and this release reads {SCHEMA}: install "
                "the release of verl-ascend-rollout that wrote it"
            )
        events.append(event)
    return Log(tuple(events), torn)


def _lines(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """Yield the lines of a file; what is no file of events may be a checkpoint without a line end, of any size."""
    give = "give the file that engine_kwargs.ascend_safe.events named in the job"
    try:
        with Path(path).open("rb") as file:
            while line := file.readline(LONGEST + 1):
                if len(line) > LONGEST:
                    raise EventsError(f"{path} is no file of events: it has a line of more than 1 MiB; {give}")
                yield line
    except OSError as error:
        raise EventsError(f"{path} cannot be read ({error.strerror}): {give}") from None


def read(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yield the events of a file, in the order in which they were written; a torn line (a killed job) is left out.

    Raises:
        EventsError: see `load`.
    """
    yield from load(path).events


def _is_event(value: Any) -> bool:
    if not isinstance(value, dict) or not all(isinstance(value.get(name), str) for name in ("step", "process")):
        return False
    numbers: list[Any] = [value.get("time"), value.get("seconds")]
    for name in ("bytes_before", "bytes_after", "rss_before", "rss_after"):
        numbers.append(0 if value.get(name) is None else value[name])
    # bool is an int to Python; Python's JSON has NaN, and whole numbers without end.
    numeric = all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)
    return numeric and all(abs(number) < LARGEST for number in numbers) and _is_detail(value.get("detail", {}))


def _is_detail(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("tags") or [], list)
