"""Our own options: everything a user can set under `actor_rollout_ref.rollout.engine_kwargs.ascend_safe`.

verl's RolloutConfig accepts no unknown field, but `engine_kwargs` is a free mapping with one key an engine (verl 0.6.1
to 0.9.1, workers/config/rollout.py), so that is where the options live, beside `engine_kwargs.vllm`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

KEY = "actor_rollout_ref.rollout.engine_kwargs.ascend_safe"

KVRung = Literal["auto", "release_kv_cache", "sleep", "direct", "keep"]
OnUnsafe = Literal["keep", "error"]
Verify = Literal["first", "always", "off"]
Parity = Literal["warn", "error", "off"]
WeightPath = Literal["auto", "by_layout", "verl"]


class OptionError(ValueError):
    """A rollout option that does not exist or a value that it cannot have.  The message names what is allowed."""


@dataclass(frozen=True)
class AscendSafeOptions:
    """The options of the `ascend_safe` rollout.

    Attributes:
        on_unsafe: what to do where no safe way exists to give the KV cache back: `keep` the memory and warn, or stop
            with an `error`.
        kv_rung: the rung of the KV-cache ladder to use; `auto` takes the first that works here.
        weight_path: how the engine loads weights: `by_layout`, each weight by the layout that was recorded for it, or
            by `verl`'s own sequence; `auto` takes the first where it has been run.
        verify: which weight syncs have their values searched for NaN and Inf, read back out of the engine and compared
            with what came, and their checksums compared where weights go through shared memory: all (`always`), the
            `first`, or none (`off`).  That every parameter came, once, is checked at every sync unless `off`.
        parity: what to do where the trainer's and the rollout's probabilities of the same tokens say that they are not
            one policy: `warn` at each such step, stop with an `error`, or nothing (`off`).
        sync_timeout: seconds for which a weight sync through shared memory waits for the other side before it fails:
            for a worker to come, for one bucket to be filled or loaded, for the worker to finish.
        events: a file to which every lifecycle step is appended as one JSON line; `None` writes none.
    """

    on_unsafe: OnUnsafe = "keep"
    kv_rung: KVRung = "auto"
    weight_path: WeightPath = "auto"
    verify: Verify = "first"
    parity: Parity = "warn"
    sync_timeout: float = 600.0
    events: str | None = None

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any] | None) -> AscendSafeOptions:
        """Build the options from the user's mapping; a key that is absent or null keeps its default.

        Raises:
            OptionError: for unknown keys and bad values, all of them in one message.
        """
        problems: list[str] = []
        if options is None:
            options = {}
        if not isinstance(options, Mapping):
            raise OptionError(f"{KEY} must be a mapping of options, got {options!r}")
        hints = get_type_hints(cls)
        accepted: dict[str, Any] = {}
        for key, value in options.items():
            if key not in hints:
                near = difflib.get_close_matches(str(key), hints, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                problems.append(f"unknown option {str(key)!r}{hint}: the options are {', '.join(sorted(hints))}")
                continue
            if value is None:
                continue
            # YAML 1.1 reads a bare `off` as False: for an option that has the word "off", that is what was meant.
            if value is False and "off" in _choices(hints[key]):
                value = "off"
            choices = _choices(hints[key])
            if choices and value not in choices:
                problems.append(f"{key}={value!r} is not possible: choose one of {', '.join(choices)}")
            elif hints[key] is float:
                # bool is an int to Python.
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                    problems.append(f"{key}={value!r} is not possible: it takes a number of seconds above 0")
                else:
                    accepted[key] = float(value)
            elif not choices and not isinstance(value, str):
                problems.append(f"{key}={value!r} is not possible: it takes a file path")
            else:
                accepted[key] = value
        if problems:
            raise OptionError(f"{KEY}: " + "; ".join(problems))
        return cls(**accepted)

    @classmethod
    def from_rollout(cls, rollout: Any) -> AscendSafeOptions:
        """Read the options out of a rollout config (verl's dataclass, an OmegaConf node, or a plain mapping).

        Raises:
            OptionError: see `from_mapping`.
        """
        engine_kwargs = rollout.get("engine_kwargs") or {}
        return cls.from_mapping(engine_kwargs.get("ascend_safe"))

    def as_dict(self) -> dict[str, Any]:
        """The options as a plain mapping, for events and reports."""
        return dataclasses.asdict(self)


def _choices(hint: Any) -> tuple[str, ...]:
    """The words that an option of this type can be, or nothing for a free value."""
    return get_args(hint) if get_origin(hint) is Literal else ()
