"""Hydra plug-in: `rollout=ascend_safe` on verl's stock entry point, with no flag and no edit of verl's files.

Hydra loads this module in every hydra application of the installation, so it imports nothing but hydra, and it leaves
an application that has nothing to do with verl as it was.  In one that has, it adds to the search path:

1. in front of verl's own config folder, `ShorthandSource`: the short form `rollout=...` for verl's long
   `rollout@actor_rollout_ref.rollout=...`;
2. at the end, `pkg://verl_ascend_rollout.configs`: the options `rollout/ascend_safe` and `rollout/vllm`, the group
   `platform`, and the primary config `ascend_safe`;
3. after it, `DetectedPlatformSource`: the option `platform/auto`.

All of it is one module on purpose: hydra 1.3 executes each module below `hydra_plugins` anew (core/plugins.py,
_scan_all_plugins), and a module that was already imported by another would give each plug-in class twice.
"""

from __future__ import annotations

import builtins
import functools
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.object_type import ObjectType
from hydra.errors import ConfigCompositionException
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

PROVIDER = "verl-ascend-rollout"
"""Who added an entry of the search path; `python -m verl.trainer.main_ppo --info searchpath` shows it."""

CONFIGS = "verl_ascend_rollout.configs"
"""The package that holds our YAML files."""

PACKAGE = "actor_rollout_ref.rollout"
"""Where verl's rollout is configured, and so the package of every option of the group `rollout`."""

ENTRY = f"rollout@{PACKAGE}"
"""The key of verl's own defaults entry (ppo_trainer.yaml, verl 0.6.1 to 0.9.1): by it a config of verl's is known."""

STOCK = "stock_"
"""`stock_<name>` is verl's primary config `<name>` as it is in verl's file, for a config that builds on it."""

logger = logging.getLogger(__name__)


class VerlAscendRolloutSearchPath(SearchPathPlugin):
    """Adds our entries to the search path of an application of verl's."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        entries = search_path.get_path()
        if any(entry.provider == PROVIDER for entry in entries):
            return
        main = next((entry.path for entry in entries if entry.provider == "main"), None)
        folder = _verl_config_folder(main) if main else None
        # A group that the search path has turns `platform=x` on any command line into the choice of an option, also
        # where `platform` is a plain field: other applications must not get our groups.  An entry point of verl's
        # with a config folder of its own (verl.experimental, recipes) has imported verl by now.
        if folder is None and "verl" not in sys.modules:
            return
        if "verl" in sys.modules:
            # Not at the top: this module is loaded by every hydra application.
            from verl_ascend_rollout import plugin

            plugin.require_registered()
        if folder is not None:
            search_path.prepend(PROVIDER, f"{ShorthandSource.scheme()}://{folder}", SearchPathQuery(provider="main"))
        search_path.append(PROVIDER, f"pkg://{CONFIGS}")
        search_path.append(PROVIDER, f"{DetectedPlatformSource.scheme()}://auto")


class ShorthandSource(ConfigSource):
    """verl's config folder once more, in front of verl's own entry, with the short form `rollout=...` in it.

    Hydra overrides an entry of the defaults list by its full key, here `rollout@actor_rollout_ref.rollout`.  For the
    short key there has to be a second entry.  This source serves each of verl's primary configs that has the long entry
    with an empty list of options behind it, `- rollout: []`.  It contributes nothing until `rollout=<option>` replaces
    it, and unlike `null` it also stands aside for `+rollout=<option>`.
    """

    @staticmethod
    def scheme() -> str:
        return "verl-rollout-shorthand"

    def available(self) -> bool:
        return Path(self.path).is_dir()

    def is_group(self, config_path: str) -> bool:
        return False

    def is_config(self, config_path: str) -> bool:
        file = self._file(config_path)
        return file is not None and file.is_file() and (file.parent.name == "rollout" or _mentions_entry(file))

    def list(self, config_path: str, results_filter: ObjectType | None) -> builtins.list[str]:
        return []

    def load_config(self, config_path: str) -> ConfigResult:
        file = self._file(config_path)
        if file is None or not file.is_file():
            raise ConfigLoadError(f"Config not found: {config_path} in {self.path}")
        text = file.read_text(encoding="utf-8")
        config = OmegaConf.create(text)
        header = self._get_header_dict(text)
        if file.parent.name == "rollout":
            # verl's own option has no package header: `rollout=rollout` would land beside actor_rollout_ref, where
            # nothing reads it.  The long form names the package itself, which wins over a header.
            header["package"] = header["package"] or PACKAGE
        elif not config_path.startswith(STOCK) and isinstance(config, DictConfig):
            _add_short_entry(config)
        return ConfigResult(provider=self.provider, path=self.full_path(), config=config, header=header)

    def _file(self, config_path: str) -> Path | None:
        """The file of verl's behind a primary config or an option of the group `rollout`; other configs have none."""
        group, _, name = config_path.rpartition("/")
        if group not in ("", "rollout") or not name:
            return None
        if group == "":
            name = name.removeprefix(STOCK)
        return Path(self.path, group, self._normalize_file_name(name))


