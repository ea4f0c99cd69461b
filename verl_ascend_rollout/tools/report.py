"""What doctor, smoke and compare say: one form on every platform, as JSON, Markdown and JUnit XML.

A `Report` is facts, checks and sections.  Each check has a verdict, the evidence that it rests on, how sure that is,
and what it would cost to be wrong.  Everything that turns into text is redacted on the way (see `redaction`).
"""

from __future__ import annotations

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

from verl_ascend_rollout.policy.decision import Confidence
from verl_ascend_rollout.tools.redaction import redact

SCHEMA = "1.0"
"""Major and minor version of the JSON: a reader takes any minor version of its own major version."""

LARGEST = 32 * 2**20
"""The largest file that is read as a report, in bytes.  Ours have kilobytes."""

MOST_SHOWN = 8
"""Entries of a list that a table of facts shows; the JSON has all of them."""

MANY_FACTS = 40
"""From here on the facts are something to look up, and come after what is to be read."""

Verdict = Literal["pass", "fail", "warn", "skip", "unknown"]
Risk = Literal["none", "low", "medium", "high"]

WORST_FIRST: tuple[Verdict, ...] = ("fail", "warn", "unknown", "pass", "skip")


class ReportError(ValueError):
    """A file that is no report of ours, or one that cannot be written.  The message is one sentence."""


@dataclass(frozen=True)
class Evidence:
    """What a check rests on."""

    where: str  # `file:line` of an installed source or a setting, or `probe` where something was tried
    what: str  # what is there, or what came out


@dataclass(frozen=True)
class Check:
    """One question and its answer.

    Raises:
        ValueError: a value is none of those that there are.
    """

    name: str  # words joined by `-` and `.`, the same in every run: `vllm.shadowed`, `kv-cache.free`
    verdict: Verdict  # `warn`: works, perhaps not as meant; `skip`: does not apply here; `unknown`: could not be told
    summary: str  # one sentence
    evidence: tuple[Evidence, ...] = ()
    confidence: Confidence = "measured"  # tried here; or `read` in what the evidence names; or `inferred`
    risk: Risk = "none"  # what it costs if the check fails or its answer is wrong
    advice: str = ""  # what to do; empty where there is nothing to do
    seconds: float = 0.0  # how long it took

    def __post_init__(self) -> None:
        for value, allowed in ((self.verdict, Verdict), (self.confidence, Confidence), (self.risk, Risk)):
            if value not in get_args(allowed):
                raise ValueError(f"check {self.name!r}: {value!r} is none of {', '.join(get_args(allowed))}")
        if not (math.isfinite(self.seconds) and self.seconds >= 0):
            raise ValueError(f"check {self.name!r} took {self.seconds} s, which is no duration")


