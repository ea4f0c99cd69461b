"""Values on the command line that several benches take."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A count of at least one, for argparse."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return number


def gib(text: str) -> float:
    """A size in GiB, for argparse."""
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no size in GiB")
    return size