class DetectedPlatformSource(ConfigSource):
    """The option `platform/auto`: the file of the platform that this machine has, or that VERL_PLATFORM names."""

    @staticmethod
    def scheme() -> str:
        return "verl-ascend-platform"

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return config_path == "platform"

    def is_config(self, config_path: str) -> bool:
        return config_path.removesuffix(".yaml") == "platform/auto"

    def list(self, config_path: str, results_filter: ObjectType | None) -> builtins.list[str]:
        return ["auto"] if self.is_group(config_path) and results_filter in (None, ObjectType.CONFIG) else []

    def load_config(self, config_path: str) -> ConfigResult:
        if not self.is_config(config_path):
            raise ConfigLoadError(f"Config not found: {config_path}")
        name = _detected_platform()
        text = (resources.files(CONFIGS) / "platform" / f"{name}.yaml").read_text(encoding="utf-8")
        return ConfigResult(
            provider=self.provider,
            path=self.full_path(),
            config=OmegaConf.create(text),
            header=self._get_header_dict(text),
        )


def _verl_config_folder(search_path: str) -> Path | None:
    """The folder behind an entry of the search path, if it is a config folder of verl's, known by its ppo_trainer."""
    for folder in _folders(search_path):
        if _mentions_entry(folder / "ppo_trainer.yaml"):
            return folder
    return None


def _folders(search_path: str) -> Iterator[Path]:
    """The folders behind an entry of the search path, found without importing a package.

    Under `python -m` hydra gives a bare path, from an imported entry point `pkg://verl.trainer/config`.
    """
    scheme, _, rest = search_path.rpartition("://")
    if scheme in ("", "file"):
        yield Path(rest)
    elif scheme == "pkg":
        top, *inner = rest.replace("/", ".").strip(".").split(".")
        try:
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError):  # an empty name, or a module like __main__ that has no spec
            return
        for location in (spec and spec.submodule_search_locations) or ():
            yield Path(location, *inner)


def _mentions_entry(file: Path) -> bool:
    try:
        return ENTRY in file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def _add_short_entry(config: DictConfig) -> None:
    """Put `- rollout: []` right behind verl's own entry in the defaults list, unless it has an entry `rollout`."""
    entries = OmegaConf.to_container(config.get("defaults") or OmegaConf.create([]))
    assert isinstance(entries, list)
    keys = [next(iter(entry)) if isinstance(entry, dict) else None for entry in entries]
    if ENTRY in keys and "rollout" not in keys:
        entries.insert(keys.index(ENTRY) + 1, {"rollout": []})
        config.defaults = entries


def _detected_platform() -> str:
    # Not at the top: this module is loaded by every hydra application.
    from verl_ascend_rollout.platforms.base import PlatformError
    from verl_ascend_rollout.platforms.detect import OVERRIDE, detect

    try:
        name = detect().name
    except PlatformError as error:
        raise ConfigCompositionException(str(error)) from None
    if name == "cpu" and not os.environ.get(OVERRIDE):
        _warn_of_cpu()
    return name


@functools.cache  # hydra loads the config of a run more than once
def _warn_of_cpu() -> None:
    # Nobody asked for the CPU, and the driver of a cluster may sit on a node without an accelerator.
    logger.warning(
        "platform=auto found no accelerator that can be used here and takes the CPU: on the head node of a cluster of "
        "GPUs or NPUs say platform=cuda or platform=npu."
    )
