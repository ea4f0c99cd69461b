"""The sub-command `ascend-safe doctor`."""

from __future__ import annotations

import argparse
import gc
import textwrap
from collections.abc import Iterator
from typing import Any, get_args

from verl_ascend_rollout.platforms.base import Soc
from verl_ascend_rollout.platforms.npu import soc_named
from verl_ascend_rollout.tools import report as reports
from verl_ascend_rollout.tools import terminal
from verl_ascend_rollout.tools.arguments import check_outputs, file_path
from verl_ascend_rollout.tools.doctor import wheels
from verl_ascend_rollout.tools.redaction import redact
from verl_ascend_rollout.tools.report import Report

NEEDED = ("fail", "warn", "unknown")
"""The verdicts that need a look."""


def add_parser(commands: Any) -> None:
    """Add the sub-command to argparse's sub-parsers."""
    parser = commands.add_parser(
        "doctor",
        help="whether a rollout can work here, or with a stack of releases, read without importing anything",
        description="Examine this installation without importing torch, verl, vLLM or vllm-ascend: what is installed "
        "and what hides it, which versions go together, which libraries are missing, which settings cannot work, and "
        "whether what ascend_safe relies on is still where it was.  Exit status: 0; 1 where a check failed; 2 for a "
        "usage error, or a report that cannot be written.",
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
        "--soc",
        metavar="SOC",
        help=f"with --for: the Ascend chip that it is planned for: {', '.join(get_args(Soc))}, or 910B3, ...",
    )
    parser.add_argument(
        "--wheels",
        type=file_path,
        metavar="DIR",
        help="with --for: where the wheels are, or are downloaded to (default: verl_ascend_rollout/wheels in the "
        "user's cache folder, which keeps 2 GiB of them at most)",
    )
    parser.add_argument("--all", action="store_true", help="print every check, also those that passed or do not apply")
    for form, what_for in (("json", "machines"), ("markdown", "people"), ("junit", "CI systems")):
        parser.add_argument(
            f"--{form}", type=file_path, metavar="FILE", help=f"write the report for {what_for} as well"
        )


def run(arguments: argparse.Namespace) -> int:
    """Examine, print, write; the exit status.

    Raises:
        SystemExit: with status 2, for a usage error.
        UsageError: two reports would go into one file, or one into a wheel that is read.
    """
    from verl_ascend_rollout.tools.doctor.examine import examine, examine_wheels

    if arguments.wheels is not None and arguments.stack is None:
        arguments.parser.error("--wheels goes with --for: an installation is not read from wheels")
    if arguments.soc is not None and arguments.stack is None:
        arguments.parser.error("--soc goes with --for: the chip of this machine is looked for")
    soc = soc_named(arguments.soc) if arguments.soc is not None else None
    if arguments.soc is not None and soc is None:
        arguments.parser.error(f"--soc: {arguments.soc!r} is no Ascend chip that is known here")
    written = {form: getattr(arguments, form) for form in reports.FORMS}
    check_outputs(
        {f"--{form}": file for form, file in written.items()},
        arguments.wheels.glob("*.whl") if arguments.wheels is not None else (),
    )
    # Syntax trees of a million nodes, none of them garbage: to look for some took a quarter of the time.
    gc.disable()
    try:
        if arguments.stack is not None:
            try:
                wanted = wheels.parse_stack(arguments.stack)
            except wheels.WheelError as error:
                arguments.parser.error(f"--for: {error}")
            stack = wheels.get(wanted, arguments.wheels or wheels.cache_folder())
            if arguments.wheels is None:
                wheels.bound(wheels.cache_folder(), stack.wheels)
            report = examine_wheels(stack, soc)
            stack.close()
        else:
            report = examine(with_live=arguments.live)
        unwritten = reports.write_each(dict.fromkeys(written, report), written)
        show(report, every=arguments.all)
    except wheels.WheelError as error:
        return terminal.fail(redact(str(error)), 1)
    finally:
        gc.enable()
    return terminal.fail(redact("; ".join(unwritten.values())), 2) if unwritten else report.exit_code


def show(report: Report, every: bool = False) -> None:
    """Print what needs a look, or every check; the block for an issue; and the verdict; redacted."""
    clean, out = report.redacted(), terminal.console()
    shown = [check for check in clean.checks if every or check.verdict in NEEDED]
    out.print(f"{clean.title}: {clean.verdict_line()}")
    if shown:
        out.print()
    shown.sort(key=lambda check: reports.WORST_FIRST.index(check.verdict))
    terminal.checks(out, shown, details=reports.WORST_FIRST if every else NEEDED)
    if hidden := len(clean.checks) - len(shown):
        out.print("", f"{hidden} more passed or do not apply: --all shows them.", sep="\n")
    out.print("", "To paste into an issue (redacted; look it over all the same):", "", sep="\n")
    for line in (*_block(clean), "", clean.verdict_line()):
        for part in textwrap.wrap(line, out.width, subsequent_indent="  ", break_on_hyphens=False) or [""]:
            out.print(terminal.plain(part), soft_wrap=True)


def _block(report: Report) -> Iterator[str]:
    """Yield what a maintainer asks first, small enough for an issue."""
    yield "```"
    for name, value in report.facts.items():
        if isinstance(value, dict):
            between = "=" if name == "variables" else " "
            value = ", ".join(f"{key}{between}{item}" for key, item in value.items())
        yield f"{name}: {'not known' if value is None else value}"
    for check in report.checks:
        if check.verdict in NEEDED:
            yield f"{check.verdict}: {check.name}: {check.summary}"
    yield report.verdict_line()
    yield "```"
