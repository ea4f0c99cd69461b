"""Where a run's memory and time went, from its events: totals, the phases of each training step, and a picture."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from verl_ascend_rollout.events import EventsError, Log, load
from verl_ascend_rollout.tools import picture, terminal, trace
from verl_ascend_rollout.tools.arguments import check_outputs, file_name

Event = Mapping[str, Any]

PhaseName = Literal["generate", "free", "train", "sync", "init"]

PHASES: dict[PhaseName, tuple[str, str]] = {
    "generate": ("awake: generating", "#d5ecd5"),
    "free": ("sleep / free", "#e57373"),
    "train": ("asleep: training", "#e4dcef"),
    "sync": ("weight sync", "#ff9f40"),
    "init": ("wake up / init", "#64a0dc"),
}
"""Each phase's name for people, and its colour; the short ones are the strong ones."""

FREEING = ("free", "sleep")
TAKING = ("init", "wake_up")


@dataclass(frozen=True)
class Phase:
    """A stretch of time in which the engine did one thing, in seconds since the epoch."""

    name: PhaseName
    start: float
    end: float
    awake: bool = False  # whether the engine can generate after it


@dataclass
class Total:
    """What all steps of one kind in one kind of process took together."""

    step: str  # and `process`: see `events.Event`
    process: str
    count: int = 0
    seconds: float = 0.0
    bytes: int | None = None  # that they freed, took or loaded; `None` where the step moves none