@dataclass(frozen=True)
class Section:
    """One part of a report that people read: prose, then a table, then verbatim text; each may be missing."""

    title: str
    text: str = ""  # Markdown
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()  # as many cells in each as there are columns
    verbatim: str = ""  # shown as it is: an engine's output, a script
    before_checks: bool = False  # shown before the facts and the checks: what people look at first

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"section {self.title!r}: {len(row)} cells under {len(self.columns)} columns")


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Report:
    """What one run of doctor, smoke or compare found."""

    kind: str  # `doctor`, `smoke`, `compare`
    title: str
    facts: Mapping[str, Any] = field(default_factory=dict)  # JSON values; in bytes and seconds
    checks: tuple[Check, ...] = ()  # in the order in which they are shown
    sections: tuple[Section, ...] = ()
    created: str = field(default_factory=_now)  # in UTC, as ISO 8601
    schema: str = SCHEMA

    @property
    def verdict(self) -> Verdict:
        """The worst of the checks; `unknown` where not one of them gave an answer."""
        return next((verdict for verdict in self.counts() if verdict != "skip"), "unknown")

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
        """Return how many checks have each verdict, the worst first; verdicts that none has are left out."""
        counted = {verdict: sum(check.verdict == verdict for check in self.checks) for verdict in WORST_FIRST}
        return {verdict: number for verdict, number in counted.items() if number}

    def verdict_line(self) -> str:
        """Return the verdict as one line: `FAIL: 2 fail, 1 warn, 20 pass; risk high`."""
        numbers = ", ".join(f"{number} {verdict}" for verdict, number in self.counts().items())
        return f"{self.verdict.upper()}: {numbers or 'no checks'}; risk {self.risk}"

    def redacted(self) -> Report:
        """Return the report without secrets, and without the names of this machine and its user."""
        plain = _mapped(msgspec.to_builtins(self), lambda value: redact(value) if isinstance(value, str) else value)
        return msgspec.convert(plain, Report)

    def to_json(self) -> str:
        """Return the report as JSON, redacted, with its verdict.  JSON has no NaN: it becomes the text `nan`."""
        plain = msgspec.to_builtins(self.redacted())
        plain = {"schema": plain.pop("schema"), "kind": plain.pop("kind"), "verdict": self.verdict, **plain}
        # msgspec writes NaN as null, and null reads as "not measured".
        plain = _mapped(
            plain, lambda value: value if not isinstance(value, float) or math.isfinite(value) else str(value)
        )
        return msgspec.json.format(msgspec.json.encode(plain), indent=2).decode() + "\n"

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
            if major == int(SCHEMA.partition(".")[0]):
                return msgspec.json.decode(text, type=cls)
        except (ValueError, RecursionError, TypeError) as error:  # msgspec's and UnicodeDecodeError are of the first
            raise ReportError(f"{name} is no report of ascend-safe: {_reason(error)}") from None
        raise ReportError(
            f"{name} has schema {head.schema}, and this ascend-safe reads schema {SCHEMA}: write it again, or read "
            "it, with the release that fits"
        )

    def to_markdown(self) -> str:
        """Return the report for people, redacted."""
        report = self.redacted()
        blocks = [f"# {_line(report.title)}", f"**{report.verdict_line()}** ({report.kind}, {report.created})"]
        blocks += [block for section in report.sections if section.before_checks for block in _section(section)]
        flat = tuple((name, _shown(value)) for name, value in _flat(report.facts))
        facts = ["## Facts", markdown_table(("fact", "value"), flat)] if flat else []
        late = len(flat) >= MANY_FACTS
        blocks += [] if late else facts
        if report.checks:
            rows = tuple(
                (check.verdict, check.name, check.summary, check.confidence, check.risk) for check in report.checks
            )
            blocks += ["## Checks", markdown_table(("verdict", "check", "finding", "confidence", "risk"), rows)]
            blocks += ["\n".join(_details(check)) for check in report.checks if check.evidence or check.advice]
        blocks += [block for section in report.sections if not section.before_checks for block in _section(section)]
        blocks += facts if late else []
        blocks.append(f"Verdict: **{report.verdict_line()}**")
        return "\n\n".join(blocks) + "\n"

    def to_junit(self) -> str:
        """Return the report for a CI system, redacted: JUnit XML as Jenkins, GitLab and GitHub's actions read it.

        (The schema of Jenkins' xUnit plug-in.)  One test case a check.  It knows neither warnings nor "unknown": the
        first pass and say so in their output, the second are skipped.
        """
        report = self.redacted()
        counts = report.counts()
        totals = {
            "name": f"ascend-safe {report.kind}",
            "tests": str(len(report.checks)),
            "failures": str(counts.get("fail", 0)),
            "errors": "0",
            "time": f"{sum(check.seconds for check in report.checks):.3f}",
        }
        skipped = counts.get("skip", 0) + counts.get("unknown", 0)
        root = _element(None, "testsuites", **totals)
        stamp = report.created.removesuffix("+00:00")
        suite = _element(root, "testsuite", **totals, skipped=str(skipped), timestamp=stamp)
        properties = _element(suite, "properties")
        for name, value in _flat({"schema": report.schema, "title": report.title, **report.facts}):
            _element(properties, "property", name=name, value=_shown(value))
        for check in report.checks:
            of = f"ascend-safe.{report.kind}"
            case = _element(suite, "testcase", classname=of, name=check.name, time=f"{check.seconds:.3f}")
            told = [f"{check.verdict}: {check.summary}"]
            told += [f"{evidence.where}: {evidence.what}" for evidence in check.evidence]
            told += [f"What to do: {check.advice}"] if check.advice else []
            told.append(f"confidence: {check.confidence}; risk: {check.risk}")
            if check.verdict == "fail":
                _element(case, "failure", "\n".join(told), message=check.summary, type="check")
                continue
            if check.verdict in ("skip", "unknown"):
                _element(case, "skipped", message=told[0])
            _element(case, "system-out", "\n".join(told))
        ElementTree.indent(root)
        return ElementTree.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


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


def write_each(reports: Mapping[str, Report], paths: Mapping[str, str | os.PathLike[str] | None]) -> dict[str, str]:
    """Write a report for each form that has a path; return a sentence for each form that cannot be written.

    What was found took minutes and is printed all the same: a full disk costs the file and not the answer.
    """
    problems = {}
    for form, path in paths.items():
        if path is not None:
            try:
                write(reports[form], path, form)
            except ReportError as error:
                problems[form] = str(error)
    return problems


def _reason(error: Exception) -> str:
    if isinstance(error, TypeError):
        return "its schema is no version"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error).rstrip(".") or type(error).__name__


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Change every value, and every name, in a JSON value."""
    if isinstance(value, Mapping):
        return {change(key): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(item, change) for item in value]
    return change(value)


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
    """Render a table in GitHub's Markdown."""
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _details(check: Check) -> list[str]:
    lines = [f"### {check.verdict}: {check.name}", ""]
    lines += [
        f"- `{' '.join(printable(evidence.where).split())}`: {_line(evidence.what)}" for evidence in check.evidence
    ]
    if check.advice:
        lines.append(f"- What to do: {_line(check.advice)}")
    return lines


def _line(text: str) -> str:
    return " ".join(printable(text).split()).replace("<", "&lt;")


def _cell(text: str) -> str:
    return "<br>".join(printable(text).replace("<", "&lt;").strip().splitlines()).replace("|", "\\|")


def _fenced(text: str) -> str:
    text = printable(text)
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


def _element(above: ElementTree.Element | None, tag: str, text: str = "", **attributes: str) -> ElementTree.Element:
    clean = {name: printable(value) for name, value in attributes.items()}
    found = ElementTree.Element(tag, clean) if above is None else ElementTree.SubElement(above, tag, clean)
    found.text = printable(text) or None
    return found


def printable(text: str) -> str:
    """Return the text without a terminal's colours, and with a mark for each character that cannot be shown.

    Those are what XML 1.0 cannot have, what a terminal would act on, and what turns the direction of what follows.
    """
    text = re.sub(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]", "", text)
    shown = r"\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff"
    return re.sub(rf"[^{shown}]|[\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]", "\N{REPLACEMENT CHARACTER}", text)
