"""The shared memory of vLLM's message queues, which would outlive the engine."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil


def unlink() -> None:
    """Take the names from the shared-memory segments of the queues of this process's engine.

    Ray ends a job's actors without ceremony, and vLLM then leaves its queues in /dev/shm: about 400 MiB a run were seen
    (vLLM 0.28, `ShmRingBuffer`).  Every process of the engine has mapped them by now and none will look for the names
    again; the memory goes with the last process that maps it, also after a kill -9.
    """
    this = psutil.Process()
    segments: set[str] = set()
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8")
            # Python's own prefix for a segment without a name of its own (multiprocessing.shared_memory).
            segments.update(word for word in maps.split() if word.startswith("/dev/shm/psm_"))
    for segment in segments:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(segment)
