"""A job's configuration: its settings by name, and read from a file for a question about it.

Nothing of verl is imported, nothing is started.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_ascend_rollout import ROLLOUT_NAME
from verl_ascend_rollout.options import ROLLOUT, OptionError
from verl_ascend_rollout.policy.request import EngineRequest, ModelFacts

ROLLOUT_KEYS = frozenset(
    {
        "name",
        "enforce_eager",
        "enable_sleep_mode",
        "free_cache_engine",
        "cudagraph_capture_sizes",
        "expert_parallel_size",
        "tensor_model_parallel_size",
        "data_parallel_size",
        "max_num_seqs",
        "mtp",
        "enable_rollout_routing_replay",
        "engine_kwargs",
    }
)
"""The fields of verl's rollout config that a decision asks for."""


LARGEST = 32 << 20
"""Bytes in a configuration; what has more is a checkpoint, or a device."""

GIVE = "give a job's .hydra/config.yaml"


class ConfigError(ValueError):
    """The file cannot be read as a job's configuration.  One sentence: what is wrong, where, what to do."""


@dataclass(frozen=True)
class Job:
    """What a configuration says: the request in it, sentences about it that a person should read, and all of it."""

    request: EngineRequest = field(default_factory=EngineRequest)
    notes: tuple[str, ...] = ()
    config: Any = None


def setting(config: Any, name: str) -> Any:
    """Return the value of a setting by its dotted name; `None` where it is not there, missing, or cannot be resolved.

    Args:
        config: an OmegaConf node, or `None`.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return None if config is None else OmegaConf.select(config, name)
    except OmegaConfBaseException:
        return None


def number(config: Any, name: str) -> int | None:
    """Return the value of a setting that is a whole number; `None` for anything else."""
    value = setting(config, name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def trains_adapters(config: Any) -> bool:
    """Whether only adapters are sent to the engine (verl 0.9.1 vllm_async_server.py:244)."""
    model = "actor_rollout_ref.model"
    rank = number(config, f"{model}.lora_rank") or number(config, f"{model}.lora.rank") or 0
    return rank > 0 and not setting(config, f"{model}.lora.merge")


def read(path: str) -> Job:
    """Read a composed configuration (a job's `.hydra/config.yaml`), or a YAML file with the rollout's settings alone.

    Raises:
        ConfigError: there is no such file, it is no YAML, or it has no setting of a rollout, or a bad one.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError  # type: ignore[import-untyped]

    try:
        text = _text(Path(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path} cannot be read: {first_line(error)}") from None
    try:
        config = OmegaConf.load(io.StringIO(text))
    except OSError:  # omegaconf's word for what is neither a mapping nor a list
        config = None
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise ConfigError(f"--config {path} is no YAML file: {first_line(error)}") from None
    if not isinstance(config, DictConfig):
        raise ConfigError(f"--config {path} has no settings in it: {GIVE}")
    try:
        node = OmegaConf.select(config, ROLLOUT)
        whole = node is not None
        rollout = _plain(node if whole else config)
        model = _plain(OmegaConf.select(config, "actor_rollout_ref.model")) if whole else {}
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"--config {path} has a setting that cannot be resolved: {first_line(error)}; give the composed "
            "configuration (a job's .hydra/config.yaml)"
        ) from None
    if not ROLLOUT_KEYS & rollout.keys():
        raise ConfigError(f"--config {path} has neither {ROLLOUT} nor a setting of a rollout at its top level: {GIVE}")
    notes = []
    folder = model.get("path")
    known = ModelFacts()
    if isinstance(folder, str):
        if (Path(folder) / "config.json").is_file():
            known = read_model(folder)
        else:
            notes.append(f"The model {folder} is not on this machine: what depends on it is not known (--model DIR)")
    name = rollout.get("name")
    if whole and name != ROLLOUT_NAME:
        notes.append(f"{ROLLOUT}.name is {name}: these decisions are made with {ROLLOUT_NAME} only")
    try:
        request = EngineRequest.from_rollout(rollout, lora=whole and trains_adapters(config), model=known)
    except OptionError as error:
        raise ConfigError(f"--config {path}: {error}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"--config {path} has a rollout setting of the wrong kind: {first_line(error)}") from None
    return Job(
        request, tuple(notes), config if whole else OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}})
    )


def read_model(folder: str) -> ModelFacts:
    """Return what matters to a decision of the `config.json` in a model's folder; see `read_model_config`."""
    return ModelFacts.from_config(read_model_config(Path(folder)))


def read_model_config(folder: Path) -> Mapping[str, Any]:
    """Return the `config.json` in a model's folder.

    Raises:
        ConfigError: there is none, or it is no JSON mapping.
    """
    path = folder / "config.json"
    try:
        config = json.loads(_text(path))
    except FileNotFoundError:
        raise ConfigError(f"{folder} has no config.json: give a checkpoint's folder, as the hub has it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as a model's configuration: {first_line(error)}") from None
    if not isinstance(config, Mapping):
        raise ConfigError(f"{path} cannot be read as a model's configuration: it is no JSON object")
    return config


def _text(path: Path) -> str:
    """Return what is in a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is far too large, or no UTF-8.
    """
    with path.open("rb") as file:
        text = file.read(LARGEST + 1)
    if len(text) > LARGEST:
        raise ValueError(f"it has more than {LARGEST >> 20} MiB, and no configuration has")
    return text.decode()


def _plain(node: Any) -> dict[str, Any]:
    """Return the node as a mapping with everything resolved, without what is still missing (`???`)."""
    from omegaconf import DictConfig, OmegaConf

    if not isinstance(node, DictConfig):
        return {}
    resolved = OmegaConf.to_container(node, resolve=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items() if value != "???"}


def first_line(error: Exception) -> str:
    """Return the first line of what an exception says, as the end of a sentence."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
