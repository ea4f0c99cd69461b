"""verl's configs, composed as its entry points compose them, without importing verl: of the installed one, and of every
other release of verl whose wheel is at hand."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.util
import io
import os
import sys
import tempfile
import types
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from packaging.utils import parse_wheel_filename

from verl_ascend_rollout.integration import contract, rollout_choice
from verl_ascend_rollout.tools.doctor import wheels

MAIN_PPO = "trainer/main_ppo.py"
FULLY_ASYNC = "experimental/fully_async_policy/fully_async_main.py"
ONE_STEP_OFF = "experimental/one_step_off_policy/main_ppo.py"


@dataclass(frozen=True)
class Verl:
    """A release of verl: its version, and the folder of its package."""

    version: str
    folder: Path

    def primaries(self) -> list[tuple[str, str]]:
        """Entry point and name of each primary config of verl's that has a rollout."""
        found = []
        for entry_point in (MAIN_PPO, FULLY_ASYNC, ONE_STEP_OFF):
            for file in sorted((self.folder / entry_point).parent.glob("config/*ppo*trainer.yaml")):
                found.append((entry_point, file.stem))
        return found


def installed() -> Verl:
    """The installed verl."""
    spec = importlib.util.find_spec("verl")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    return Verl((folder / "version" / "version").read_text().strip(), folder)


@functools.cache
def releases() -> list[Verl]:
    """The installed verl, then the others whose wheels the doctor has downloaded, unpacked as far as configs go: those
    of the contract at least, where an index has them.  One process at a time, since all have to collect the same."""
    found = [installed()]
    wheels.cache_folder().mkdir(parents=True, exist_ok=True)
    with (wheels.cache_folder() / ".collecting").open("w") as lock, contextlib.suppress(wheels.WheelError):
        fcntl.flock(lock, fcntl.LOCK_EX)
        for version in contract.WHOLE:
            wheels.get({"verl": version}, wheels.cache_folder(), say=False).close()
    for wheel in sorted(wheels.cache_folder().glob("verl-*.whl")):
        version = str(parse_wheel_filename(wheel.name)[1])
        if version == found[0].version:
            continue
        folder = tempfile.mkdtemp(prefix="verl-")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith("verl/") and name.endswith(".yaml"):
                    archive.extract(name, folder)
        for package in ("verl/trainer", "verl/trainer/config"):
            Path(folder, package, "__init__.py").touch()
        found.append(Verl(version, Path(folder, "verl")))
    return found


@contextlib.contextmanager
def as_the_verl_that_is_imported(verl: Verl) -> Iterator[None]:
    """Within the block, `verl` is an empty package in this folder: `pkg://verl.trainer.config` is looked for in it, and
    our plug-in takes the process for one of verl's.  And the process runs where the folder lies, as verl's own
    `file://verl/trainer/config` wants it."""
    others = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "verl"}
    package = types.ModuleType("verl")
    package.__path__ = [str(verl.folder)]
    sys.modules["verl"] = package
    before = os.getcwd()
    os.chdir(verl.folder.parent)
    try:
        yield
    finally:
        os.chdir(before)
        for name in [name for name in sys.modules if name.partition(".")[0] == "verl"]:
            del sys.modules[name]
        sys.modules.update(others)


def compose_whole(verl: Verl, entry_point: str, name: str, *overrides: str) -> DictConfig:
    """The config with hydra's own part, as `@hydra.main(config_path="config")` has it under `python -m`."""
    GlobalHydra.instance().clear()
    # The same parser in C, in a tenth of the time.
    fast = mock.patch.object(yaml, "SafeLoader", yaml.CSafeLoader)
    with fast, as_the_verl_that_is_imported(verl), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        search_path = create_automatic_config_search_path(str(verl.folder / entry_point), None, "config")
        hydra = Hydra.create_main_hydra2(task_name=Path(entry_point).stem, config_search_path=search_path)
        config = hydra.compose_config(name, list(overrides), run_mode=RunMode.RUN, with_log_configuration=False)
    GlobalHydra.instance().clear()
    return config


def settings(config: DictConfig) -> dict[str, Any]:
    """Every setting of a job by its dotted name, with nothing resolved."""
    container = OmegaConf.to_container(config)
    assert isinstance(container, dict)
    del container["hydra"]
    return leaves(container)


@functools.cache  # parsing verl's YAML takes a third of a second, and many tests compare with the same configs
def compose(verl: Verl, entry_point: str, name: str, *overrides: str) -> dict[str, Any]:
    """The settings of a job."""
    return settings(compose_whole(verl, entry_point, name, *overrides))


@dataclass(frozen=True)
class Ended:
    """How the driver of a job ends its composition: its config, or the exit status, and what it has said."""

    config: DictConfig | None
    status: int | str | None
    said: str


@functools.cache
def driver(verl: Verl, entry_point: str, name: str, *overrides: str) -> Ended:
    """Compose as a driver of its own would."""
    said = io.StringIO()
    rollout_choice.say.cache_clear()
    with contextlib.redirect_stderr(said):
        try:
            return Ended(compose_whole(verl, entry_point, name, *overrides), None, said.getvalue())
        except SystemExit as stop:
            return Ended(None, stop.code, said.getvalue())


def leaves(node: Any, path: str = "") -> dict[str, Any]:
    """A nested mapping flattened: value by dotted name."""
    if not isinstance(node, dict) or not node:
        return {path.removeprefix("."): node}
    return {key: value for name, child in node.items() for key, value in leaves(child, f"{path}.{name}").items()}
