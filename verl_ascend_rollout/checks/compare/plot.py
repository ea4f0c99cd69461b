"""The comparison as a picture: load, calls, rates, memory.  What may not be compared is grey, and says why."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verl_ascend_rollout.checks.compare import wording
from verl_ascend_rollout.checks.compare.pairs import SideBySide
from verl_ascend_rollout.checks.compare.times import LOAD_PARTS
from verl_ascend_rollout.report import ReportError

FORMATS = (".png", ".svg", ".pdf")

LOAD_COLOURS = ("#4c78a8", "#59a14f", "#b279a2", "#f28e2b", "#76b7b2", "#9c9c9c")
CALL_COLOURS = {"first": "#9ecae9", "warm": "#4c78a8"}
MEMORY_COLOURS = {"weights": "#59a14f", "kv_cache": "#b6d7a8"}
REFUSED_COLOUR = "#d9d9d9"
REFUSED_HATCH = "////"


def check(path: str | os.PathLike[str]) -> None:
    """Whether a picture can be drawn, before anything is read.

    Raises:
        ReportError: matplotlib is missing, or the ending is none of `FORMATS`.
    """
    if Path(path).suffix.lower() not in FORMATS:
        raise ReportError(f"--plot {path} cannot be drawn: a picture's name ends in {', '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ReportError("--plot needs matplotlib: pip install matplotlib") from None


def draw(found: SideBySide, path: str | os.PathLike[str]) -> None:
    """Draw four panels, one bar or group of bars a report.

    Raises:
        ReportError: see `check`; or the file cannot be written.
    """
    check(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = [textwrap.fill(run.label, 14) for run in found.runs]
    with matplotlib.rc_context(
        {"font.size": 9, "hatch.linewidth": 0.6, "svg.fonttype": "none", "text.parse_math": False}
    ):
        # As many as 20 reports are readable; more are drawn all the same.
        width = min(40.0, max(11.0, 2.8 * len(labels) + 5))
        reasons = _reasons(found)
        lines = [
            line for reason in reasons for line in textwrap.wrap(reason, int(width * 18), subsequent_indent="      ")
        ]
        below = 0.16 * len(lines) + 0.2 if lines else 0.0
        figure, panels = pyplot.subplots(2, 2, figsize=(width, 8.0 + below), layout="constrained")
        try:
            figure.get_layout_engine().set(rect=(0, below / (8.0 + below), 1, 1 - below / (8.0 + below)))
            _load(panels[0][0], found, labels)
            _calls(panels[0][1], found, labels)
            _rates(panels[1][0], found, labels)
            _memory(panels[1][1], found, labels)
            models = {wording.name(run.smoke.model.name, 60) for run in found.runs if run.smoke.model}
            figure.suptitle(wording.clipped(" and ".join(sorted(models)), 120), fontsize=11)
            if lines:
                figure.text(0.01, 0.008, "\n".join(lines), fontsize=8, va="bottom", ha="left", color="#333333")
            figure.savefig(path, dpi=130)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ReportError(f"--plot {path} cannot be drawn: {reason}") from None
        finally:
            pyplot.close(figure)


def _reasons(found: SideBySide) -> list[str]:
    """Why bars are grey: the first reason of each; the report has them all."""
    told = []
    for pair in found.pairs:
        by_reason: dict[str, list[str]] = {}
        for name in ("load.total", "first.seconds", "warm.seconds", "warm.tokens_per_second", *_MEMORY_NAMES):
            comparison = pair.compared[name]
            if comparison.refused and comparison.value is not None:
                by_reason.setdefault(comparison.refused[0], []).append(comparison.quantity.title)
        told += [
            f"Grey, not compared with {pair.base.label}: {pair.other.label}, {wording.listed(titles)}: {reason}"
            for reason, titles in by_reason.items()
        ]
    return told


_MEMORY_NAMES = ("memory.weights", "memory.kv_cache")


def _refused(found: SideBySide, position: int, quantity: str) -> bool:
    """Whether a report's number stands for itself only; the baseline's never does."""
    return position > 0 and bool(found.pairs[position - 1].compared[quantity].refused)


def _style(refused: bool, colour: str) -> dict[str, Any]:
    if refused:
        return {"facecolor": REFUSED_COLOUR, "hatch": REFUSED_HATCH, "edgecolor": colour, "linewidth": 0.8}
    return {"facecolor": colour, "edgecolor": "white", "linewidth": 0.6}


def _frame(axes: Any, title: str, unit: str, labels: Sequence[str]) -> None:
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_ylabel(unit)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    axes.margins(y=0.18)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)


def _empty(axes: Any, position: float) -> None:
    axes.annotate(
        wording.UNKNOWN.replace(" ", "\n"),
        (position, 0),
        (0, 3),
        textcoords="offset points",
        ha="center",
        fontsize=8,
        color="#8c8c8c",
    )


def _load(axes: Any, found: SideBySide, labels: Sequence[str]) -> None:
    shown: dict[str, Any] = {}
    for position, run in enumerate(found.runs):
        load, at = run.smoke.load, 0.0
        refused = _refused(found, position, "load.total")
        parts = [(title, getattr(load, part) if load else None) for part, title in LOAD_PARTS.items()]
        for (title, seconds), colour in zip(parts, LOAD_COLOURS, strict=True):
            if seconds:
                style = {"color": colour, "edgecolor": "white", "linewidth": 0.6}
                if refused:
                    style.update(alpha=0.35, hatch=REFUSED_HATCH, edgecolor="#8c8c8c")
                bar = axes.bar(position, seconds, 0.6, bottom=at, **style)
                if not refused or title not in shown:
                    shown[title] = bar
                at += seconds
        total = load.total if load else None
        if total is not None and at == 0:
            axes.bar(position, total, 0.6, **_style(refused, LOAD_COLOURS[-1]))
            at = total
        if total is None and at == 0:
            _empty(axes, position)
        else:
            note = wording.seconds(total) if total is not None else f"at least {wording.seconds(at)}"
            axes.annotate(note, (position, max(at, total or 0)), (0, 3), textcoords="offset points", ha="center")
    _frame(axes, "Load", "seconds", labels)
    if shown:
        from matplotlib.patches import Patch

        colours = dict(zip(LOAD_PARTS.values(), LOAD_COLOURS, strict=True))
        patches = [
            Patch(color=colours[title], label=title) for title in reversed(LOAD_PARTS.values()) if title in shown
        ]
        axes.legend(handles=patches, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _calls(axes: Any, found: SideBySide, labels: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    for position, run in enumerate(found.runs):
        for which, shift in (("first", -0.2), ("warm", 0.2)):
            call = getattr(run.smoke, which)
            if call is None:
                _empty(axes, position + shift)
                continue
            refused = _refused(found, position, f"{which}.seconds")
            bar = axes.bar(position + shift, call.seconds, 0.38, **_style(refused, CALL_COLOURS[which]))
            note = f"{wording.seconds(call.seconds)}\n{wording.many(call.output_tokens, 'token')}"
            axes.bar_label(bar, [note], padding=2, fontsize=8)
    _frame(axes, "Time of a call, with its output tokens", "seconds", labels)
    patches = [Patch(color=CALL_COLOURS[which], label=f"{which} call") for which in ("first", "warm")]
    axes.legend(handles=patches, fontsize=8, frameon=False)


def _rates(axes: Any, found: SideBySide, labels: Sequence[str]) -> None:
    for position, run in enumerate(found.runs):
        call = run.smoke.warm
        if call is None:
            _empty(axes, position)
            continue
        refused = _refused(found, position, "warm.tokens_per_second")
        bar = axes.bar(position, call.tokens_per_second, 0.6, **_style(refused, CALL_COLOURS["warm"]))
        axes.bar_label(bar, [wording.number(call.tokens_per_second)], padding=2)
    _frame(axes, "Rate of the warm call", "output tokens per second", labels)


def _memory(axes: Any, found: SideBySide, labels: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    sizes = [
        getattr(run.smoke.memory, field) or 0 for run in found.runs if run.smoke.memory for field in MEMORY_COLOURS
    ]
    unit, factor = ("GiB", 2**30) if max(sizes, default=0) >= 2**30 else ("MiB", 2**20)
    titles = {"weights": "weights", "kv_cache": "KV cache"}
    for position, run in enumerate(found.runs):
        for (field, colour), shift in zip(MEMORY_COLOURS.items(), (-0.2, 0.2), strict=True):
            value = getattr(run.smoke.memory, field) if run.smoke.memory else None
            if value is None:
                _empty(axes, position + shift)
                continue
            refused = _refused(found, position, f"memory.{field}")
            bar = axes.bar(position + shift, value / factor, 0.38, **_style(refused, colour))
            axes.bar_label(bar, [wording.size(value)], padding=2, fontsize=8)
    _frame(axes, "Memory of one worker", unit, labels)
    axes.legend(
        handles=[Patch(color=colour, label=titles[field]) for field, colour in MEMORY_COLOURS.items()],
        fontsize=8,
        frameon=False,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
    )
