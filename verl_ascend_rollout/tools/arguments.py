"""Values on the command line that more than one command takes."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
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
