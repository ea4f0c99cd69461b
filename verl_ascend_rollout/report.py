"""What doctor, smoke and compare say: one form on every platform, as JSON, Markdown and JUnit XML.

A `Report` is facts, checks and sections.  Each check has a verdict, the evidence that it rests on, how sure that is,
and what it would cost to be wrong.  Everything that turns into text is redacted on the way (see `redaction`).
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args
from xml.etree import ElementTree

import msgspec

from verl_ascend_rollout.redaction import redact

SCHEMA = "1.0"
"""Major and minor version of the JSON: a reader takes any minor version of its own major version."""

LARGEST = 32 * 2**20
"""The largest file that is read as a report, in bytes.  Ours have kilobytes."""

MOST_SHOWN = 8
"""Entries of a list that a table of facts shows; the JSON has all of them."""

MANY_FACTS = 40
"""From here on the facts are something to look up, and come after what is to be read."""

Verdict = Literal["pass", "fail", "warn", "skip", "unknown"]
Confidence = Literal["measured", "read", "inferred"]
Risk = Literal["none", "low", "medium", "high"]

WORST_FIRST: tuple[Verdict, ...] = ("fail", "warn", "unknown", "pass", "skip")


class ReportError(ValueError):
    """A file that is no report of ours, or one that cannot be written.  The message is one sentence."""


@dataclass(frozen=True)
class Evidence:
    """What a check rests on.

    Attributes:
        where: `file:line` of an installed source or a setting, or `probe` where something was tried.
        what: what is there, or what came out.
    """

    where: str
    what: str


@dataclass(frozen=True)
class Check:
    """One question and its answer.

    Attributes:
        name: short, of words joined by `-` and `.`, the same in every run: `vllm.shadowed`, `kv-cache.free`.
        verdict: `pass`, `fail`, `warn` (works, perhaps not as meant), `skip` (does not apply here: the summary says
            why), `unknown` (could not be told).
        summary: one sentence.
        evidence: what the verdict rests on.
        confidence: `measured` (tried here), `read` in the source or file that the evidence names, or `inferred`.
        risk: what it costs if the check fails or its answer is wrong.
        advice: what to do; empty where there is nothing to do.
        seconds: how long it took.
    """

    name: str
    verdict: Verdict
    summary: str
    evidence: tuple[Evidence, ...] = ()
    confidence: Confidence = "measured"
    risk: Risk = "none"
    advice: str = ""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        for value, allowed in ((self.verdict, Verdict), (self.confidence, Confidence), (self.risk, Risk)):
            if value not in get_args(allowed):
                raise ValueError(f"check {self.name!r}: {value!r} is none of {', '.join(get_args(allowed))}")
        if not (math.isfinite(self.seconds) and self.seconds >= 0):
            raise ValueError(f"check {self.name!r} took {self.seconds} s, which is no duration")


@dataclass(frozen=True)
class Section:
    """One part of a report that people read: prose, then a table, then verbatim text; each may be missing.

    Attributes:
        title: its heading.
        text: Markdown.
        columns: the table's headings.
        rows: the table's cells, as many in each row as there are columns.
        verbatim: shown as it is: an engine's output, a script.
        before_checks: shown before the facts and the checks: what people look at first.
    """

    title: str
    text: str = ""
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    verbatim: str = ""
    before_checks: bool = False

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"section {self.title!r}: {len(row)} cells under {len(self.columns)} columns")


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Report:
    """What one run of doctor, smoke or compare found.

    Attributes:
        kind: `doctor`, `smoke`, `compare`.
        title: the heading.
        facts: what was found or measured, as JSON values; in bytes and seconds, with the unit in the name.
        checks: in the order in which they are shown.
        sections: what is shown after the checks, or before them where they say so.
        created: when, in UTC, as ISO 8601.
        schema: version of this form, `SCHEMA`.
    """

    kind: str
    title: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    sections: tuple[Section, ...] = ()
    created: str = field(default_factory=_now)
    schema: str = SCHEMA

    @property
    def verdict(self) -> Verdict:
        """The worst of the checks; `unknown` where not one of them gave an answer."""
        found = {check.verdict for check in self.checks}
        for verdict in WORST_FIRST:
            if verdict in found and verdict != "skip":
                return verdict
        return "unknown"

    @property
    def risk(self) -> Risk:
        """The highest risk among the checks that did not pass."""
        levels = get_args(Risk)
        open_ends = [levels.index(check.risk) for check in self.checks if check.verdict in ("fail", "warn", "unknown")]
        highest: Risk = levels[max(open_ends, default=0)]
        return highest

    @property
    def exit_code(self) -> int:
        """1 where a check failed, else 0."""
        return 1 if self.verdict == "fail" else 0

    def counts(self) -> dict[Verdict, int]:
        """How many checks have each verdict, the worst first; verdicts that none has are left out."""
        counted = {verdict: sum(check.verdict == verdict for check in self.checks) for verdict in WORST_FIRST}
        return {verdict: number for verdict, number in counted.items() if number}

    def verdict_line(self) -> str:
        """The verdict as one line: `FAIL: 2 fail, 1 warn, 20 pass; risk high`."""
        numbers = ", ".join(f"{number} {verdict}" for verdict, number in self.counts().items())
        return f"{self.verdict.upper()}: {numbers or 'no checks'}; risk {self.risk}"

    def redacted(self) -> Report:
        """The report without secrets, and without the names of this machine and its user."""
        plain = _map_text(msgspec.to_builtins(self), redact)
        return msgspec.convert(plain, Report)

    def to_json(self) -> str:
        """The report as JSON, redacted, with its verdict beside it.  JSON has no NaN: it becomes the text `nan`."""
        plain = msgspec.to_builtins(self.redacted())
        plain = {"schema": plain.pop("schema"), "kind": plain.pop("kind"), "verdict": self.verdict, **plain}
        return msgspec.json.format(msgspec.json.encode(_finite(plain)), indent=2).decode() + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, name: str = "the report") -> Report:
        """Read what `to_json` wrote.

        Args:
            text: the JSON.
            name: what to call it in an error: the file.

        Raises:
            ReportError: it is no JSON, or no report, or one in another major version of the schema.
        """
        try:
            head = msgspec.json.decode(text, type=_Head)
            major = int(re.fullmatch(r"([0-9]{1,9})\.[0-9]{1,9}", head.schema)[1])  # type: ignore[index]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, TypeError) as error:
            raise ReportError(f"{name} is no report of ascend-safe: {_reason(error)}") from None
        if major != int(SCHEMA.partition(".")[0]):
            raise ReportError(
                f"{name} has schema {head.schema}, and this ascend-safe reads schema {SCHEMA}: write it again, or read "
                "it, with the release that fits"
            )
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
            raise ReportError(f"{name} is no report of ascend-safe: {_reason(error)}") from None

    def to_markdown(self) -> str:
        """The report for people, redacted."""
        return _markdown(self.redacted())

    def to_junit(self) -> str:
        """The report for a CI system, redacted: one test case a check."""
        return _junit(self.redacted())


class _Head(msgspec.Struct):
    schema: str
    kind: str


def read(path: str | os.PathLike[str]) -> Report:
    """Read a report from a file.

    Raises:
        ReportError: the file cannot be read, is far too large, or is no report; see `Report.from_json`.
    """
    file = Path(path)
    try:
        size = file.stat().st_size
        if size > LARGEST:
            raise ReportError(
                f"{file} has {size / 2**20:.0f} MiB, and a report has at most {LARGEST / 2**20:.0f}: it is none"
            )
        with file.open("rb") as opened:
            text = opened.read(LARGEST + 1)  # a pipe or a device has no size
        if len(text) > LARGEST:
            raise ReportError(f"{file} has more than {LARGEST / 2**20:.0f} MiB, and no report has: it is none")
    except OSError as error:
        raise ReportError(f"{file} cannot be read: {error.strerror}") from None
    return Report.from_json(text, str(file))


FORMS: dict[str, Callable[[Report], str]] = {
    "json": Report.to_json,
    "markdown": Report.to_markdown,
    "junit": Report.to_junit,
}
"""How a report is written, by name."""


def write(report: Report, path: str | os.PathLike[str], form: str) -> None:
    """Write a report into a file, making its folder.

    Args:
        report: what to write.
        path: the file; one that is there is replaced.
        form: `json`, `markdown` or `junit`.

    Raises:
        ReportError: the file cannot be written.
    """
    text = FORMS[form](report)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ReportError(f"{path} cannot be written: {error.strerror}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, TypeError):
        return "its schema is no version"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error).rstrip(".") or type(error).__name__


def _map_text(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_text(key, change): _map_text(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_text(item, change) for item in value]
    return value


def _finite(value: Any) -> Any:
    """msgspec writes NaN as null, and null reads as "not measured"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value


