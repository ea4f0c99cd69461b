"""The choice of a rollout on a job's command line: every form of it means the same, on every primary config, and wins.

Hydra knows verl's rollout by one key of the defaults list, `rollout@actor_rollout_ref.rollout`, and lets a plain
`actor_rollout_ref.rollout.name=vllm`, which every script of verl's sets, go over whatever option was chosen by it.  A
job that says `rollout=ascend_safe` must not train on the stock rollout without a word:

1. `rollout=`, `+rollout=` and the long key are one choice.  Where the defaults list has verl's entry, as in all of
   verl's primary configs and those that build on them, it is made there, below the user's own settings.  A flat config
   (verl's `_generated_*`, a job's saved `.hydra/config.yaml`) has no such entry: the few settings of the option are set
   as if the command line began with them.
2. Afterwards the name agrees with the choice, or the job stops.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from verl_ascend_rollout import ROLLOUT_NAME
from verl_ascend_rollout.options import ROLLOUT

PACKAGE = ROLLOUT
"""Where verl's rollout is configured, and so the package of every option of the group `rollout`."""

ENTRY = f"rollout@{PACKAGE}"
"""The key of verl's own defaults entry (trainer/config/ppo_trainer.yaml, verl 0.6.1 to 0.9.1)."""

CONFIGS = "verl_ascend_rollout.configs"
"""The package that holds our YAML files."""

STOCK = "vllm"
"""verl's own rollout on the same engine: the other side of an A/B."""

OPTIONS = (ROLLOUT_NAME, STOCK)
"""Our options of the group `rollout`."""

FORM = re.compile(rf"\+{{0,2}}rollout(@{re.escape(PACKAGE)})?=(?P<option>[^{{].*)")
"""An override that chooses an option.  With `{` begins a mapping, which hydra takes for a plain value."""


def is_spoken(overrides: Sequence[str]) -> bool:
    """Whether one of the overrides chooses a rollout."""
    return any(map(FORM.fullmatch, overrides))


def without(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that choose no rollout."""
    return [override for override in overrides if not FORM.fullmatch(override)]


def spell_out(
    overrides: Sequence[str], known: Collection[str], stock: Callable[[], DictConfig]
) -> tuple[list[str], str | None]:
    """Return the overrides with the choice in a form that hydra can take.

    Args:
        known: the keys of the defaults list without the choice.
        stock: composes the job without the choice and the user's settings.

    Returns:
        The overrides, and the option where it is no longer the choice of a group.
    """
    options = [match["option"] for match in map(FORM.fullmatch, overrides) if match]
    if "rollout" in known:  # the user's own entry, which hydra finds by itself
        return list(overrides), None
    if ENTRY in known:
        return [_by_entry(override) for override in overrides], None
    if options[-1] in OPTIONS:
        rollout = OmegaConf.select(stock(), PACKAGE)
        if isinstance(rollout, DictConfig):
            return [*_flat(options[-1], rollout), *without(overrides)], options[-1]
    return list(overrides), None  # hydra says what is wrong with it


def enforce_choice(config: DictConfig) -> None:
    """Let the rollout's name be what was chosen, and say so where it was not.

    Raises:
        SystemExit: with code 2, where the name says another engine than vLLM.
    """
    choices = config.hydra.runtime.choices
    chosen = next((choices[key] for key in ("rollout", ENTRY) if choices.get(key) in OPTIONS), None)
    name = name_of(config)
    if chosen is not None and name in OPTIONS and name != chosen:
        say(
            f"rollout={chosen} replaces {PACKAGE}.name={name}: the rollout of this job is {chosen} "
            f"(rollout={name} chooses the other)"
        )
        with read_write(config), open_dict(config):
            OmegaConf.update(config, f"{PACKAGE}.name", chosen)
    elif chosen is not None and name is not None and name != chosen:
        sentence = (
            f"rollout={chosen} and {PACKAGE}.name={name} contradict each other, since {chosen} runs on the engine "
            f"vllm: take out rollout={chosen} to run on {name}, or {PACKAGE}.name={name} with the settings that go "
            "with it"
        )
        print(f"{ROLLOUT_NAME}: {sentence}", file=sys.stderr, flush=True)
        raise SystemExit(2)


@functools.cache  # hydra composes the config of a run more than once
def say(sentence: str) -> None:
    """Print a sentence to standard error, once a process: what is composed may go to a file by standard output."""
    print(f"{ROLLOUT_NAME}: {sentence}", file=sys.stderr, flush=True)


def _by_entry(override: str) -> str:
    match = FORM.fullmatch(override)
    return f"{ENTRY}={match['option']}" if match else override


def name_of(config: DictConfig) -> str | None:
    """Return the name of the job's rollout; `None` where there is none, or only the job can tell."""
    try:
        name = OmegaConf.select(config, f"{PACKAGE}.name")
    except OmegaConfBaseException:  # an interpolation
        return None
    return None if name is None else str(name)


def _flat(option: str, stock: DictConfig) -> list[str]:
    """Return the option as overrides of a flat config, whose rollout has the settings `stock`.

    A job's saved config that has our options already keeps them.
    """
    ours = bool(OmegaConf.select(stock, f"engine_kwargs.{ROLLOUT_NAME}"))
    wanted: dict[str, Any] = {"name": option}
    if option == ROLLOUT_NAME and not ours:
        text = (resources.files(CONFIGS) / "rollout" / f"{ROLLOUT_NAME}.yaml").read_text(encoding="utf-8")
        wanted |= {key: value for key, value in yaml.safe_load(text).items() if key != "defaults"}
    elif option == STOCK and ours:
        wanted |= {"enforce_eager": stock.enforce_eager or False, "engine_kwargs": {ROLLOUT_NAME: None}}
    return [f"++{PACKAGE}.{key}={json.dumps(value)}" for key, value in _leaves(wanted)]


def _leaves(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