def add_parser(commands: Any) -> None:
    """Add the sub-command to argparse's sub-parsers."""
    parser = commands.add_parser(
        "timeline",
        help="where a run's memory and time went, from its events",
        description="Print the totals of a run's lifecycle events (engine_kwargs.ascend_safe.events), and draw memory "
        "over time with the phases of each training step.",
    )
    parser.add_argument("events", type=file_name, metavar="EVENTS", help="the file of events: one JSON line each")
    parser.add_argument(
        "--out",
        type=file_name,
        metavar="FILE",
        help="draw into this file: .png, .svg or .pdf (needs matplotlib), or .json for Perfetto",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the totals of a file of events, and draw them where that is asked for.

    Raises:
        EventsError: the file has no events, or no picture can be drawn; raised after the totals are printed, it cannot
            be written.
        UsageError: the picture would overwrite the events.
    """
    out: str | None = arguments.out
    check_outputs({"--out": out}, [arguments.events])
    if out is not None and not out.endswith(".json"):
        picture.check(out, "--out", EventsError)
    log = read_log(arguments.events)
    problem: EventsError | None = None
    if out is not None:
        try:
            if out.endswith(".json"):
                trace.write(log.events, out)
            else:
                draw(log.events, out, title=terminal.plain(os.path.basename(arguments.events)))
        except EventsError as error:
            problem = error
    if arguments.json:
        print(json.dumps(report(log), indent=2))
    else:
        show(log)
        if out is not None and problem is None:
            print(f"drawn into {terminal.plain(out)}")
    if problem is not None:
        raise problem
    return 0


def read_log(path: str) -> Log:
    """Return the events of a file that has some.

    Raises:
        EventsError: it has none; see also `events.load`.
    """
    log = load(path)
    if log.events:
        return log
    if log.torn:
        raise EventsError(
            f"{path} is no file of events: none of its {log.torn} lines is one; give the file that "
            "engine_kwargs.ascend_safe.events named in the job"
        )
    raise EventsError(f"{path} is empty: the job wrote no event, or has not come to its first")


def totals(events: Iterable[Event]) -> list[Total]:
    """Return one `Total` for each kind of step and process, in the order in which they first came."""
    found: dict[tuple[str, str], Total] = {}
    for event in events:
        key = (event["step"], event["process"])
        total = found.setdefault(key, Total(*key))
        total.count += 1
        total.seconds += event["seconds"]
        if (moved := _moved(event)) is not None:
            total.bytes = (total.bytes or 0) + moved
    return list(found.values())


def phases(events: Iterable[Event]) -> list[Phase]:
    """Return what the engine did when, from the first event to the last.

    All workers and replicas are taken as one: a step lasts from the first that begins it to the last that ends it.
    Before the first step that frees memory, the engine is awake.
    """
    found: list[Phase] = []
    awake = True
    since: float | None = None
    for step in sorted(_steps(list(events)), key=lambda step: step.start):
        if since is not None and step.start > since:
            found.append(Phase("generate" if awake else "train", since, step.start))
        last = found[-1] if found else None
        if last is not None and last.name == step.name and step.start <= last.end:
            found[-1] = Phase(step.name, last.start, max(last.end, step.end))
        elif step.name != "generate":
            # Workers of one engine do not take the same time: the next step begins where the last of them ended.
            start = max(step.start, last.end) if last is not None else step.start
            if step.end > start:
                found.append(Phase(step.name, start, step.end))
        since = step.end if since is None else max(since, step.end)
        awake = awake if step.name == "sync" else step.awake
    return found


def report(log: Log) -> dict[str, Any]:
    """Totals and phases as JSON values: seconds and bytes."""
    found = phases(log.events)
    first, last = _span(log.events)
    took = {name: sum(phase.end - phase.start for phase in found if phase.name == name) for name in PHASES}
    whole = sum(took.values()) or 1.0
    return {
        "events": len(log.events),
        "torn": log.torn,
        "start": first,
        "seconds": last - first,
        "steps": [vars(total) for total in totals(log.events)],
        "phases": {name: {"seconds": seconds, "share": seconds / whole} for name, seconds in took.items()},
        "timeline": [
            {"phase": phase.name, "start": phase.start, "seconds": phase.end - phase.start} for phase in found
        ],
    }


def show(log: Log) -> None:
    """Print totals and phases for a person."""
    facts = report(log)
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts["start"]))
    print(f"{facts['events']} events over {facts['seconds']:.1f} s, from {began}")
    if log.torn:
        print(f"{log.torn} line(s) are no events and are left out: a job that is killed may tear its last one")
    rows = []
    for total in totals(log.events):
        mean = total.seconds / total.count * 1000
        moved = "-" if total.bytes is None else f"{total.bytes / 2**30:.3f}"
        rows.append((total.step, total.process, str(total.count), f"{total.seconds:.3f}", f"{mean:.1f}", moved))
    print()
    terminal.table(("step", "process", "count", "seconds", "mean ms", "GiB"), rows, numbers=range(2, 6))
    print()
    found = [(label, facts["phases"][name]) for name, (label, _) in PHASES.items()]
    shares = [(label, f"{phase['seconds']:.3f}", f"{phase['share']:.1%}") for label, phase in found]
    terminal.table(("phase", "seconds", "share"), shares, numbers=range(1, 3))


def draw(events: Sequence[Event], path: str, title: str) -> None:
    """Draw memory over time, each phase shaded, and the number of each training step.

    Raises:
        EventsError: matplotlib is missing, does not know the format, or the file cannot be written.
    """
    first, last = _span(events)
    found = phases(events)
    with picture.figure(path, "--out", EventsError, figsize=(12, 4.8)) as (_, axes):
        from matplotlib.patches import Patch

        for phase in found:
            axes.axvspan(phase.start - first, phase.end - first, color=PHASES[phase.name][1], linewidth=0)
        axes.set_prop_cycle(color=["black", "#555555", "#7b3f00", "#a0785a", "#003c3c", "#5f8f8f"])
        lines = []
        for label, points in curves(events).items():
            style = "-" if label.startswith("KV") else "--"
            places = [at - first for at, _ in points], [size / 2**30 for _, size in points]
            lines += axes.plot(*places, style, label=label)
        for number, at in sync_numbers(events):
            place = (at - first, 1.0)
            axes.annotate(str(number), place, xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8)
        shaded = {phase.name for phase in found}
        patches = [Patch(color=colour, label=label) for name, (label, colour) in PHASES.items() if name in shaded]
        axes.legend(handles=[*lines, *patches], loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
        axes.set_xlim(0, max(last - first, 1e-3))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("seconds; above, the training step whose weights were sent")
        axes.set_ylabel("GiB")
        axes.set_title(title, loc="left", pad=18)


def curves(events: Iterable[Event]) -> dict[str, list[tuple[float, int]]]:
    """Memory by time, in bytes: for each worker its KV cache and its resident memory, for each replica its devices."""
    found: dict[str, list[tuple[float, int]]] = {}
    ordered = sorted(events, key=lambda event: float(event["time"]))
    several = len({str(event.get("host")) for event in ordered}) > 1  # two nodes may have one process number
    for event in ordered:
        start = event["time"] - event["seconds"]
        if event["process"] == "worker":
            worker = f"worker {event.get('pid')}" + (f" on {event.get('host')}" if several else "")
            labels = {"bytes": f"KV cache, {worker}", "rss": f"resident, {worker}"}
        else:
            labels = {"bytes": f"devices of replica {event.get('detail', {}).get('replica', 0)}", "rss": ""}
        for kind, label in labels.items():
            before, after = event.get(f"{kind}_before"), event.get(f"{kind}_after")
            if label and before is not None and after is not None:
                found.setdefault(label, []).extend([(start, before), (event["time"], after)])
    return found


def sync_numbers(events: Iterable[Event]) -> list[tuple[int, float]]:
    """Return the training step whose weights each sync sent, and the middle of that sync."""
    found: dict[int, float] = {}
    for event in events:
        number = event.get("detail", {}).get("global_steps")
        if event["step"] == "sync" and isinstance(number, int):
            found.setdefault(number, event["time"] - event["seconds"] / 2)
    return list(found.items())


def _steps(events: Sequence[Event]) -> Iterator[Phase]:
    """Yield the steps that begin or end a phase, as they were written."""
    # One sync leaves a line in each process: the outermost that wrote one spans the others.
    writers = [event["process"] for event in events if event["step"] == "sync"]
    outermost = next((process for process in ("trainer", "server", "worker") if process in writers), None)
    for event in events:
        step, detail, end = event["step"], event.get("detail", {}), float(event["time"])
        start = end - event["seconds"]
        if step == "decide":
            yield Phase("generate", end, end, awake=True)
        elif step in FREEING and detail.get("changed", True):
            yield Phase("free", start, end)
        elif step in TAKING and detail.get("changed", True):
            tags = detail.get("tags")
            yield Phase("init", start, end, awake=tags is None or "kv_cache" in tags)
        elif step == "sync" and event["process"] == outermost:
            yield Phase("sync", start, end)


def _moved(event: Event) -> int | None:
    before, after = event.get("bytes_before"), event.get("bytes_after")
    if before is not None and after is not None:
        return int(abs(after - before))
    loaded = event.get("detail", {}).get("bytes")
    return loaded if isinstance(loaded, int) and not isinstance(loaded, bool) else None


def _span(events: Iterable[Event]) -> tuple[float, float]:
    times = [float(event["time"]) for event in events]
    # The engine's own start is not part of the run that its events describe.
    starts = [event["time"] - (0 if event["step"] == "decide" else event["seconds"]) for event in events]
    return min(starts), max(times)
