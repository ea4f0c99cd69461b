"""What a decision is: a value, why it is that, and when it must be set; and how a set of them is shown."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Confidence = Literal["measured", "read", "inferred"]

When = Literal["engine arguments", "engine start", "engine up", "actor start", "each sleep"]
"""The last moment at which a value can be set and still does something:

- `actor start`: in the environment with which Ray starts an actor (`ray_kwargs.ray_init.runtime_env.env_vars`, or the
  shell in which Ray was started): the trainer's processes need it too, or Ray itself reads it.
- `engine start`: in the environment of the rollout server's process before it starts vLLM's worker processes, which
  inherit it; the rollout server does that.
- `engine arguments`: an argument of vLLM's engine.
- `engine up`: told to vLLM's workers once they run.
- `each sleep`: an argument of each call.
"""

ENVIRONMENT = "environment."
ADDITIONAL_CONFIG = "additional_config."


@dataclass(frozen=True)
class Decision:
    """One value that differs between platforms, and why it is what it is.

    Attributes:
        name: what is decided: `enforce_eager`, `kv_rung`, `environment.VLLM_ASCEND_ENABLE_NZ`, ...
        value: the decision; `None` where there is nothing to set.
        reason: why, for a person who runs a job.
        source: where the reason comes from: a release and file, an issue number, or the user's own setting.
        confidence: whether this was `measured` (run on such a platform), `read` in the source named, or `inferred`.
        when: the last moment at which it can be set; see `When`.
    """

    name: str
    value: Any
    reason: str
    source: str
    confidence: Confidence
    when: When = "engine arguments"


@dataclass(frozen=True)
class Decisions:
    """All decisions for one engine.  Iterating gives each `Decision`; `decisions["kv_rung"]` gives one by name."""

    all: tuple[Decision, ...]

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.all)

    def __len__(self) -> int:
        return len(self.all)

    def __getitem__(self, name: str) -> Decision:
        for decision in self.all:
            if decision.name == name:
                return decision
        raise KeyError(f"no decision is named {name!r}: there are {', '.join(d.name for d in self.all)}")

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables to set, by name, before the engine's processes start.

        Those that Ray's actors must have been started with are not in it: it is too late for them here.
        """
        return {
            decision.name.removeprefix(ENVIRONMENT): str(decision.value)
            for decision in self.all
            if decision.name.startswith(ENVIRONMENT) and decision.value is not None and decision.when == "engine start"
        }

    @property
    def additional_config(self) -> dict[str, Any]:
        """What to add to vLLM's `additional_config`, from which vllm-ascend takes its own settings."""
        prefix = ADDITIONAL_CONFIG
        return {d.name.removeprefix(prefix): d.value for d in self.all if d.name.startswith(prefix)}

    def as_dicts(self) -> list[dict[str, Any]]:
        """The decisions as plain JSON values, for events and reports."""
        return [dataclasses.asdict(decision) for decision in self.all]


COLUMNS = ("name", "value", "reason", "source", "confidence", "when")


def table(decisions: Decisions, width: int = 180) -> str:
    """The decisions as an aligned plain-text table of about `width` columns; long cells go on below."""
    rows = [(d.name, shown(d.value), d.reason, d.source, d.confidence, d.when) for d in decisions]
    widths = [max(len(row[column]) for row in [COLUMNS, *rows]) for column in range(len(COLUMNS))]
    # A list of sizes may go on below too.
    widths[1] = min(widths[1], max(20, max(len(word) for row in rows for word in row[1].split())))
    # Reason and source share what the short columns leave; a file path, which has no spaces, stays in one piece.
    room = width - sum(widths[column] for column in (0, 1, 4, 5)) - 2 * (len(COLUMNS) - 1)
    longest = [max(len(word) for row in rows for word in row[column].split()) for column in (2, 3)]
    widths[3] = min(widths[3], max(longest[1], room * 2 // 5))
    widths[2] = min(widths[2], max(longest[0], room - widths[3]))
    lines = [_line(COLUMNS, widths), _line(tuple("-" * w for w in widths), widths)]
    for row in rows:
        cells = [textwrap.wrap(cell, w, break_on_hyphens=False) or [""] for cell, w in zip(row, widths, strict=True)]
        for number in range(max(len(cell) for cell in cells)):
            lines.append(_line(tuple(cell[number] if number < len(cell) else "" for cell in cells), widths))
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A value as the tables show it."""
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value)
    return "-" if value is None else str(value)


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
