"""The checks of a comparison: of each report, of the outputs, and of the times and sizes.

A name is the same in every run; with more than two reports the report's number follows it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from verl_ascend_rollout.checks.compare import wording
from verl_ascend_rollout.checks.compare.pairs import Pair, SideBySide
from verl_ascend_rollout.checks.compare.reading import Run
from verl_ascend_rollout.checks.compare.times import Comparison, Topic
from verl_ascend_rollout.report import Check, Evidence, Verdict

TOPICS: dict[Topic, str] = {"first": "times.first", "warm": "times.warm", "load": "load", "memory": "memory"}
"""The check of each topic."""


def checks_of(found: SideBySide) -> Iterator[Check]:
    """All checks: the reports' own verdicts first."""
    for number, run in enumerate(found.runs, 1):
        yield _of_report(run, number)
    for number, pair in enumerate(found.pairs, 2):
        suffix = f".{number}" if len(found.pairs) > 1 else ""
        for check in pair.agreement.checks:
            yield dataclasses.replace(check, name=check.name + suffix)
        for topic, name in TOPICS.items():
            yield _of_topic(pair, topic, name + suffix)


def _of_report(run: Run, number: int) -> Check:
    name, report = f"report.{number}", run.report
    failed = [check for check in report.checks if check.verdict == "fail"]
    evidence = tuple(
        Evidence(f"{run.label}, {wording.name(check.name, 60)}", wording.quoted(check.summary, 200))
        for check in failed[:10]
    )
    if run.smoke.ended_in != "done":
        missing = _missing(run)
        summary = f"{run.label}: smoke ended in {wording.name(run.smoke.ended_in, 40)}"
        summary += f", before it had recorded {wording.listed(missing)}" if missing else ""
        return Check(name, "fail", summary, evidence, risk="high", advice="mend that first, and run smoke there again")
    counts = ", ".join(f"{count} {verdict}" for verdict, count in report.counts().items()) or "no checks"
    verdict: Verdict = report.verdict
    if verdict == "fail":
        names = [wording.name(check.name, 60) for check in failed[:10]]
        summary = f"{run.label}: smoke's own checks failed: {', '.join(names)} ({counts})"
        return Check(
            name, "fail", summary, evidence, risk="high", advice="mend that first: what it measured is in doubt"
        )
    return Check(
        name, verdict, f"{run.label}: smoke's own checks: {counts}", risk="low" if verdict != "pass" else "none"
    )


def _missing(run: Run) -> list[str]:
    parts = ("platform", "model", "engine", "load", "memory", "first", "warm", "output")
    titles = {"first": "a first call", "warm": "a warm call", "output": "an output", "memory": "its memory"}
    return [titles.get(part, f"its {part}") for part in parts if getattr(run.smoke, part) is None]


def _of_topic(pair: Pair, topic: Topic, name: str) -> Check:
    ours = [comparison for comparison in pair.compared.values() if comparison.quantity.topic == topic]
    told = [
        f"{comparison.quantity.title} {ratio_of(comparison)}" for comparison in ours if comparison.ratio is not None
    ]
    who = f"{pair.other.label} against {pair.base.label}"
    # The parts of the load need no reason each: they have that of the whole.
    main = [pair.compared["load.total"]] if topic == "load" else ours
    if told:
        summary = f"{who}: {', '.join(told)}"
        refused = [f"{c.quantity.title} ({'; '.join(c.refused)})" for c in main if c.refused]
        return Check(name, "pass", summary + (f"; not compared: {', '.join(refused)}" if refused else ""))
    reasons = list(dict.fromkeys(reason for comparison in main for reason in comparison.refused))
    return Check(name, "skip", f"{who}: not compared: {'; '.join(reasons)}")


def ratio_of(comparison: Comparison) -> str:
    """A ratio as it is shown: `21.9 x`."""
    ratio = comparison.ratio
    if ratio is None:
        return "not compared"
    number = f"{ratio:.2f}" if 0.1 <= ratio < 100 else f"{ratio:.3g}"
    return f"{number} x"
