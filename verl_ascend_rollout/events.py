"""One typed event for each step of the rollout's life: what was done, how many bytes moved, how long it took.

An event is one line of JSON, appended with a single `write` to a file opened with O_APPEND, so that the trainer, the
server and vLLM's workers can share one file (POSIX keeps appends apart; a line is far below a page).

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

One weight sync leaves a line in each process that took part; the trainer's spans the server's, and that the worker's.
More steps and more in `detail` may come with any release (the schema's minor number); a field that changes its meaning
or goes is a new major number, which `load` refuses.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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
    schema: str = SCHEMA

    def to_json(self) -> str:
        """The event as one line of JSON, without the newline."""
        return json.dumps(dataclasses.asdict(self), default=str)


def emit(event: Event, path: str | os.PathLike[str] | None = None) -> None:
    """Append `event` to `path`, or to the file that ASCEND_SAFE_EVENTS names; without either, do nothing.

    Raises:
        OSError: when the file cannot be written: an event that was asked for and lost would be silent.
    """
    target = path or os.environ.get(EVENTS_VARIABLE)
    if not target:
        return
    line = (event.to_json() + "\n").encode()
    descriptor = os.open(target, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Log:
    """What a file of events holds.

    Attributes:
        events: the events, in the order in which they were written.
        torn: how many lines are no events: cut off when a job was killed, or written by something else.
    """

    events: tuple[dict[str, Any], ...]
    torn: int


def load(path: str | os.PathLike[str]) -> Log:
    """The events of a file; lines that are none are counted.

    Raises:
        EventsError: there is no such file, or a later release wrote it in a layout that is not known here.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise EventsError(
            f"{path} cannot be read ({error.strerror}): give the file that engine_kwargs.ascend_safe.events named in "
            "the job"
        ) from None
    events: list[dict[str, Any]] = []
    torn = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except ValueError:  # no JSON, or no UTF-8
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


def read(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The events of a file, in the order in which they were written; a torn line (a killed job) is left out.

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
    # bool is an int to Python; and Python's JSON has NaN.
    numeric = all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)
    return numeric and all(math.isfinite(number) for number in numbers) and isinstance(value.get("detail", {}), dict)
