"""The sub-command `ascend-safe doctor`."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from verl_ascend_rollout import report as reports
from verl_ascend_rollout.checks.doctor import wheels
from verl_ascend_rollout.checks.doctor.reference import STALE
from verl_ascend_rollout.redaction import redact
from verl_ascend_rollout.report import Check, Report, ReportError

WIDTH = 100


def add_parser(commands: Any) -> None:
    """Add the sub-command to argparse's sub-parsers."""
    parser = commands.add_parser(
        "doctor",
        help="whether a rollout can work here, or with a stack of releases, read without importing anything",
        description="Examine this installation without importing torch, verl, vLLM or vllm-ascend: what is installed "
        "and what hides it, which versions go together, which libraries are missing, which settings cannot work, and "
        "whether what ascend_safe relies on is still where it was.  Exit status: 0; 1 where a check failed; 2 for a "
        "usage error.",
    )
    parser.set_defaults(run=run, parser=parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--for",
        dest="stack",
        metavar="STACK",
        help="examine a stack from its wheels instead: verl==0.8.0,vllm==0.18.0[,vllm-ascend==0.18.0]; they are "
        "downloaded and not installed",
    )
    what.add_argument("--live", action="store_true", help="also import each package, in processes of their own")
    parser.add_argument(
        "--wheels",
        type=Path,
        metavar="DIR",
        help="with --for: where the wheels are, or are downloaded to (default: verl_ascend_rollout/wheels in the "
        "user's cache folder)",
    )
    parser.add_argument("--all", action="store_true", help="print every check, also those that passed or do not apply")
    for form, what_for in (("json", "machines"), ("markdown", "people"), ("junit", "CI systems")):
        parser.add_argument(f"--{form}", type=Path, metavar="FILE", help=f"write the report for {what_for} as well")


def run(arguments: argparse.Namespace) -> int:
    """Examine, print, write; the exit status.

    Raises:
        SystemExit: with status 2, for a usage error.
    """
    from verl_ascend_rollout.checks.doctor.examine import examine, examine_wheels

    if arguments.wheels is not None and arguments.stack is None:
        arguments.parser.error("--wheels goes with --for: an installation is not read from wheels")
    try:
        if arguments.stack is not None:
            try:
                wanted = wheels.parse_stack(arguments.stack)
            except wheels.WheelError as error:
                arguments.parser.error(f"--for: {error}")
            stack = wheels.get(wanted, arguments.wheels or wheels.cache_folder())
            report = examine_wheels(stack)
            stack.close()
        else:
            report = examine(with_live=arguments.live)
        print(text_of(report, every=arguments.all))
        for form in reports.FORMS:
            path = getattr(arguments, form)
            if path is not None:
                reports.write(report, path, form)
    except (ReportError, wheels.WheelError) as error:
        print(redact(f"ascend-safe: {error}"), file=sys.stderr)
        return 1
    return report.exit_code


def text_of(report: Report, every: bool = False) -> str:
    """The report for a terminal: what needs a look, the block for an issue, and the verdict; redacted."""
    clean = report.redacted()
    shown = [check for check in clean.checks if every or check.verdict in ("fail", "warn", "unknown")]
    lines = [clean.title, ""]
    for check in sorted(shown, key=lambda check: reports.WORST_FIRST.index(check.verdict)):
        lines += [*_lines_of(check), ""]
    told = [check for check in clean.checks if check.name.startswith("reference.") and check.verdict == "pass"]
    if told and not every:
        stale = sum(STALE in check.summary for check in told)
        lines += [f"QA report of 2025-12-25: {len(told) - stale} claims hold or are settled, {stale} went stale.", ""]
    hidden = len(clean.checks) - len(shown)
    if hidden:
        lines += [f"{hidden} more passed or do not apply: --all shows them.", ""]
    lines += [
        "To paste into an issue (redacted; look it over all the same):",
        "",
        *_block(clean),
        "",
        clean.verdict_line(),
    ]
    return "\n".join(lines)


def _lines_of(check: Check) -> Iterator[str]:
    yield from _wrapped(f"{check.verdict.upper():7} {check.name}: {check.summary}", "        ")
    for evidence in check.evidence:
        yield from _wrapped(f"        {evidence.where}: {evidence.what}", "          ")
    if check.advice:
        yield from _wrapped(f"        -> {check.advice}", "           ")


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _block(report: Report) -> Iterator[str]:
    """What a maintainer asks first, small enough for an issue."""
    yield "```"
    for name, value in report.facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        yield f"{name}: {'not known' if value is None else value}"
    for check in report.checks:
        if check.verdict in ("fail", "warn", "unknown") and not check.name.startswith("reference."):
            yield f"{check.verdict}: {check.name}: {check.summary}"
    yield report.verdict_line()
    yield "```"
