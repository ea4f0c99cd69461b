"""What the files of a checkpoint say about the model, read without torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_ascend_rollout.policy.job_config import ConfigError, first_line, read_model_config
from verl_ascend_rollout.policy.request import ModelFacts

MIB = 2**20


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder."""

    folder: Path
    config: Mapping[str, Any]  # its `config.json`
    facts: ModelFacts  # of it, those that matter to a decision
    files: tuple[Path, ...]  # in safetensors; empty where the weights are in another form, or not on this machine
    parameters: int | None  # numbers in all of those; `None` where there are none

    @property
    def config_hash(self) -> str:
        """SHA-256 of the configuration, keys sorted."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()

    def weights_hash(self) -> str | None:
        """SHA-256 over the names, sizes, and first and last MiB of the weight files."""
        if not self.files:
            return None
        digest = hashlib.sha256()
        for path in self.files:
            size = path.stat().st_size
            digest.update(f"{path.name}\0{size}\0".encode())
            with path.open("rb") as file:
                digest.update(file.read(MIB))
                file.seek(max(size - MIB, 0))
                digest.update(file.read(MIB))
        return digest.hexdigest()

    def get(self, *names: str) -> Any:
        """Return the first of the settings that is there; a vision-language model keeps the language model's below."""
        text = self.config.get("text_config")
        for name in names:
            for config in (text if isinstance(text, Mapping) else {}, self.config):
                if config.get(name) is not None:
                    return config[name]
        return None


def read(folder: Path) -> Checkpoint:
    """Read a checkpoint's configuration and the headers of its weight files.

    Raises:
        ConfigError: there is no configuration, or it or a weight file is broken.
    """
    config = read_model_config(folder)
    files = weight_files(folder)
    return Checkpoint(folder, config, ModelFacts.from_config(config), files, _parameters(files))


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files that the checkpoint consists of: those of its index, or all.

    Some checkpoints have the weights once more in another naming (Mistral's consolidated.safetensors).

    Raises:
        ConfigError: the index is broken, or a file that it names is not there.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise ConfigError(f"{index} cannot be read: copy the checkpoint again") from None
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing:
            raise ConfigError(
                f"{folder} lacks {len(missing)} of its {len(names)} weight files ({missing[0]}, ...): copy the "
                "checkpoint again"
            )
        return tuple(folder / name for name in sorted(names))
    return tuple(sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated")))


def _parameters(files: tuple[Path, ...]) -> int | None:
    """Return how many numbers all tensors have, by the files' headers.

    Raises:
        ConfigError: a file is no safetensors file, or ends before its tensors do.
    """
    if not files:
        return None
    from safetensors import SafetensorError, safe_open

    total = 0
    for path in files:
        try:
            with safe_open(path, framework="numpy") as file:
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"{path} is no whole safetensors file ({first_line(error)}): copy the checkpoint again"
            ) from None
    return total
