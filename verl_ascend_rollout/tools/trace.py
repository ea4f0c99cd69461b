"""A run's events as a trace that https://ui.perfetto.dev and chrome://tracing open (the Trace Event Format, JSON)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from verl_ascend_rollout.events import EventsError


def of_events(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the trace: a slice for each step, a row for each process, and its memory as counters; microseconds."""
    rows: dict[tuple[str, Any], int] = {}
    found: list[dict[str, Any]] = []
    for event in sorted(events, key=lambda event: float(event["time"])):
        # Two nodes may have one process number, so rows have numbers of their own.
        key = (f"{event['process']} on {event.get('host', 'this host')}", event.get("pid"))
        row = rows.setdefault(key, len(rows) + 1)
        end = float(event["time"]) * 1e6
        start = end - event["seconds"] * 1e6
        slice_ = {"name": event["step"], "ph": "X", "ts": start, "dur": end - start, "args": event.get("detail", {})}
        found.append({**slice_, "pid": row, "tid": row})
        for kind, label in (("bytes", "memory of the step"), ("rss", "resident")):
            for at, size in ((start, event.get(f"{kind}_before")), (end, event.get(f"{kind}_after"))):
                if size is not None:
                    found.append({"name": label, "ph": "C", "ts": at, "pid": row, "args": {"bytes": size}})
    named = [
        {"name": "process_name", "ph": "M", "pid": row, "args": {"name": f"{what}, process {pid}"}}
        for (what, pid), row in rows.items()
    ]
    return {"traceEvents": [*named, *found], "displayTimeUnit": "ms"}


def write(events: Iterable[Mapping[str, Any]], path: str) -> None:
    """Write the trace.

    Raises:
        EventsError: the file cannot be written.
    """
    try:
        Path(path).write_text(json.dumps(of_events(events)), encoding="utf-8")
    except OSError as error:
        raise EventsError(f"--out {path} cannot be written: {error.strerror}") from None
