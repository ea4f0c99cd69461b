"""One set of rows as a table on the screen, as JSON, and as a picture."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_ascend_rollout.tools import picture, terminal
from verl_ascend_rollout.tools.arguments import UsageError

Row = Mapping[str, Any]


class BenchError(RuntimeError):
    """A bench cannot be run, or not to its end.  The message says what to change."""


@dataclass(frozen=True)
class Column:
    """One column of the printed table; a row without a value shows a dash."""

    key: str  # of the row's value
    title: str  # above the column, with the unit
    form: str = ""  # a format specification
    scale: float = 1.0  # what the value is multiplied by before it is shown; JSON keeps it as measured

    def cell(self, row: Row) -> str:
        """Return what is shown of a row."""
        value = row.get(self.key)
        return "-" if value is None else format(value * self.scale if self.scale != 1.0 else value, self.form)


def show(title: str, columns: Sequence[Column], rows: Sequence[Row]) -> None:
    """Print the rows."""
    print(title)
    numbers = [number for number, column in enumerate(columns) if column.form]
    cells = ([column.cell(row) for column in columns] for row in rows)
    terminal.table([column.title for column in columns], cells, numbers, piped=160)


def check(arguments: argparse.Namespace) -> None:
    """Check that --json and --plot can be written, before anything takes minutes.

    Raises:
        UsageError: one of them cannot.
    """
    for option, path in (("--json", arguments.json), ("--plot", arguments.plot)):
        if path is not None:
            file = Path(path)
            there = not file.is_dir() if file.exists() else file.parent.is_dir()
            if not there or not os.access(file if file.exists() else file.parent, os.W_OK):
                raise UsageError(f"{option} {path} cannot be written: give a file in a folder that is there")
    if arguments.plot is not None:
        picture.check(arguments.plot, "--plot", UsageError)


def write(
    arguments: argparse.Namespace,
    rows: Sequence[Row],
    facts: Mapping[str, Any],
    title: str,
    unit: str,
    bars: Mapping[str, float],
    floor: float | None = None,
) -> None:
    """Write `{"rows": [...], **facts}` into --json, as measured, in seconds and bytes, and draw bars into --plot.

    Args:
        unit, bars: of the bars: value by label, from the top.
        floor: where a line is drawn.

    Raises:
        UsageError: a file cannot be written; the other one is, all the same.
    """
    problems = []
    if arguments.json:
        text = json.dumps({"rows": list(rows), **facts}, indent=2, default=str) + "\n"
        try:
            Path(arguments.json).write_text(text, encoding="utf-8")
        except OSError as error:
            problems.append(f"--json {arguments.json} cannot be written: {error.strerror}")
    if arguments.plot:
        size = (8, 0.6 * len(bars) + 1.4)
        try:
            with picture.figure(arguments.plot, "--plot", UsageError, figsize=size) as (_, axes):
                axes.bar_label(axes.barh(list(bars), list(bars.values()), color="tab:blue"), fmt="%.3g", padding=3)
                if floor is not None:
                    axes.axvline(floor, color="tab:red", linestyle="--", linewidth=1)
                axes.invert_yaxis()
                axes.margins(x=0.15)
                axes.set_xlabel(unit)
                axes.set_title(title, loc="left")
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise UsageError("; ".join(problems))
