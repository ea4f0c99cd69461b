"""The side-by-side report: each report beside the first, in checks, numbers, and sections as people read them.

A check's name is the same in every run; with more than two reports the report's number follows it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from verl_ascend_rollout.tools import wording
from verl_ascend_rollout.tools.compare import explain
from verl_ascend_rollout.tools.compare.outputs import Agreement, agreement
from verl_ascend_rollout.tools.compare.reading import Run
from verl_ascend_rollout.tools.compare.times import Comparison, compare
from verl_ascend_rollout.tools.report import Check, Evidence, Report, Section, Verdict
from verl_ascend_rollout.tools.smoke import tables

TOPICS = {"first": "times.first", "warm": "times.warm", "load": "load", "memory": "memory"}
"""The check of each topic."""

PARTS = {
    **{part: f"its {part}" for part in ("platform", "model", "engine", "load", "memory")},
    **{"first": "a first call", "warm": "a warm call", "output": "an output"},
}
"""What a run records, in the order of a report."""


@dataclass(frozen=True)
class Pair:
    """One report against the baseline: each quantity by name, and what they said."""

    base: Run
    other: Run
    compared: dict[str, Comparison]
    agreement: Agreement


def pairs_of(runs: Sequence[Run]) -> list[Pair]:
    """Compare each run with the first."""
    base = runs[0]
    return [Pair(base, run, compare(base, run), agreement(base, run)) for run in runs[1:]]


def report_of(runs: Sequence[Run], pairs: Sequence[Pair]) -> Report:
    """Build the report: all numbers in its facts, all verdicts in its checks."""
    models = {run.smoke.model.name for run in runs if run.smoke.model}
    title = f"Smoke reports side by side: {wording.listed([run.label for run in runs])}"
    if len(models) == 1:
        title += f"; {wording.name(models.pop(), 80)}"
    checks = tuple(_checks(runs, pairs))
    return Report("compare", title, _facts(runs, pairs), checks, tuple(_sections(runs, pairs, checks)))


def _checks(runs: Sequence[Run], pairs: Sequence[Pair]) -> Iterator[Check]:
    """Yield all checks: the reports' own verdicts first."""
    for number, run in enumerate(runs, 1):
        yield _of_report(run, f"report.{number}")
    for number, pair in enumerate(pairs, 2):
        suffix = f".{number}" if len(pairs) > 1 else ""
        for check in (*pair.agreement.checks, *(_of_topic(pair, topic) for topic in TOPICS)):
            yield dataclasses.replace(check, name=check.name + suffix)


def _of_report(run: Run, name: str) -> Check:
    report = run.report
    failed = {wording.name(check.name, 60): check for check in report.checks if check.verdict == "fail"}
    counts = ", ".join(f"{count} {verdict}" for verdict, count in report.counts().items()) or "no checks"
    if run.smoke.ended_in != "done":
        missing = [called for part, called in PARTS.items() if run.get(part) is None]
        summary = f"{run.label}: smoke ended in {run.ended_in}"
        summary += f", before it had recorded {wording.listed(missing)}" if missing else ""
        advice = "mend that first, and run smoke there again"
    elif report.verdict == "fail":
        summary = f"{run.label}: smoke's own checks failed: {', '.join(list(failed)[:10])} ({counts})"
        advice = "mend that first: what it measured is in doubt"
    else:
        summary = f"{run.label}: smoke's own checks: {counts}"
        return Check(name, report.verdict, summary, risk="none" if report.verdict == "pass" else "low")
    evidence = tuple(
        Evidence(f"{run.label}, {of}", wording.quoted(check.summary, 200)) for of, check in list(failed.items())[:10]
    )
    return Check(name, "fail", summary, evidence, risk="high", advice=advice)


def _of_topic(pair: Pair, topic: str) -> Check:
    ours = [comparison for comparison in pair.compared.values() if comparison.quantity.topic == topic]
    told = [f"{found.quantity.title} {found.ratio_shown}" for found in ours if found.ratio is not None]
    who = f"{pair.other.label} against {pair.base.label}"
    # The parts of the load need no reason each: they have that of the whole.
    main = [pair.compared["load.total"]] if topic == "load" else ours
    if told:
        refused = [f"{found.quantity.title} ({'; '.join(found.refused)})" for found in main if found.refused]
        more = f"; not compared: {', '.join(refused)}" if refused else ""
        return Check(TOPICS[topic], "pass", f"{who}: {', '.join(told)}{more}")
    reasons = dict.fromkeys(reason for comparison in main for reason in comparison.refused)
    return Check(TOPICS[topic], "skip", f"{who}: not compared: {'; '.join(reasons)}")


