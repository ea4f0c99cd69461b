"""Rules that a reader of the code may rely on, checked in the source itself."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "verl_ascend_rollout"

HEAVY = {"verl", "vllm", "vllm_ascend", "torch", "torch_npu", "ray", "transformers"}
LIGHT = (
    "__init__.py",
    "autoload.py",
    "events.py",
    "import_fix",
    "integration/cluster.py",
    "integration/cluster_probe.py",
    "integration/composition.py",
    "integration/cpu_platform.py",
    "integration/patch.py",
    "integration/patches",
    "integration/preflight.py",
    "integration/rollout_choice.py",
    "integration/runtime_env.py",
    "options.py",
    "platforms",
    "plugin.py",
    "policy",
    "tools/arguments.py",
    "tools/cli.py",
    "tools/compare",
    "tools/doctor",
    "tools/explain.py",
    "tools/picture.py",
    "tools/redaction.py",
    "tools/report.py",
    "tools/smoke",
    "tools/supervisor.py",
    "tools/terminal.py",
    "tools/timeline.py",
    "tools/trace.py",
    "tools/wording.py",
)
"""What runs on a broken installation, or in every process that imports verl."""

ROLLOUT_REGISTRIES = {"_ROLLOUT_REGISTRY", "RolloutReplicaRegistry", "get_rollout_class"}


def sources(*places: str) -> list[Path]:
    """The Python files of some modules and folders of the package."""
    files = [file for place in places for file in (sorted((PACKAGE / place).rglob("*.py")) or [PACKAGE / place])]
    files = [file for file in files if file != PACKAGE / "tools/smoke/worker.py"]  # runs in vLLM's worker
    assert files and all(file.is_file() for file in files), f"nothing is there to check: {places}"
    return files


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def imports(node: ast.AST, *, everywhere: bool) -> Iterator[tuple[str, int]]:
    """Each module that is imported, with its line; without `everywhere` only what happens when a module is loaded."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"a relative import in line {child.lineno}: these are not looked at"
            yield from ((f"{child.module}.{alias.name}", child.lineno) for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        elif everywhere or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(child, everywhere=everywhere)


def test_the_search_for_imports_finds_them() -> None:
    program = (
        "import a\nif TYPE_CHECKING:\n    import b\ntry:\n    from c import d\nexcept ImportError:\n    pass\n"
        "def function():\n    import e\nclass Class:\n    import f\n    def method(self):\n        from g.h import i\n"
    )
    tree = ast.parse(program)
    assert [name for name, _ in imports(tree, everywhere=False)] == ["a", "c.d", "f"]
    assert [name for name, _ in imports(tree, everywhere=True)] == ["a", "c.d", "e", "f", "g.h.i"]


@pytest.mark.parametrize("place", LIGHT)
def test_what_must_stay_light_imports_nothing_heavy_when_it_is_loaded(place: str) -> None:
    heavy = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in sources(place)
        for name, line in imports(tree_of(file), everywhere=False)
        if name.partition(".")[0] in HEAVY
    ]
    assert heavy == []


@pytest.mark.parametrize(
    ("names", "allowed"),
    [
        (ROLLOUT_REGISTRIES, {"integration/patches/names.py"}),
        ({"PlatformRegistry", "set_platform"}, {"integration/patches/platforms.py"}),
    ],
)
def test_verls_registries_are_known_in_one_place(names: set[str], allowed: set[str]) -> None:
    users = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(tree_of(file)):
            used = {
                getattr(node, "id", None),
                getattr(node, "attr", None),
                *(alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)),
            }
            if used & names:
                users.add(file.relative_to(PACKAGE).as_posix())
    assert users <= allowed
    assert users, "nobody uses them any more: this rule looks for names that are gone"


