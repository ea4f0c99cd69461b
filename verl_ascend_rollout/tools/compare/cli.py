"""The sub-command `ascend-safe compare`."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from verl_ascend_rollout.tools import picture, terminal, wording
from verl_ascend_rollout.tools import report as reports
from verl_ascend_rollout.tools.arguments import check_outputs, file_name, file_path
from verl_ascend_rollout.tools.compare import plot, reading
from verl_ascend_rollout.tools.compare.sections import pairs_of, report_of
from verl_ascend_rollout.tools.redaction import redact
from verl_ascend_rollout.tools.report import ReportError

LONGEST_ERROR = 400
"""Characters of a sentence on standard error: the file that it speaks of may have any."""


def add_parser(commands: Any) -> None:
    """Add the sub-command to argparse's sub-parsers."""
    parser = commands.add_parser(
        "compare",
        help="smoke reports side by side: which numbers may be compared, why they differ, whether the outputs agree",
        description="Set two or more JSON reports of `ascend-safe smoke` side by side, from any platforms, on any "
        "machine: which of their times may be compared and which not, why they differ, and whether they said the "
        "same.  The first report is what the others are compared with.  Exit status: 0; 1 where outputs that should "
        "agree do not, or a report failed; 2 for a usage error, a file that is no "
        "smoke report, or one that cannot be written.",
    )
    parser.set_defaults(run=run, parser=parser)
    parser.add_argument(
        "files", nargs="+", type=file_name, metavar="REPORT", help="smoke.json of a run; the first is the baseline"
    )
    parser.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="NAME",
        help="what to call a report, once for each, in their order (default: platform and vLLM's version)",
    )
    parser.add_argument("--json", type=file_path, metavar="FILE", help="write the report for machines as well")
    parser.add_argument(
        "--markdown", "--out", type=file_path, metavar="FILE", help="write it for people, not on the screen"
    )
    parser.add_argument("--junit", type=file_path, metavar="FILE", help="write it for CI systems as well")
    parser.add_argument("--plot", type=file_path, metavar="FILE", help="draw it: .png, .svg or .pdf (needs matplotlib)")


def run(arguments: argparse.Namespace) -> int:
    """Compare, print, write; the exit status.

    Raises:
        UsageError: a file would be written over a report that is read, or twice.
    """
    forms = {form: getattr(arguments, form) for form in reports.FORMS}
    check_outputs({f"--{form}": file for form, file in {**forms, "plot": arguments.plot}.items()}, arguments.files)
    try:
        if arguments.plot is not None:
            picture.check(arguments.plot, "--plot", ReportError)
        runs = reading.read(arguments.files, arguments.label)
        pairs = pairs_of(runs)
        report = report_of(runs, pairs)
        people = dataclasses.replace(report, facts={})  # its sections tell them
    except ReportError as error:
        return _fail(error)
    unwritten = reports.write_each({"json": report, "markdown": people, "junit": people}, forms)
    if arguments.plot is not None:
        try:
            plot.draw(runs, pairs, arguments.plot)
        except ReportError as error:
            unwritten["plot"] = str(error)
    out = terminal.console()
    if forms["markdown"] is not None and "markdown" not in unwritten:
        clean = people.redacted()
        terminal.checks(out, clean.checks, details=())
        out.print("", clean.verdict_line(), sep="\n")
    elif out.is_terminal:
        from rich.markdown import Markdown

        out.print(Markdown(people.to_markdown(), hyperlinks=False))
    else:
        out.print(people.to_markdown(), soft_wrap=True)
    return _fail("; ".join(unwritten.values())) if unwritten else report.exit_code


def _fail(error: object) -> int:
    return terminal.fail(redact(wording.clipped(wording.line(str(error)), LONGEST_ERROR)), 2)