def _facts(runs: Sequence[Run], pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return all numbers, as JSON values."""
    return {
        "baseline": runs[0].label,
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
            for run in runs
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
            for pair in pairs
            for one in pair.compared.values()
        ],
        "agreement": [{"report": pair.other.label, **pair.agreement.facts()} for pair in pairs],
    }


def _sections(runs: Sequence[Run], pairs: Sequence[Pair], checks: tuple[Check, ...]) -> Iterator[Section]:
    """Yield the sections in the order that people read: what a hand-written report has, and what it lacks."""
    columns: Mapping[str, tables.Facts] = {run.label: run for run in runs}
    ended = ("" if run.smoke.ended_in == "done" else f", ended in {run.ended_in}" for run in runs)
    verdicts = [run.report.verdict.upper() + how for run, how in zip(runs, ended, strict=True)]
    dates = [wording.name(run.report.created, 40) for run in runs]
    more = (("smoke's verdict", *verdicts), ("date", *dates))
    text = f"The others are compared with {runs[0].label}."
    yield tables.table("Summary", tables.SUMMARY, columns, text, more=more, before_checks=True)
    yield tables.table("Model", tables.MODEL, columns)
    yield tables.table("Configuration", tables.CONFIGURATION, columns)
    yield tables.versions(columns)
    yield from map(_output, runs)
    yield _agreement(runs[0], pairs)
    yield tables.table("Load", tables.LOAD, columns)
    yield _why("load", runs, pairs, explain.load_split, explain.of_load)
    yield tables.table("Inference", tables.INFERENCE, columns, every=True)
    yield _why("inference", runs, pairs, explain.first_and_warm, explain.of_inference)
    yield _comparable(pairs)
    yield tables.table("Memory", tables.MEMORY, columns, tables.MEMORY_TEXT)
    told = (check for check in checks if check.verdict != "skip" and not check.name.startswith("report."))
    yield Section("Key observations", _bullets(f"{check.summary}." for check in told))
    yield Section("Platform notes", _bullets(note for run in runs for note in explain.notes(run)))
    yield from tables.warnings(columns)
    commands = [f"# {run.label}\n{_command(run)}" for run in runs]
    again = "ascend-safe compare " + " ".join(wording.verbatim(run.file, 300) for run in runs)
    yield Section(
        "Run it again",
        "The commands as they were given, each on its platform, and then this comparison:",
        verbatim="\n".join([*commands, "# the comparison", again]),
    )
    yield Section("Next steps", _bullets(explain.next_steps(runs, [pair.compared for pair in pairs])))
    yield Section("Conclusion", _conclusion(checks))


def _why(
    times: str,
    runs: Sequence[Run],
    pairs: Sequence[Pair],
    of_run: Callable[[Run], Iterator[str]],
    of_pair: Callable[[Run, Run, Mapping[str, Comparison]], Iterator[str]],
) -> Section:
    lines = [line for run in runs for line in of_run(run)]
    lines += [line for pair in pairs for line in of_pair(pair.base, pair.other, pair.compared)]
    return Section(f"Why the {times} times differ", _bullets(lines))


def _output(run: Run) -> Section:
    output, title = run.smoke.output, f"Output: {run.label}"
    if output is None:
        return Section(title, f"None: smoke ended in {run.ended_in}.")
    template = ", through the chat template" if output.chat_template else ""
    count = wording.many(len(output.token_ids), "token")
    return Section(
        title,
        f"{count}, finished by {tables.shown(output.finish_reason)}{template}.",
        verbatim=f"prompt: {wording.verbatim(output.prompt)}\nanswer: {wording.verbatim(output.text)}",
    )


def _agreement(base: Run, pairs: Sequence[Pair]) -> Section:
    rows = []
    for pair in pairs:
        for number, agreed in enumerate((pair.agreement, *pair.agreement.more), 1):
            of = pair.other.label + (f", prompt {number}" if pair.agreement.more else "")
            gap = agreed.divergence.gap if agreed.divergence else None
            cells = (
                "not compared" if agreed.equal_tokens is None else wording.number(agreed.equal_tokens),
                "-" if agreed.divergence is None else f"token {agreed.divergence.position}",
                "-" if gap is None else f"{gap:.3g}",
                agreed.prompt_logprobs.told() if agreed.prompt_logprobs else "not compared",
                agreed.answer_logprobs.told() if agreed.answer_logprobs else "not compared",
                "-" if agreed.tolerance is None else f"{agreed.tolerance:.3g}",
            )
            rows.append((of, *cells))
    columns = ("against the baseline", "equal tokens", "differs at", "gap there", "prompt", "answer", "tolerance")
    text = (
        f"Baseline: {base.label}. Log-probabilities are natural logarithms; the answer's are compared as far "
        "as its tokens are equal."
    )
    return Section("Agreement of the outputs", text, columns, tuple(rows))


def _comparable(pairs: Sequence[Pair]) -> Section:
    rows = [
        (
            one.quantity.title,
            pair.other.label,
            one.quantity.shown(one.value),
            f"{pair.base.label}: {one.quantity.shown(one.base)}",
            one.ratio_shown,
            "; ".join(one.refused or one.remarks),
        )
        for pair in pairs
        for one in pair.compared.values()
        if one.base or one.value  # else neither has any of it, or neither has recorded it
    ]
    columns = ("number", "report", "value", "baseline", "ratio to the baseline", "why not, or what to bear in mind")
    return Section("What may be compared, and what not", columns=columns, rows=tuple(rows))


def _command(run: Run) -> str:
    command = " ".join(wording.verbatim(run.smoke.command, 1000).split())
    if not command:
        return f"# its command is {wording.UNKNOWN}"
    return command if command.startswith(("ascend-safe", "python")) else f"ascend-safe {command}"


def _conclusion(checks: tuple[Check, ...]) -> str:
    verdict = Report("compare", "", checks=checks).verdict
    ends = {
        "pass": "The reports agree wherever they can be compared.",
        "warn": "Nothing failed, and something is to be looked at.",
        "fail": "Something failed: see the checks above.",
    }
    end = ends.get(verdict, "Too little is recorded, or too little is alike, to say that the platforms agree.")
    outputs = [check for check in checks if check.name.startswith("outputs.")]
    if verdict in ("pass", "warn") and all(check.verdict in ("skip", "unknown") for check in outputs):
        end = "The outputs were not compared: that the platforms agree is not shown."
    names = {of: ", ".join(check.name for check in checks if check.verdict == of) for of in get_args(Verdict)}
    return "\n".join([end, "", *(f"- {of}: {named}" for of, named in names.items() if named)])


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in dict.fromkeys(lines)) or "Nothing that the reports recorded."