def test_every_module_and_everything_public_in_it_says_what_it_is() -> None:
    silent = []
    for file in [*PACKAGE.rglob("*.py"), *(ROOT / "hydra_plugins").rglob("*.py")]:
        tree = tree_of(file)
        if tree.body and not ast.get_docstring(tree):
            silent.append(str(file.relative_to(ROOT)))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not (
                node.name.startswith("_") or ast.get_docstring(node)
            ):
                silent.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert silent == []


def test_no_module_is_named_after_nothing() -> None:
    folders = ("verl_ascend_rollout", "hydra_plugins", "recipes", "requirements", "tests", "configs", "emulator")
    names = {path.stem for folder in folders for path in (ROOT / folder).rglob("*")}
    assert names & {"utils", "util", "helpers", "helper", "common", "misc"} == set()


def test_hydras_namespace_package_stays_one() -> None:
    """With an `__init__.py` it would hide the plug-ins of every other distribution."""
    assert not (ROOT / "hydra_plugins" / "__init__.py").exists()
    assert (ROOT / "hydra_plugins" / "verl_ascend_rollout" / "__init__.py").is_file()


def test_no_lock_has_an_address() -> None:
    locks = sorted((ROOT / "requirements").glob("*.txt"))
    assert {"cpu.txt", "gpu.txt", "npu.txt"} <= {lock.name for lock in locks}
    for lock in locks:
        text = lock.read_text(encoding="utf-8")
        assert "==" in text
        assert re.findall(r"^.*(?:://|--(?:extra-)?index-url|--find-links|-f ).*$", text, re.MULTILINE) == [], lock


def test_a_test_that_starts_an_engine_or_ray_is_marked() -> None:
    """So that `pytest -m "not engine and not e2e"` is quick."""
    unmarked = []
    for folder, marker in (("engine", "pytest.mark.engine"), ("e2e", "pytest.mark.e2e")):
        for file in (ROOT / "tests" / folder).rglob("test_*.py"):
            tree = tree_of(file)
            marks = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign)]
            if any(mark.startswith("pytestmark") and marker in mark for mark in marks):
                continue
            for node in ast.walk(tree):
                is_test = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
                if is_test and not any(marker in ast.unparse(decorator) for decorator in node.decorator_list):
                    unmarked.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert unmarked == []


@pytest.mark.parametrize("python", ["/bin/true-ly", "/bin/false"])
def test_a_python_that_cannot_be_used_is_said_before_anything_is_installed(python: str, tmp_path: Path) -> None:
    """A version manager's `python3.10` that is on the path and runs nothing, or Python 3.13."""
    command = ["make", "--no-print-directory", "setup", f"PYTHON={python}", f"VENV={tmp_path}/venv"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"PYTHON={python} does not run Python 3.10, 3.11 or 3.12" in done.stderr
    assert not done.stdout and not (tmp_path / "venv").exists()


def made(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Ask make, whatever make runs these tests with."""
    environ = {name: value for name, value in os.environ.items() if name not in ("STACK", "MAKEFLAGS", "MAKELEVEL")}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=environ)


@pytest.mark.parametrize("lock", sorted((ROOT / "requirements/stacks").glob("*.txt")), ids=lambda lock: lock.stem)
def test_the_command_in_a_stacks_lock_compiles_that_lock_and_no_other(lock: Path) -> None:
    (command,) = re.findall(r"^#    make (.*)$", lock.read_text(encoding="utf-8"), re.MULTILINE)
    assert command == f"lock STACK={lock.stem}"
    done = made("-n", *command.split())
    assert done.returncode == 0
    assert f"requirements/stacks.py lock {lock.stem}\n" in done.stdout
    assert "pip compile" not in done.stdout and "pip compile" in made("-n", "lock").stdout


def test_a_stack_that_is_not_there_is_one_sentence() -> None:
    done = made("demo", "STACK=nonsense")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "there is no stack nonsense: `make stacks` lists those that there are"
    assert not (ROOT / ".venv-nonsense").exists() and not list((ROOT / "requirements").rglob("nonsense*"))
