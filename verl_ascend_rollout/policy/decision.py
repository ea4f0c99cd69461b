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
        name: what is decided: `enforce_eager`, `kv_release`, `environment.VLLM_ASCEND_ENABLE_NZ`, ...
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
    """All decisions for one engine.  Iterating gives each `Decision`; `decisions["kv_release"]` gives one by name."""

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
        """Return the decisions as plain JSON values, for events and reports."""
        return [dataclasses.asdict(decision) for decision in self.all]


def table(decisions: Decisions, width: int = 100, sources: bool = False) -> str:
    """Return the decisions for people, in lines of at most `width`: value, and below it why.

    Args:
        sources: say as well where each reason comes from, how sure it is, and when the value has to be set.
    """
    # Names that are longer, of environment variables, are few: a column for them would leave no room for the rest.
    longest = max((len(d.name) for d in decisions if "." not in d.name), default=0)
    lines = []
    for d in decisions:
        value = textwrap.wrap(f"{d.name:{longest}}  {shown(d.value)}", width, subsequent_indent=" " * (longest + 2))
        below = [d.reason, f"{d.confidence}, from {d.source}; set with: {d.when}"] if sources else [d.reason]
        lines += value
        for text in below:
            lines += textwrap.wrap(text, width, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(lines)


def shown(value: Any) -> str:
    """Return a value as the tables show it."""
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value)
    return "-" if value is None else str(value)