def _markdown(report: Report) -> str:
    blocks = [f"# {_line(report.title)}", f"**{report.verdict_line()}** ({report.kind}, {report.created})"]
    for section in report.sections:
        if section.before_checks:
            blocks += _section(section)
    facts = []
    if report.facts:
        rows = tuple((name, _shown(value)) for name, value in _flat(report.facts))
        facts = ["## Facts", markdown_table(("fact", "value"), rows)]
        if len(rows) < MANY_FACTS:
            blocks += facts
            facts = []
    if report.checks:
        rows_of_checks = tuple(
            (check.verdict, check.name, check.summary, check.confidence, check.risk) for check in report.checks
        )
        blocks += ["## Checks", markdown_table(("verdict", "check", "finding", "confidence", "risk"), rows_of_checks)]
        for check in report.checks:
            if check.evidence or check.advice:
                blocks.append("\n".join(_details(check)))
    for section in report.sections:
        if not section.before_checks:
            blocks += _section(section)
    blocks += facts
    blocks.append(f"Verdict: **{report.verdict_line()}**")
    return "\n\n".join(blocks) + "\n"


def _section(section: Section) -> list[str]:
    blocks = [f"## {_line(section.title)}"]
    if section.text:
        blocks.append(section.text.strip())
    if section.columns:
        blocks.append(markdown_table(section.columns, section.rows))
    if section.verbatim:
        blocks.append(_fenced(section.verbatim))
    return blocks


