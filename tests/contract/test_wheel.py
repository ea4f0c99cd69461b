"""The wheel as it is built: what is in it, and that it works with nothing of the source tree in sight."""

from __future__ import annotations

import configparser
import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

COMPOSE = """
import importlib.util, json, os, sys

# Without site, sys.path has no .pth file's folders, so no editable install.
sys.path[:0] = [sys.argv[1]]
sys.path.append(sys.argv[2])

from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path
from hydra.types import RunMode
from omegaconf import OmegaConf

import hydra_plugins
import verl_ascend_rollout

def compose(name, *overrides):
    main_ppo = os.path.join(os.path.dirname(importlib.util.find_spec("verl").origin), "trainer", "main_ppo.py")
    search_path = create_automatic_config_search_path(main_ppo, None, "config")
    hydra = Hydra.create_main_hydra2("main_ppo", search_path)
    try:
        config = hydra.compose_config(name, list(overrides), RunMode.RUN, with_log_configuration=False)
    finally:
        from hydra.core.global_hydra import GlobalHydra
        GlobalHydra.instance().clear()
    rollout = config.actor_rollout_ref.rollout
    return {"name": rollout.name, "eager": rollout.enforce_eager, "device": config.trainer.device}

print(json.dumps({
    "package": verl_ascend_rollout.__file__,
    "plugins": list(hydra_plugins.__path__),
    "bare": compose("ppo_trainer", "rollout=ascend_safe"),
    "megatron": compose("ppo_megatron_trainer", "rollout=ascend_safe"),
    "primary": compose("ascend_safe", "rollout=ascend_safe"),
    "stock": compose("ascend_safe", "rollout=vllm"),
}))
"""


def build(folder: Path, *options: str) -> Path:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), *options, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"), "--wheel")


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def test_it_has_every_module_and_config_of_the_source_tree(names: list[str]) -> None:
    sources = {
        f"{package}/{file.relative_to(ROOT / folder).as_posix()}"
        for package, folder in {
            "verl_ascend_rollout": "verl_ascend_rollout",
            "verl_ascend_rollout/configs": "configs",
            "hydra_plugins": "hydra_plugins",
        }.items()
        for pattern in ("*.py", "*.yaml", "py.typed")
        for file in (ROOT / folder).rglob(pattern)
    }
    for needed in (
        "verl_ascend_rollout/configs/__init__.py",
        "verl_ascend_rollout/configs/ascend_safe.yaml",
        "verl_ascend_rollout/configs/rollout/ascend_safe.yaml",
        "verl_ascend_rollout/configs/rollout/vllm.yaml",
        *(f"verl_ascend_rollout/configs/platform/{name}.yaml" for name in ("cpu", "cuda", "npu")),
        "verl_ascend_rollout/py.typed",
        "hydra_plugins/verl_ascend_rollout/__init__.py",
    ):
        assert needed in sources, "the list above looks in the wrong place"
    assert sources <= set(names), sorted(sources - set(names))


def test_it_has_nothing_else(names: list[str]) -> None:
    # verl's own wheel installs a top-level package `tests`; ours must not write into it.
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"verl_ascend_rollout", "hydra_plugins"}
    assert "hydra_plugins/__init__.py" not in names, "it would hide every other hydra plug-in of the installation"
    # In a folder with nothing else, which goes on the path of the processes that the import fix reaches.
    start_up = [name for name in names if name.startswith("verl_ascend_rollout/import_fix/start_up/")]
    files = ("__init__.py", "sitecustomize.py")
    assert sorted(start_up) == [f"verl_ascend_rollout/import_fix/start_up/{name}" for name in files]
    assert len(names) == len(set(names))
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_by_way_of_an_sdist_it_is_the_same(wheel: Path, tmp_path: Path) -> None:
    """verl_ascend_rollout/configs is a link, and an sdist holds a folder that is linked only once, unless told."""
    from_sdist = build(tmp_path)  # without --wheel: an sdist, and the wheel from that
    first, second = zipfile.ZipFile(wheel), zipfile.ZipFile(from_sdist)
    assert {name: first.read(name) for name in first.namelist()} == {
        name: second.read(name) for name in second.namelist()
    }


def test_its_entry_points(wheel: Path, names: list[str]) -> None:
    (file,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
    parser = configparser.ConfigParser()
    parser.read_string(zipfile.ZipFile(wheel).read(file).decode())
    groups = {group: dict(parser[group]) for group in parser.sections()}
    assert set(groups) == {"verl.plugins", "vllm.general_plugins", "console_scripts"}
    assert set(groups["verl.plugins"]) == set(groups["vllm.general_plugins"]) == {"ascend_safe"}
    assert set(groups["console_scripts"]) == {"ascend-safe"}
    for group in groups.values():
        for target in group.values():
            module = target.partition(":")[0].replace(".", "/")
            assert f"{module}.py" in names or f"{module}/__init__.py" in names, target


def test_it_composes_without_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    unpacked = tmp_path / "unpacked"
    zipfile.ZipFile(wheel).extractall(unpacked)
    script = tmp_path / "compose.py"
    script.write_text(COMPOSE, encoding="utf-8")
    # -I: no PYTHONPATH, no current folder; -S: no .pth files, so no editable install.
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(script), str(unpacked), sysconfig.get_paths()["purelib"]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "VERL_PLATFORM": "cpu"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert Path(seen["package"]) == unpacked / "verl_ascend_rollout" / "__init__.py"
    assert seen["plugins"][0] == str(unpacked / "hydra_plugins")
    assert not [path for path in seen["plugins"] if Path(path).is_relative_to(ROOT / "hydra_plugins")]
    assert seen["bare"] == seen["megatron"] == {"name": "ascend_safe", "eager": None, "device": "cuda"}
    assert seen["primary"] == {"name": "ascend_safe", "eager": None, "device": "cpu"}
    assert seen["stock"] == {"name": "vllm", "eager": False, "device": "cpu"}
