"""Our own options: everything a user can set under `actor_rollout_ref.rollout.engine_kwargs.ascend_safe`.

verl's RolloutConfig accepts no unknown field, but `engine_kwargs` is a free mapping with one key an engine (verl 0.6.1
to 0.9.1, workers/config/rollout.py), so that is where the options live, beside `engine_kwargs.vllm`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

ROLLOUT = "actor_rollout_ref.rollout"
KEY = f"{ROLLOUT}.engine_kwargs.ascend_safe"

logger = logging.getLogger("verl_ascend_rollout.options")

KVMethod = Literal["kv_only", "sleep", "reallocate", "keep"]
"""How the KV cache's memory is given back (`policy.kv_release` says where each works)."""

KVRelease = Literal["auto", "kv_only", "sleep", "reallocate", "keep"]
OnUnsafe = Literal["keep", "error"]
Verify = Literal["first", "always", "off"]
Parity = Literal["warn", "error", "off"]
WeightPath = Literal["auto", "by_layout", "layerwise", "verl"]
OnEngineDeath = Literal["stop", "restart"]


OLD_OPTIONS = {"kv_rung": "kv_release"}
OLD_VALUES = {"kv_release": {"release_kv_cache": "kv_only", "direct": "reallocate"}}
"""What we called them before: still taken, with one line in the log."""


class OptionError(ValueError):
    """A rollout option that does not exist or a value that it cannot have.  The message names what is allowed."""


@dataclass(frozen=True)
class AscendSafeOptions:
    """The options of the `ascend_safe` rollout.

    Attributes:
        on_unsafe: what to do where no safe way exists to give the KV cache back: `keep` the memory and warn, or stop
            with an `error`.
        kv_release: how the KV cache's memory is given back; `auto` takes the first method that works here.
        weight_path: how the engine loads weights: `by_layout`, each weight by the layout that was recorded for it;
            `layerwise`, by vLLM's own layerwise reload (0.24 and later); or by `verl`'s own sequence.  `auto` takes
            the first of these that works.
        verify: which weight syncs have their values searched for NaN and Inf, read back out of the engine and compared
            with what came, and their checksums compared where weights go through shared memory: all (`always`), those
            that go through the model's loader and the first that passes (`first`), or none (`off`).  That every
            element of every parameter came once, and every tensor was used, is checked at every sync.
        parity: what to do where the trainer's and the rollout's probabilities of the same tokens say that they are not
            one policy: `warn` at each such step, stop with an `error`, or nothing (`off`).
        sync_timeout: seconds for which a weight sync waits for the other side before it fails: for a worker to come,
            for one bucket to be filled or loaded, for the worker to finish.
        on_engine_death: what to do when a process of the engine has ended: `stop` the job with a sentence, or `restart`
            the engine, from a copy of the last synced weights that is kept in host memory.
        max_engine_restarts: how often each replica's engine is made again before the job stops all the same.
        events: a file to which every lifecycle step is appended as one JSON line; `None` writes none.
    """

    on_unsafe: OnUnsafe = "keep"
    kv_release: KVRelease = "auto"
    weight_path: WeightPath = "auto"
    verify: Verify = "first"
    parity: Parity = "warn"
    sync_timeout: float = 600.0
    on_engine_death: OnEngineDeath = "stop"
    max_engine_restarts: int = 3
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
        for given, value in options.items():
            key = OLD_OPTIONS.get(given, given)
            if key not in hints:
                near = difflib.get_close_matches(str(key), [*hints, *OLD_OPTIONS], n=1)
                hint = f" (did you mean {OLD_OPTIONS.get(near[0], near[0])!r}?)" if near else ""
                problems.append(f"unknown option {str(key)!r}{hint}: the options are {', '.join(sorted(hints))}")
                continue
            if value is None:
                continue
            value = today(given, value)
            # YAML 1.1 reads a bare `off` as False: for an option that has the word "off", that is what was meant.
            if value is False and "off" in _choices(hints[key]):
                value = "off"
            choices = _choices(hints[key])
            if choices and value not in choices:
                problems.append(f"{given}={value!r} is not possible: choose one of {', '.join(choices)}")
            elif key in accepted and accepted[key] != value:
                problems.append(f"{key} is set twice, to {accepted[key]!r} and to {value!r}: kv_rung is its old name")
            elif hints[key] is float:
                # bool is an int to Python.
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                    problems.append(f"{key}={value!r} is not possible: it takes a number of seconds above 0")
                else:
                    accepted[key] = float(value)
            elif hints[key] is int:
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    problems.append(f"{key}={value!r} is not possible: it takes a whole number above 0")
                else:
                    accepted[key] = value
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
        if not isinstance(engine_kwargs, Mapping):
            raise OptionError(f"{ROLLOUT}.engine_kwargs must be a mapping, got {engine_kwargs!r}")
        return cls.from_mapping(engine_kwargs.get("ascend_safe"))

    def as_dict(self) -> dict[str, Any]:
        """Return the options as a plain mapping, for events and reports."""
        return dataclasses.asdict(self)


def today(option: str, value: Any) -> Any:
    """Return the value of an option in today's words; an old name or value is said in the log, once in a process."""
    name = OLD_OPTIONS.get(option, option)
    if name != option:
        _say_once(f"{KEY}: the option {option} is called {name} now; the old name will go")
    if isinstance(value, str) and value in OLD_VALUES.get(name, {}):
        new = OLD_VALUES[name][value]
        _say_once(f"{KEY}.{name}: the value {value} is called {new} now; the old word will go")
        return new
    return value


@functools.cache
def _say_once(sentence: str) -> None:
    logger.warning("%s", sentence)


def _choices(hint: Any) -> tuple[str, ...]:
    """Return the words that an option of this type can be, or nothing for a free value."""
    return get_args(hint) if get_origin(hint) is Literal else ()
