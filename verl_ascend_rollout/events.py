"""One typed event for each step of the rollout's life: what was done, how many bytes moved, how long it took.

An event is one line of JSON, appended with a single `write` to a file opened with O_APPEND, so that the trainer, the
server and vLLM's workers can share one file (POSIX keeps appends apart; a line is far below a page).
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

EVENTS_VARIABLE = "ASCEND_SAFE_EVENTS"
"""The environment variable by which the server actor tells vLLM's worker processes where the events go."""

Process = Literal["driver", "trainer", "server", "worker"]


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


def read(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The events of a file, in the order in which they were written; a torn last line (a killed job) is left out."""
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
