"""The comparison as a picture: load, calls, rates, memory.  What may not be compared is grey, and says why."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from verl_ascend_rollout.tools import picture, wording
from verl_ascend_rollout.tools.compare.reading import Run
from verl_ascend_rollout.tools.compare.sections import Pair
from verl_ascend_rollout.tools.report import ReportError
from verl_ascend_rollout.tools.smoke.tables import LOAD_PARTS

GREY, HATCH, EDGE = "#d9d9d9", "////", "#8c8c8c"
LOAD_COLOURS = ("#4c78a8", "#59a14f", "#b279a2", "#f28e2b", "#76b7b2", "#9c9c9c")

PANELS: dict[str, tuple[str, dict[str, str]]] = {
    "Load": ("seconds", {"load.total": "#9c9c9c"}),
    "Time of a call, with its output tokens": ("seconds", {"first.seconds": "#9ecae9", "warm.seconds": "#4c78a8"}),
    "Rate of the warm call": ("output tokens per second", {"warm.tokens_per_second": "#4c78a8"}),
    "Memory of one worker": ("GiB", {"memory.weights": "#59a14f", "memory.kv_cache": "#b6d7a8"}),
}
"""By title: the unit, and the quantities with their colours."""


def draw(runs: Sequence[Run], pairs: Sequence[Pair], path: str | os.PathLike[str]) -> None:
    """Draw four panels, one bar or group of bars a report.

    Raises:
        ReportError: matplotlib is missing or does not know the format, or the file cannot be written.
    """
    # As many as 20 reports are readable; more are drawn all the same.
    width = min(40.0, max(11.0, 2.8 * len(runs) + 5))
    reasons = [line for reason in _reasons(pairs) for line in textwrap.wrap(reason, int(width * 18))]
    size = (width, 8.0 + 0.16 * len(reasons))
    with picture.figure(path, "--plot", ReportError, nrows=2, ncols=2, figsize=size) as (figure, panels):
        for axes, (title, (unit, bars)) in zip(panels.flat, PANELS.items(), strict=True):
            _panel(axes, runs, pairs, title, unit, bars)
        models = {wording.name(run.smoke.model.name, 60) for run in runs if run.smoke.model}
        figure.suptitle(wording.clipped(" and ".join(sorted(models)), 120), fontsize=11)
        figure.supxlabel("\n".join(reasons), x=0.01, ha="left", fontsize=8, color="#333333")


def _reasons(pairs: Sequence[Pair]) -> Iterator[str]:
    """Yield why bars are grey: the first reason of each; the report has them all."""
    for pair in pairs:
        by_reason: dict[str, list[str]] = {}
        for comparison in (pair.compared[name] for _, bars in PANELS.values() for name in bars):
            if comparison.refused and comparison.value is not None:
                by_reason.setdefault(comparison.refused[0], []).append(comparison.quantity.title)
        for reason, titles in by_reason.items():
            yield f"Grey, not compared with {pair.base.label}: {pair.other.label}, {wording.listed(titles)}: {reason}"


def _panel(axes: Any, runs: Sequence[Run], pairs: Sequence[Pair], title: str, unit: str, bars: dict[str, str]) -> None:
    """Draw one panel; a report's number that is not compared stands for itself only, and the baseline's never does."""
    from matplotlib.patches import Patch

    width = 0.7 / len(bars)
    for position, run in enumerate(runs):
        for number, (name, colour) in enumerate(bars.items()):
            place = position + (number - (len(bars) - 1) / 2) * width
            value, compared = run.get(name), pairs[max(position - 1, 0)].compared[name]
            if value is None:
                told = wording.UNKNOWN.replace(" ", "\n")
                axes.annotate(told, (place, 0), (0, 3), textcoords="offset points", ha="center", fontsize=7, color=EDGE)
                continue
            grey = position > 0 and bool(compared.refused)
            style = {"facecolor": GREY, "hatch": HATCH, "edgecolor": colour} if grey else {"facecolor": colour}
            told = compared.quantity.shown(value)
            if name.endswith(".seconds"):
                told += f"\n{wording.many(run.get(name.replace('.seconds', '.output_tokens')), 'token')}"
            drawn = axes.bar(place, value / 2**30 if unit == "GiB" else value, 0.95 * width, **style)
            axes.bar_label(drawn, [told], padding=2, fontsize=8)
            at = 0.0
            for part, shade in zip(LOAD_PARTS, LOAD_COLOURS, strict=True) if name == "load.total" else ():
                seconds = run.get(f"load.{part}") or 0.0
                part_style = {"alpha": 0.35, "hatch": HATCH, "edgecolor": EDGE} if grey else {}
                axes.bar(place, seconds, 0.95 * width, bottom=at, color=shade, **part_style)
                at += seconds
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_ylabel(unit)
    axes.set_xticks(range(len(runs)), [textwrap.fill(run.label, 14) for run in runs])
    axes.set_xlim(-0.6, len(runs) - 0.4)
    axes.margins(y=0.18)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    colours = dict(zip(LOAD_PARTS.values(), LOAD_COLOURS, strict=True)) if title == "Load" else {}
    if len(bars) > 1:
        colours = {pairs[0].compared[name].quantity.title: colour for name, colour in bars.items()}
    if colours:
        patches = [Patch(color=colour, label=label) for label, colour in reversed(colours.items())]
        axes.legend(handles=patches, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
