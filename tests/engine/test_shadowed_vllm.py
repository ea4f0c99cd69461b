"""The real vLLM in installations where a folder hides it: without the import fix it fails, with it an engine answers.

The installation is a virtual environment with a link to everything that this one has, less vLLM, which is an editable
install there with setuptools' own finder; its checkout is a link to the real package.
"""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from setuptools.command.editable_wheel import _finder_template

pytestmark = pytest.mark.engine

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SECONDS = 500


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and where its vLLM is."""

    python: Path
    checkout: Path
    folder: Path

    def run(self, *command: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
        # PYTHONPATH is left out: what this test has there is not what it is about.
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        variables = {
            **kept,
            # So that nothing is known from before, of what vLLM asks a further process.
            "VLLM_CACHE_ROOT": str(cwd / "cache"),
            "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
            "PYTHONDONTWRITEBYTECODE": "1",
            **environ,
        }
        return subprocess.run(
            [str(self.python), *command], cwd=cwd, env=variables, capture_output=True, text=True, timeout=SECONDS
        )


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    folder = tmp_path_factory.mktemp("editable")
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder / "venv")
    site = next((folder / "venv" / "lib").glob("python*/site-packages"))
    real = Path(sysconfig.get_paths()["purelib"])
    for entry in real.iterdir():
        if entry.name != "vllm" and entry.suffix != ".pth" and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)
    (site / "this_tree.pth").write_text(f"{ROOT}\n")
    checkout = folder / "checkout"
    checkout.mkdir()
    (checkout / "vllm").symlink_to(real / "vllm")
    finder = "__editable___vllm_finder"
    (site / f"{finder}.py").write_text(_finder_template(finder, {"vllm": str(checkout / "vllm")}, {}))
    (site / "__editable__.vllm.pth").write_text(f"import {finder}; {finder}.install()\n")
    return Environment(folder / "venv" / "bin" / "python", checkout, folder)


@pytest.fixture
def hidden_by_folder(tmp_path: Path) -> Path:
    """A working directory with the root of a vLLM checkout in it."""
    (tmp_path / "vllm" / "docs").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def hidden_by_package(tmp_path: Path) -> Path:
    """A working directory that is an old vLLM checkout."""
    (tmp_path / "vllm" / "model_executor").mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text("__version__ = '0.6.0'\n")
    # setuptools' finder would have this one from the real package, under the stale one.
    (tmp_path / "vllm" / "model_executor" / "__init__.py").touch()
    return tmp_path


def answer_of(done: subprocess.CompletedProcess[str]) -> Mapping[str, Any]:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: Mapping[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("kind", ["hidden_by_folder", "hidden_by_package"])
def test_an_engine_answers_where_a_folder_hides_vllm(
    environment: Environment, kind: str, request: pytest.FixtureRequest, checkpoints: Any
) -> None:
    cwd: Path = request.getfixturevalue(kind)
    where = "unknown location" if kind == "hidden_by_folder" else str(cwd / "vllm" / "__init__.py")
    (cwd / "hidden_engine.py").symlink_to(HERE / "hidden_engine.py")
    checkpoint = str(checkpoints[0].path)
    broken = environment.run("-m", "hidden_engine", checkpoint, cwd=cwd)
    assert broken.returncode == 1
    assert f"cannot import name 'LLM' from 'vllm' ({where})" in broken.stderr
    done = environment.run("-m", "hidden_engine", "--fix", checkpoint, cwd=cwd)
    found = answer_of(done)
    assert len(found["tokens"]) == 8
    assert {found["here"], *found["workers"]} == {str(environment.checkout / "vllm" / "__init__.py")}
    assert (done.stdout + done.stderr).count("import fix: ") == 1


def test_what_vllm_starts_itself_takes_a_stale_package(
    environment: Environment, hidden_by_package: Path, checkpoints: Any
) -> None:
    """A script has its own folder in front, and so the real vLLM; the process that inspects a model does not.

    Nobody calls the import fix here but our plug-in in vLLM.
    """
    script, checkpoint = str(HERE / "hidden_engine.py"), str(checkpoints[0].path)
    broken = environment.run(script, checkpoint, cwd=hidden_by_package, ASCEND_SAFE_IMPORT_FIX="0")
    assert broken.returncode == 1
    assert "Error in inspecting model architecture" in broken.stdout + broken.stderr
    done = environment.run(script, checkpoint, cwd=hidden_by_package)
    found = answer_of(done)
    assert len(found["tokens"]) == 8
    assert {found["here"], *found["workers"]} == {str(environment.checkout / "vllm" / "__init__.py")}
    assert (done.stdout + done.stderr).count("import fix: ") == 1


def test_a_rollout_answers_where_a_folder_hides_vllm(
    environment: Environment, hidden_by_folder: Path, checkpoints: Any
) -> None:
    """Through verl, Ray and our server, with the plug-in as the only thing that knows of the fix."""
    module = ["-m", "hidden_engine", "--rollout", "events.jsonl", str(checkpoints[0].path)]
    (hidden_by_folder / "hidden_engine.py").symlink_to(HERE / "hidden_engine.py")
    broken = environment.run(*module, cwd=hidden_by_folder, ASCEND_SAFE_IMPORT_FIX="0")
    assert broken.returncode == 1 and "from 'vllm' (unknown location)" in broken.stderr, broken.stderr[-3000:]
    done = environment.run(*module, cwd=hidden_by_folder)
    found = answer_of(done)
    assert found["tokens"] and found["told"]
    assert {found["here"], *found["workers"]} == {str(environment.checkout / "vllm" / "__init__.py")}
    assert (done.stdout + done.stderr).count("import fix: ") == 1, "the driver says it; the actors inherit it"
