"""Which report is compared with which: each but the first with the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from verl_ascend_rollout.checks.compare.outputs import Agreement, agreement
from verl_ascend_rollout.checks.compare.reading import Run
from verl_ascend_rollout.checks.compare.times import Comparison, compare


@dataclass(frozen=True)
class Pair:
    """One report against the baseline.

    Attributes:
        base, other: the two.
        compared: each quantity, by name.
        agreement: of what they said.
    """

    base: Run
    other: Run
    compared: dict[str, Comparison]
    agreement: Agreement


@dataclass(frozen=True)
class SideBySide:
    """All reports, and each but the first against the first."""

    runs: tuple[Run, ...]
    pairs: tuple[Pair, ...]


def side_by_side(runs: Sequence[Run]) -> SideBySide:
    """Compare each run with the first."""
    base = runs[0]
    return SideBySide(tuple(runs), tuple(Pair(base, run, compare(base, run), agreement(base, run)) for run in runs[1:]))
