"""The sub-command `ascend-safe compare`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from verl_ascend_rollout import report as reports
from verl_ascend_rollout.checks.compare import build, pairs, plot, reading, wording
from verl_ascend_rollout.redaction import redact
from verl_ascend_rollout.report import Report, ReportError


def add_parser(commands: Any) -> None:
    """Add the sub-command to argparse's sub-parsers."""
    parser = commands.add_parser(
        "compare",
        help="smoke reports side by side: which numbers may be compared, why they differ, whether the outputs agree",
        description="Set two or more JSON reports of `ascend-safe smoke` side by side, from any platforms, on any "
        "machine: which of their times may be compared and which not, why they differ, and whether they said the "
        "same.  The first report is what the others are compared with.  Exit status: 0; 1 where outputs that should "
        "agree do not, or a report failed; 2 for a usage error or a file that is no smoke report.",
    )
    parser.set_defaults(run=run, parser=parser)
    parser.add_argument("files", nargs="+", metavar="REPORT", help="smoke.json of a run; the first is the baseline")
    parser.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="NAME",
        help="what to call a report, once for each, in their order (default: platform and vLLM's version)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report for machines as well")
    parser.add_argument("--markdown", "--out", type=Path, metavar="FILE", help="write it for people, not on the screen")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write it for CI systems as well")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it: .png, .svg or .pdf (needs matplotlib)")


def run(arguments: argparse.Namespace) -> int:
    """Compare, print, write; the exit status."""
    try:
        if arguments.plot is not None:
            plot.check(arguments.plot)
        found = pairs.side_by_side(reading.read(arguments.files, arguments.label))
        report = build.build(found)
        people = build.for_people(report)
        for form in reports.FORMS:
            path = getattr(arguments, form)
            if path is not None:
                reports.write(report if form == "json" else people, path, form)
        if arguments.plot is not None:
            plot.draw(found, arguments.plot)
    except ReportError as error:
        print(wording.sentence(redact(f"ascend-safe: {wording.sentence(str(error))}")), file=sys.stderr)
        return 2
    _show(people, brief=arguments.markdown is not None)
    return report.exit_code


def _show(report: Report, *, brief: bool) -> None:
    """The report on the screen, or its verdict where the rest lies in a file."""
    try:
        if brief:
            clean = report.redacted()
            lines = [f"{check.verdict.upper():7} {check.name}: {check.summary}" for check in clean.checks]
            _print("\n".join([*lines, "", clean.verdict_line()]))
        elif sys.stdout.isatty():
            from rich.console import Console
            from rich.markdown import Markdown

            Console().print(Markdown(report.to_markdown(), hyperlinks=False))
        else:
            _print(report.to_markdown())
        sys.stdout.flush()
    except BrokenPipeError:
        # `| head` has seen enough.  Python would write to the pipe once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))
