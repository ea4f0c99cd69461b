"""Values on the command line that more than one command takes, and the files among them."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterable, Mapping
from itertools import combinations
from pathlib import Path
from typing import TypeVar

Number = TypeVar("Number", int, float)


def _above_zero(kind: Callable[[str], Number], wrong: str, most: float = math.inf) -> Callable[[str], Number]:
    """Return a type for argparse: a number above 0, finite, and at most `most`."""

    def parse(text: str) -> Number:
        try:
            number = kind(text)
            if 0 < number <= most and math.isfinite(number):
                return number
        except (ValueError, OverflowError):
            pass
        raise argparse.ArgumentTypeError(f"{text!r} {wrong}")

    return parse


positive = _above_zero(int, "is no whole number of at least 1")
gib = _above_zero(float, "is no size in GiB")
seconds = _above_zero(float, "is no number of seconds above 0")
share = _above_zero(float, "is no share of the memory: say a number above 0 and up to 1", most=1.0)


class UsageError(ValueError):
    """What was asked for cannot be: exit status 2.  The message is one sentence."""


def file_name(text: str) -> str:
    """Return the name of a file or folder.

    Raises:
        argparse.ArgumentTypeError: it is empty, as a variable of a shell that is not set; `Path` takes that for ".".
    """
    if not text:
        raise argparse.ArgumentTypeError("it is empty: name a file or a folder")
    return text


def file_path(text: str) -> Path:
    """Return the name of a file or folder as a path; see `file_name`."""
    return Path(file_name(text))


def check_outputs(
    written: Mapping[str, str | os.PathLike[str] | None], read: Iterable[str | os.PathLike[str]] = ()
) -> None:
    """Check that no file is written that is also read, and none twice, before either is done.

    Args:
        written: by option; `None` where that was not given.
        read: what the command reads.

    Raises:
        UsageError: one is.
    """
    files = {option: file for option, file in written.items() if file is not None}
    for source in read:
        for option, file in files.items():
            if _same(file, source):
                raise UsageError(f"{option} {file} would overwrite {source}, which is read: name another file")
    for (one, file), (other, again) in combinations(files.items(), 2):
        if _same(file, again):
            raise UsageError(f"{one} {file} and {other} {again} are the same file: name one for each")


def _same(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    try:
        return os.path.samefile(one, other) and os.path.isfile(one)  # a terminal, or /dev/null, may be both
    except OSError:  # one of them is still to be made
        return os.path.realpath(one) == os.path.realpath(other)
