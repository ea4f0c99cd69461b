"""The sections of a comparison, in the order that people read: what a hand-written report has, and what it lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import get_args

from verl_ascend_rollout.tools import wording
from verl_ascend_rollout.tools.compare import explain
from verl_ascend_rollout.tools.compare.build import SideBySide, checks_of, facts_of
from verl_ascend_rollout.tools.compare.outputs import Agreement
from verl_ascend_rollout.tools.compare.reading import Run
from verl_ascend_rollout.tools.compare.times import Comparison
from verl_ascend_rollout.tools.report import Check, Report, Section, Verdict
from verl_ascend_rollout.tools.smoke import tables


def report_of(found: SideBySide) -> Report:
    """Build the report: all numbers in its facts, all verdicts in its checks."""
    models = {run.smoke.model.name for run in found.runs if run.smoke.model}
    title = f"Smoke reports side by side: {wording.listed([run.label for run in found.runs])}"
    if len(models) == 1:
        title += f"; {wording.name(models.pop(), 80)}"
    checks = tuple(checks_of(found))
    return Report("compare", title, facts_of(found), checks, tuple(_sections(found, checks)))


def _sections(found: SideBySide, checks: tuple[Check, ...]) -> Iterator[Section]:
    runs: Mapping[str, tables.Facts] = {run.label: run for run in found.runs}
    ended = ("" if run.smoke.ended_in == "done" else f", ended in {run.ended_in}" for run in found.runs)
    verdicts = [run.report.verdict.upper() + how for run, how in zip(found.runs, ended, strict=True)]
    dates = [wording.name(run.report.created, 40) for run in found.runs]
    more = (("smoke's verdict", *verdicts), ("date", *dates))
    text = f"The others are compared with {found.runs[0].label}."
    yield tables.table("Summary", tables.SUMMARY, runs, text, more=more, before_checks=True)
    yield tables.table("Model", tables.MODEL, runs)
    yield tables.table("Configuration", tables.CONFIGURATION, runs)
    yield tables.versions(runs)
    yield from map(_output, found.runs)
    yield _agreement(found)
    yield tables.table("Load", tables.LOAD, runs)
    yield _why(found, "Why the load times differ", explain.load_split, explain.of_load)
    yield tables.table("Inference", tables.INFERENCE, runs, every=True)
    yield _why(found, "Why the inference times differ", explain.first_and_warm, explain.of_inference)
    yield _comparable(found)
    yield tables.table("Memory", tables.MEMORY, runs, tables.MEMORY_TEXT)
    told = (check for check in checks if check.verdict != "skip" and not check.name.startswith("report."))
    yield Section("Key observations", _bullets(f"{check.summary}." for check in told))
    yield Section("Platform notes", _bullets(note for run in found.runs for note in explain.notes(run)))
    yield tables.warnings(runs, harmless=True)
    yield tables.warnings(runs, harmless=False)
    commands = [f"# {run.label}\n{_command(run)}" for run in found.runs]
    again = "ascend-safe compare " + " ".join(wording.verbatim(run.file, 300) for run in found.runs)
    yield Section(
        "Run it again",
        "The commands as they were given, each on its platform, and then this comparison:",
        verbatim="\n".join([*commands, "# the comparison", again]),
    )
    yield Section("Next steps", _bullets(explain.next_steps(found.runs, [pair.compared for pair in found.pairs])))
    yield Section("Conclusion", _conclusion(checks))


def _why(
    found: SideBySide,
    title: str,
    of_run: Callable[[Run], Iterator[str]],
    of_pair: Callable[[Run, Run, Mapping[str, Comparison]], Iterator[str]],
) -> Section:
    lines = [line for run in found.runs for line in of_run(run)]
    lines += [line for pair in found.pairs for line in of_pair(pair.base, pair.other, pair.compared)]
    return Section(title, _bullets(lines))


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


def _agreement(found: SideBySide) -> Section:
    rows = []
    for pair in found.pairs:
        for number, agreed in enumerate((pair.agreement, *pair.agreement.more), 1):
            rows.append((pair.other.label + (f", prompt {number}" if pair.agreement.more else ""), *_agreed(agreed)))
    columns = ("against the baseline", "equal tokens", "differs at", "gap there", "prompt", "answer", "tolerance")
    text = (
        f"Baseline: {found.runs[0].label}. Log-probabilities are natural logarithms; the answer's are compared as far "
        "as its tokens are equal."
    )
    return Section("Agreement of the outputs", text, columns, tuple(rows))


def _agreed(agreed: Agreement) -> tuple[str, ...]:
    gap = agreed.divergence.gap if agreed.divergence else None
    return (
        wording.number(agreed.equal_tokens) if agreed.equal_tokens is not None else "not compared",
        "-" if agreed.divergence is None else f"token {agreed.divergence.position}",
        "-" if gap is None else f"{gap:.3g}",
        agreed.prompt.told() if agreed.prompt else "not compared",
        agreed.answer.told() if agreed.answer else "not compared",
        "-" if agreed.tolerance is None else f"{agreed.tolerance:.3g}",
    )


def _comparable(found: SideBySide) -> Section:
    rows = [
        (
            one.quantity.title,
            pair.other.label,
            one.quantity.shown(one.value),
            f"{pair.base.label}: {one.quantity.shown(one.base)}",
            one.ratio_shown,
            "; ".join(one.refused or one.remarks),
        )
        for pair in found.pairs
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