def markdown_table(columns: tuple[str, ...], rows: tuple[tuple[str, ...], ...]) -> str:
    """A table in GitHub's Markdown."""
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _details(check: Check) -> list[str]:
    lines = [f"### {check.verdict}: {check.name}", ""]
    lines += [
        f"- `{' '.join(_printable(evidence.where).split())}`: {_line(evidence.what)}" for evidence in check.evidence
    ]
    if check.advice:
        lines.append(f"- What to do: {_line(check.advice)}")
    return lines


def _line(text: str) -> str:
    return " ".join(_printable(text).split()).replace("<", "&lt;")


def _cell(text: str) -> str:
    return "<br>".join(_printable(text).replace("<", "&lt;").strip().splitlines()).replace("|", "\\|")


def _fenced(text: str) -> str:
    text = _printable(text)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text.rstrip()}\n{fence}"


def _flat(facts: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{above}{name}.")
        else:
            rows.append((f"{above}{name}", value))
    return rows


def _shown(value: Any) -> str:
    if value is None:
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        if value and isinstance(value[0], Mapping):
            return f"{len(value)} (see the JSON)"
        if len(value) > MOST_SHOWN:
            return f"{', '.join(_shown(item) for item in value[:MOST_SHOWN])}, ... ({len(value)} in all)"
        return ", ".join(_shown(item) for item in value)
    return str(value)


def _junit(report: Report) -> str:
    """JUnit XML as Jenkins, GitLab and GitHub's actions read it (the schema of Jenkins' xUnit plug-in).

    It knows neither warnings nor "unknown": the first pass and say so in their output, the second are skipped.
    """
    failed = sum(check.verdict == "fail" for check in report.checks)
    skipped = sum(check.verdict in ("skip", "unknown") for check in report.checks)
    totals = {
        "name": _printable(f"ascend-safe {report.kind}"),
        "tests": str(len(report.checks)),
        "failures": str(failed),
        "errors": "0",
        "time": f"{sum(check.seconds for check in report.checks):.3f}",
    }
    root = ElementTree.Element("testsuites", totals)
    stamp = report.created.removesuffix("+00:00")
    suite = ElementTree.SubElement(
        root, "testsuite", {**totals, "skipped": str(skipped), "timestamp": _printable(stamp)}
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _flat({"schema": report.schema, "title": report.title, **report.facts}):
        ElementTree.SubElement(properties, "property", {"name": _printable(name), "value": _printable(_shown(value))})
    for check in report.checks:
        case = ElementTree.SubElement(
            suite,
            "testcase",
            {
                "classname": _printable(f"ascend-safe.{report.kind}"),
                "name": _printable(check.name),
                "time": f"{check.seconds:.3f}",
            },
        )
        told = "\n".join(
            [
                f"{check.verdict}: {check.summary}",
                *(f"{evidence.where}: {evidence.what}" for evidence in check.evidence),
                *([f"What to do: {check.advice}"] if check.advice else []),
                f"confidence: {check.confidence}; risk: {check.risk}",
            ]
        )
        if check.verdict == "fail":
            failure = ElementTree.SubElement(case, "failure", {"message": _printable(check.summary), "type": "check"})
            failure.text = _printable(told)
        elif check.verdict in ("skip", "unknown"):
            ElementTree.SubElement(case, "skipped", {"message": _printable(f"{check.verdict}: {check.summary}")})
        if check.verdict != "fail":
            ElementTree.SubElement(case, "system-out").text = _printable(told)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def _printable(text: str) -> str:
    """The text without a terminal's colours, and without other characters that XML 1.0 cannot have."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\N{REPLACEMENT CHARACTER}", text)


def timed(check: Check, seconds: float) -> Check:
    """The check with its duration."""
    return dataclasses.replace(check, seconds=seconds)
