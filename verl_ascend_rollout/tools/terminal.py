"""What the commands put on a screen: as wide as it is, in colour where it shows any, and plain in a pipe."""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
import time
from collections.abc import Container, Iterable, Sequence
from typing import TYPE_CHECKING

from verl_ascend_rollout.tools.report import Check

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

PIPED = 80
"""Columns where nobody says how many there are."""

UNBROKEN = 1_000_000
"""Columns of a pipe or a file, where no line is broken."""

COLOURS = {"FAIL": "red", "WARN": "yellow", "UNKNOWN": "yellow", "PASS": "green"}

PHASE = re.compile(r" *\d+\.\d s  (.+)")
"""A line of `Progress`, with the name of the phase."""


def width(piped: int = PIPED) -> int:
    """Return how many columns to fill: the terminal's, or those that COLUMNS says, else `piped`."""
    return max(20, shutil.get_terminal_size((piped, 24)).columns)


def plain(text: str) -> str:
    """Return text from a file, or from an error about one, that cannot steer a terminal."""
    return re.sub(r"[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]", "\N{REPLACEMENT CHARACTER}", text)


def fail(error: object, status: int) -> int:
    """Say one sentence on standard error, and return the exit status."""
    print(plain(f"ascend-safe: {error}"), file=sys.stderr)
    return status


def table(
    headings: Sequence[str], rows: Iterable[Iterable[str]], numbers: Container[int] = (), piped: int = PIPED
) -> None:
    """Print a table; where there is little room, the words of its headings stand below each other.

    Args:
        numbers: which columns are flush right.
        piped: see `width`.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="")
    cells = [[plain(cell) for cell in row] for row in rows]
    longest = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    room = width(piped)
    if sum(longest) + 2 * len(longest) > room:
        headings = [heading.replace(" ", "\n") for heading in headings]
    for number, heading in enumerate(headings):
        drawn.add_column(heading, justify="right" if number in numbers else "left", no_wrap=True)
    for row in cells:
        drawn.add_row(*map(Text, row))
    # In a terminal that is narrower still lines break; numbers that are cut could not be read.
    console = Console(highlight=False)
    console.width = max(room, console.measure(drawn, options=console.options.update(width=1000)).maximum)
    console.print(drawn)


def console(*, stderr: bool = False) -> Console:
    """Return the terminal, or the pipe, behind standard output or standard error."""
    from rich.console import Console

    class Quiet(Console):
        def on_broken_pipe(self) -> None:
            # `| head` has seen enough, and Python would write to the pipe when it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    stream = sys.stderr if stderr else sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")  # a terminal that knows no Unicode
    found = Quiet(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not found.is_terminal:
        found.width = UNBROKEN
    return found


def beside(out: Console, head: str, text: str, width: int, style: str = "") -> None:
    """Print a head of so many columns, and a text that stays beside it where it is wrapped."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=width, no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text(head, style), Text(plain(text)))
    out.print(grid)


def checks(out: Console, found: Iterable[Check], details: Container[str] = ("fail", "warn", "unknown")) -> None:
    """Print a line for each check, and of those with the verdicts of `details` what they rest on, and what to do."""
    for check in found:
        verdict = check.verdict.upper()
        beside(out, verdict, f"{check.name}: {check.summary}", 7, COLOURS.get(verdict, ""))
        if check.verdict in details:
            for evidence in check.evidence:
                beside(out, "", f"{evidence.where}: {shortened(evidence.what)}", 9)
            if check.advice:
                beside(out, "", f"-> {check.advice}", 9)


def shortened(text: str, most: int = 200) -> str:
    """Return a text for one line of a table."""
    text = text.replace("\n", "\\n")
    return text if len(text) <= most else f"{text[:most]}..."


class Progress:
    """One line for each phase of something that takes minutes, and on a terminal a line that lives."""

    def __init__(self, out: Console) -> None:
        self._out, self._started = out, time.monotonic()
        self._status: Status | None = None
        self._phase = ""

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.monotonic() - self._started

    def line(self, text: str) -> None:
        """Print a line."""
        self._out.print(text, soft_wrap=True)

    def phase(self, name: str) -> None:
        """Say which phase began, and when."""
        self.line(f"{self.seconds:7.1f} s  {name}")
        self._phase = name
        if self._out.is_terminal and self._status is None:
            self._status = self._out.status(name)
            self._status.start()

    def tick(self, most: float) -> None:
        """Let the line live: how much of the time is up."""
        if self._status is not None:
            self._status.update(f"{self._phase}: {self.seconds:.0f} s of at most {most:.0f} s")

    def close(self) -> None:
        """Take the line away that lives."""
        if self._status is not None:
            self._status.stop()
            self._status = None
