"""Hydra plug-in: `rollout=ascend_safe` on verl's stock entry point, with no flag and no edit of verl's files.

Hydra loads this module in every hydra application of the installation, so it imports nothing but hydra, and it leaves
an application that has nothing to do with verl as it was.  In one that has, it adds to the end of the search path

1. `pkg://verl_ascend_rollout.configs`: the options `rollout/ascend_safe` and `rollout/vllm`, the group `platform`, and
   the primary config `ascend_safe`;
2. `DetectedPlatformSource`: the option `platform/auto`;

and lets hydra's config loader understand every form of the choice (`verl_ascend_rollout.integration.composition`).

All of it is one module on purpose: hydra 1.3 executes each module below `hydra_plugins` anew (core/plugins.py,
_scan_all_plugins), and a module that was already imported by another would give each plug-in class twice.
"""

from __future__ import annotations

import builtins
import importlib.util
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.errors import ConfigCompositionException
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

PROVIDER = "verl-ascend-rollout"
"""Who added an entry of the search path; `python -m verl.trainer.main_ppo --info searchpath` shows it."""

CONFIGS = "verl_ascend_rollout.configs"
"""The package that holds our YAML files."""

ENTRY = "rollout@actor_rollout_ref.rollout"
"""The key of verl's own defaults entry (ppo_trainer.yaml, verl 0.6.1 to 0.9.1): by it a config of verl's is known."""


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
        # Not at the top: this module is loaded by every hydra application.
        from verl_ascend_rollout import plugin
        from verl_ascend_rollout.integration import composition

        plugin.require_registered()
        composition.install(ConfigLoaderImpl, PROVIDER)
        search_path.append(PROVIDER, f"pkg://{CONFIGS}")
        search_path.append(PROVIDER, f"{DetectedPlatformSource.scheme()}://auto")


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
    """Return the folder behind an entry of the search path, if it is one of verl's, known by its ppo_trainer."""
    for folder in _folders(search_path):
        if _mentions_entry(folder / "ppo_trainer.yaml"):
            return folder
    return None


def _folders(search_path: str) -> Iterator[Path]:
    """Yield the folders behind an entry of the search path, found without importing a package.

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


def _detected_platform() -> str:
    # Not at the top: this module is loaded by every hydra application.
    from verl_ascend_rollout.platforms.base import PlatformError
    from verl_ascend_rollout.platforms.detect import detect

    try:
        return detect().name
    except PlatformError as error:
        raise ConfigCompositionException(str(error)) from None
