"""One set of rows as a table on the screen, as JSON, and as a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


class BenchError(RuntimeError):
    """A bench cannot be run as it was asked for.  The message says what to change."""


@dataclass(frozen=True)
class Column:
    """One column of the printed table.

    Attributes:
        key: of the row's value.
        title: above the column, with the unit.
        form: a format specification; a row without a value shows a dash.
        scale: what the value is multiplied by before it is shown (JSON keeps it as measured).
    """

    key: str
    title: str
    form: str = ""
    scale: float = 1.0


def show(title: str, columns: Sequence[Column], rows: Sequence[Row]) -> None:
    """Print the rows."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column.title, justify="right" if column.form else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(column.key), column) for column in columns))
    # Into a file or a pipe, a table is as wide as it needs to be.
    Console(width=None if os.isatty(1) else 160).print(table)


def write_json(path: str | os.PathLike[str], rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
    """Write `{"rows": [...], **facts}`; numbers as measured, in seconds and bytes.

    Raises:
        BenchError: the file cannot be written.
    """
    text = json.dumps({"rows": list(rows), **facts}, indent=2, default=str) + "\n"
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise BenchError(f"{path} cannot be written: {error.strerror}") from None


def plot(path: str | os.PathLike[str], title: str, unit: str, bars: Mapping[str, float], floor: float | None) -> None:
    """Draw one bar a row, and a line at the floor.

    Args:
        path: of the picture; its ending says the format.
        title: above the picture.
        unit: of the values.
        bars: value by label, in this order from the top.
        floor: where the line is; `None` draws none.

    Raises:
        BenchError: matplotlib is missing, does not know the format, or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise BenchError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.6 * len(bars) + 1.4), layout="constrained")
    drawn = axes.barh(list(bars), list(bars.values()), color="tab:blue")
    axes.bar_label(drawn, fmt="%.3g", padding=3)
    if floor is not None:
        axes.axvline(floor, color="tab:red", linestyle="--", linewidth=1)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(unit)
    axes.set_title(title, loc="left")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise BenchError(f"{path} cannot be drawn: {error}") from None
    finally:
        pyplot.close(figure)


def _cell(value: Any, column: Column) -> str:
    if value is None:
        return "-"
    return format(value * column.scale if column.scale != 1.0 else value, column.form)
