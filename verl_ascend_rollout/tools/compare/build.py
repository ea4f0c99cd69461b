"""The side-by-side report: each report beside the first, the checks, and all numbers.

A check's name is the same in every run; with more than two reports the report's number follows it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from verl_ascend_rollout.tools import wording
from verl_ascend_rollout.tools.compare.outputs import Agreement, agreement
from verl_ascend_rollout.tools.compare.reading import Run
from verl_ascend_rollout.tools.compare.times import Comparison, compare
from verl_ascend_rollout.tools.report import Check, Evidence, Risk

TOPICS = {"first": "times.first", "warm": "times.warm", "load": "load", "memory": "memory"}
"""The check of each topic."""

PARTS = {"first": "a first call", "warm": "a warm call", "output": "an output"}
"""What a run records that is not called by its own name."""


@dataclass(frozen=True)
class Pair:
    """One report against the baseline: each quantity by name, and what they said."""

    base: Run
    other: Run
    compared: dict[str, Comparison]
    agreement: Agreement


@dataclass(frozen=True)
class SideBySide:
    """All reports, and each but the first against the first."""

    runs: tuple[Run, ...]
    pairs: tuple[Pair, ...]


def side_by_side(runs: Sequence[Run]) -> SideBySide:
    """Compare each run with the first."""
    base = runs[0]
    return SideBySide(tuple(runs), tuple(Pair(base, run, compare(base, run), agreement(base, run)) for run in runs[1:]))


def checks_of(found: SideBySide) -> Iterator[Check]:
    """Yield all checks: the reports' own verdicts first."""
    for number, run in enumerate(found.runs, 1):
        yield _of_report(run, f"report.{number}")
    for number, pair in enumerate(found.pairs, 2):
        suffix = f".{number}" if len(found.pairs) > 1 else ""
        for check in pair.agreement.checks:
            yield dataclasses.replace(check, name=check.name + suffix)
        for topic, name in TOPICS.items():
            yield _of_topic(pair, topic, name + suffix)


def _of_report(run: Run, name: str) -> Check:
    report = run.report
    failed = {wording.name(check.name, 60): check for check in report.checks if check.verdict == "fail"}
    evidence = tuple(
        Evidence(f"{run.label}, {of}", wording.quoted(check.summary, 200)) for of, check in list(failed.items())[:10]
    )
    counts = ", ".join(f"{count} {verdict}" for verdict, count in report.counts().items()) or "no checks"
    if run.smoke.ended_in != "done":
        summary = f"{run.label}: smoke ended in {run.ended_in}"
        parts = ("platform", "model", "engine", "load", "memory", "first", "warm", "output")
        missing = [PARTS.get(part, f"its {part}") for part in parts if run.get(part) is None]
        summary += f", before it had recorded {wording.listed(missing)}" if missing else ""
        return Check(name, "fail", summary, evidence, risk="high", advice="mend that first, and run smoke there again")
    if report.verdict == "fail":
        summary = f"{run.label}: smoke's own checks failed: {', '.join(list(failed)[:10])} ({counts})"
        advice = "mend that first: what it measured is in doubt"
        return Check(name, "fail", summary, evidence, risk="high", advice=advice)
    risk: Risk = "none" if report.verdict == "pass" else "low"
    return Check(name, report.verdict, f"{run.label}: smoke's own checks: {counts}", risk=risk)


def _of_topic(pair: Pair, topic: str, name: str) -> Check:
    ours = [comparison for comparison in pair.compared.values() if comparison.quantity.topic == topic]
    told = [f"{found.quantity.title} {found.ratio_shown}" for found in ours if found.ratio is not None]
    who = f"{pair.other.label} against {pair.base.label}"
    # The parts of the load need no reason each: they have that of the whole.
    main = [pair.compared["load.total"]] if topic == "load" else ours
    if told:
        refused = [f"{found.quantity.title} ({'; '.join(found.refused)})" for found in main if found.refused]
        more = f"; not compared: {', '.join(refused)}" if refused else ""
        return Check(name, "pass", f"{who}: {', '.join(told)}{more}")
    reasons = list(dict.fromkeys(reason for comparison in main for reason in comparison.refused))
    return Check(name, "skip", f"{who}: not compared: {'; '.join(reasons)}")


def facts_of(found: SideBySide) -> dict[str, Any]:
    """Return all numbers, as JSON values."""
    return {
        "baseline": found.runs[0].label,
        "reports": [
            {
                "label": run.label,
                "file": wording.name(run.file, 200),
                "created": wording.name(run.report.created, 40),
                "verdict": run.report.verdict,
                "ended_in": run.ended_in,
                "platform": wording.name(run.smoke.platform.name, 40) if run.smoke.platform else None,
                "stand_in": wording.name(run.stand_in, 200),
                "vllm": wording.name(run.smoke.vllm, 40) if run.smoke.vllm else None,
            }
            for run in found.runs
        ],
        "comparisons": [
            {
                "report": pair.other.label,
                "quantity": one.quantity.name,
                "unit": one.quantity.unit,
                "baseline": one.base,
                "value": one.value,
                "ratio": one.ratio,
                "refused": list(one.refused),
                "remarks": list(one.remarks),
            }
            for pair in found.pairs
            for one in pair.compared.values()
        ],
        "agreement": [
            {
                "report": pair.other.label,
                "tolerance": pair.agreement.tolerance,
                "equal_tokens": pair.agreement.equal_tokens,
                **{
                    key: dataclasses.asdict(part) if part else None
                    for key, part in (
                        ("divergence", pair.agreement.divergence),
                        ("prompt_logprobs", pair.agreement.prompt),
                        ("answer_logprobs", pair.agreement.answer),
                    )
                },
            }
            for pair in found.pairs
        ],
    }
