"""Values on the command line that more than one command takes."""

from __future__ import annotations

import argparse
import sys


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
    return _above_zero(text, "is no size in GiB")


def seconds(text: str) -> float:
    """A duration in seconds, for argparse."""
    return _above_zero(text, "is no number of seconds above 0")


def share(text: str) -> float:
    """A share of a whole, for argparse."""
    return _above_zero(text, "is no share of the memory: say a number above 0 and up to 1", most=1.0)


def _above_zero(text: str, wrong: str, most: float = sys.float_info.max) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= most:
        raise argparse.ArgumentTypeError(f"{text!r} {wrong}")
    return number
