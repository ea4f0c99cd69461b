"""The patch mechanism, and every patch against a verl or vLLM that has drifted, on stand-in modules."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from verl_ascend_rollout import PATCHED
from verl_ascend_rollout.integration import patch as mechanism
from verl_ascend_rollout.integration.patch import DriftError, Patch, assert_intact, problems
from verl_ascend_rollout.integration.patches import MODULES, names, patches_of, vllm

PATCHES = patches_of()

each_patch = pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)


@pytest.fixture(autouse=True)
def no_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanism, "_drift", {})


def module_with(**attributes: Any) -> types.ModuleType:
    module = types.ModuleType("verl.stand_in")
    vars(module).update(attributes)
    return module


def shout(original: Callable[..., str], *args: Any, **kwargs: Any) -> str:
    """Say it in capitals.

    Without the patch nobody hears it: verl says it
    quietly (stand_in.py:1).  Remove when verl is louder.

    What comes after is for the reader of the code.
    """
    return original(*args, **kwargs).upper()


def patch_for(attribute: str, parameters: tuple[str, ...] = ("name",)) -> Patch:
    return Patch("verl.stand_in", attribute, shout, parameters)


def test_install_imports_neither_verl_nor_what_verl_imports() -> None:
    program = (
        "import sys; from verl_ascend_rollout.integration import patches; patches.install(); patches.install();"
        "print(sorted({'verl', 'vllm', 'torch', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


def test_a_patched_function_keeps_its_face_and_is_patched_once() -> None:
    def greet(name: str, mark: str = "!") -> str:
        """Say hello."""
        return f"hello {name}{mark}"

    module = module_with(greet=greet)
    patch = patch_for("greet")
    patch.apply(module)
    first = module.greet
    patch.apply(module)
    assert module.greet is first
    assert first("you", mark="?") == "HELLO YOU?"
    assert (first.__wrapped__, getattr(first, PATCHED)) == (greet, ("test_patch.shout",))
    assert (first.__name__, first.__doc__, inspect.signature(first)) == (
        "greet",
        "Say hello.",
        inspect.signature(greet),
    )
    assert problems() == ()


def twice(original: Callable[..., str], *args: Any) -> str:
    return original(*args) * 2


def test_two_patches_of_one_function_are_both_there_and_each_once() -> None:
    module = module_with(greet=lambda name: name)
    first = patch_for("greet")
    second = dataclasses.replace(first, function=twice)
    for patch in (first, second, first, second):
        patch.apply(module)
    assert module.greet("a") == "AA"
    assert getattr(module.greet, PATCHED) == ("test_patch.shout", "test_patch.twice")


def test_copies_taken_before_the_patch_are_replaced_whoever_took_them_and_however_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def greet(name: str) -> str:
        return name

    module, verls, users = module_with(greet=greet), module_with(greet=greet), module_with(say=greet, greet=len)
    monkeypatch.setitem(sys.modules, "verl.early_importer", verls)
    monkeypatch.setitem(sys.modules, "my_trainer", users)
    patch_for("greet").apply(module)
    assert verls.greet is users.say is module.greet is not greet
    assert users.greet is len


def test_a_patch_of_one_copy_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def greet(name: str) -> str:
        return name

    module, other = module_with(greet=greet), module_with(greet=greet)
    monkeypatch.setitem(sys.modules, "verl.early_importer", other)
    dataclasses.replace(patch_for("greet"), copies=False).apply(module)
    assert module.greet is not greet
    assert other.greet is greet


def fill(registry: dict[str, str]) -> dict[str, str]:
    registry["ours"] = "here"
    return registry


def test_a_registry_is_filled_where_it_is() -> None:
    registry = {"verls": "there"}
    module = module_with(registry=registry)
    for _ in range(2):
        Patch("verl.stand_in", "registry", fill, once=True).apply(module)
    assert module.registry is registry == {"verls": "there", "ours": "here"}


def subclass(original: type[Any]) -> type[Any]:
    return type("Ours", (original,), {})


def test_a_class_is_swapped_once() -> None:
    class Client:
        pass

    module = module_with(Client=Client)
    for _ in range(2):
        Patch("verl.stand_in", "Client", subclass, once=True).apply(module)
    assert module.Client.__mro__[:2] == (module.Client, Client)


def test_a_module_that_is_imported_already_is_patched_at_once_and_another_after_its_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("early_stand_in", "late_stand_in"):
        (tmp_path / f"{name}.py").write_text("def greet(name):\n    return name\n", encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    import early_stand_in

    for name in ("early_stand_in", "late_stand_in"):
        dataclasses.replace(patch_for("greet"), module=name).install()
    assert early_stand_in.greet("a") == "A"
    import late_stand_in

    assert late_stand_in.greet("a") == "A"


# --------------------------------------------------------------------------------------------------------------- drift


class Inherits:
    """Has only object's __init__."""


@pytest.mark.parametrize(
    ("attribute", "attributes", "what"),
    [
        ("greet", {}, "is gone"),
        ("Client.generate", {}, "is gone"),
        ("Client.__init__", {"Client": Inherits}, "is gone"),
        ("greet", {"greet": lambda who: who}, "has no parameter name"),
        ("greet", {"greet": 3}, "is another (TypeError: "),
    ],
    ids=["function", "class", "only inherited", "parameter", "no function"],
)
def test_drift_is_said_once_and_stops_only_ascend_safe(
    attribute: str,
    attributes: dict[str, Any],
    what: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    patch = patch_for(attribute)
    for _ in range(2):
        patch.apply(module_with(**attributes))
    (problem,) = problems()
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("ERROR", problem)]
    assert f"verl.stand_in.{attribute} {what}" in problem
    assert problem.endswith(", and without the patch nobody hears it: verl says it quietly (stand_in.py:1)")

    assert names._is_ours("vllm") is False
    with pytest.raises(DriftError, match=r"stand_in\.py:1\): use a release that the support matrix lists"):
        names._is_ours("ascend_safe")


def test_drift_away_from_a_patch_that_is_not_required_is_said_once_and_stops_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    patch = dataclasses.replace(patch_for("greet"), required=False)
    for module in (module_with(), module_with(), module_with(greet=lambda who: who)):
        patch.apply(module)
    gone, changed = (record.getMessage() for record in caplog.records)
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    assert "verl.stand_in.greet is gone, and without the patch nobody hears it" in gone
    assert "verl.stand_in.greet has no parameter name, and " in changed
    assert problems() == ()
    assert names._is_ours("ascend_safe") is True


def test_intact_without_problems() -> None:
    assert_intact()
    assert names._is_ours("ascend_safe") is True


def gone(path: list[str]) -> dict[str, Any]:
    """Neither the target nor the class that it is in are there."""
    return {}


def an_object(path: list[str]) -> dict[str, Any]:
    """The target is no function and no registry any more."""
    return nested(path, object())


def takes_nothing(path: list[str]) -> dict[str, Any]:
    """The target is a function without parameters."""
    return nested(path, lambda: None)


def nested(path: list[str], value: Any) -> dict[str, Any]:
    *owners, name = path
    return functools.reduce(lambda inner, owner: {owner: type(owner, (), inner)}, reversed(owners), {name: value})


DRIFTS = [
    pytest.param(patch, drift, id=f"{patch.name}-{drift.__name__}")
    for patch in PATCHES
    for drift in (gone, an_object, takes_nothing)
    # One that relies on no parameter fits a function that takes none.
    if not (drift is takes_nothing and not patch.parameters and not patch.once)
    # One about something that came late is not for a release without it.
    if not (drift is gone and not patch.everywhere)
]


def test_a_release_without_what_came_late_has_not_drifted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (late,) = [patch for patch in PATCHES if not patch.everywhere]
    monkeypatch.setitem(sys.modules, late.module, types.ModuleType(late.module))
    late.install()
    assert caplog.records == []


@pytest.mark.parametrize(("patch", "drift"), DRIFTS)
def test_a_module_that_has_drifted_is_imported_all_the_same_and_ascend_safe_refuses(
    patch: Patch,
    drift: Callable[[list[str]], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = types.ModuleType(patch.module)
    vars(module).update(drift(patch.attribute.split(".")))
    monkeypatch.setitem(sys.modules, patch.module, module)
    patch.install()  # the module is there, so the hook is called in here
    (record,) = [record for record in caplog.records if record.name == mechanism.logger.name]
    assert f"{patch.module}.{patch.attribute} " in record.getMessage()
    assert record.levelname == ("ERROR" if patch.required else "WARNING")
    if patch.required:
        with pytest.raises(DriftError, match=re.escape(f"{patch.module}.{patch.attribute} ")):
            assert_intact()
    else:
        assert_intact()


class CPUWorker:
    """vLLM's, as far as it looks for libraries; of one that has another fault."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.seen: list[str] = []

    def init_device(self) -> str:
        self.seen.append(os.environ.get("LD_PRELOAD", ""))
        for name in ("libtcmalloc", "libiomp"):
            if name not in self.seen[-1]:
                raise RuntimeError(f"{name} is not found in LD_PRELOAD. Please follow")
        if self.fault:
            raise RuntimeError(self.fault)
        return "started"


@pytest.mark.parametrize(
    ("before", "seen"),
    [
        (None, ["", "libtcmalloc:libiomp"]),
        ("/lib/x.so", ["/lib/x.so", "/lib/x.so:libtcmalloc:libiomp"]),
        ("/lib/libtcmalloc.so:/lib/libiomp5.so", ["/lib/libtcmalloc.so:/lib/libiomp5.so"]),
    ],
)
def test_a_cpu_worker_starts_without_the_libraries_that_make_it_faster(
    before: str | None, seen: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    if before is not None:
        monkeypatch.setenv("LD_PRELOAD", before)
    worker = CPUWorker()
    assert vllm.start_without_preloads(CPUWorker.init_device, worker) == "started"
    assert worker.seen == seen
    assert os.environ.get("LD_PRELOAD") == before
    assert ("libtcmalloc is not found" in caplog.text) == (len(seen) > 1), "what is missing is said"


def test_another_fault_of_a_cpu_worker_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "libtcmalloc:libiomp")
    worker = CPUWorker("no memory")
    with pytest.raises(RuntimeError, match="no memory"):
        vllm.start_without_preloads(CPUWorker.init_device, worker)
    assert len(worker.seen) == 1


def test_the_docstring_says_why_and_until_when() -> None:
    patch = patch_for("greet")
    assert patch.reason == "Without the patch nobody hears it: verl says it quietly (stand_in.py:1)"
    assert patch.remove_when == "verl is louder"
    bare = dataclasses.replace(patch, function=twice)
    assert bare.reason == bare.remove_when == ""


def test_every_import_of_an_empty_verl_and_vllm_works_and_every_required_patch_is_named(tmp_path: Path) -> None:
    """The same by real imports, in a process whose verl and vLLM have nothing in them."""
    for patch in PATCHES:
        file = tmp_path.joinpath(*patch.module.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        for empty in (file, *(folder / "__init__.py" for folder in file.parents if folder.is_relative_to(tmp_path))):
            empty.touch()
    program = (
        "import importlib, sys; from verl_ascend_rollout.integration import patch, patches;"
        "from verl_ascend_rollout.integration.patches import vllm;"
        "patches.install(); patches.install('no entry points'); [patch.install() for patch in vllm.PATCHES];"
        "found = [importlib.import_module(name).__file__ for name in sys.argv[2:]];"
        "assert all(file.startswith(sys.argv[1]) for file in found), found;"
        "print(*patch.problems(), sep='\\n'); patch.assert_intact()"
    )
    modules = sorted({patch.module for patch in PATCHES})
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), *modules],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": paths, "VERL_PLATFORM": "cpu"},
    )
    assert done.stderr.splitlines()[-1].startswith("verl_ascend_rollout.integration.patch.DriftError: "), done.stderr
    required = {f"{patch.module}.{patch.attribute}" for patch in PATCHES if patch.required}
    assert {line.split()[3] for line in done.stdout.splitlines()} == required
    assert done.stdout.count("is gone") == len(required)


@each_patch
def test_every_patch_says_what_goes_wrong_where_and_until_when(patch: Patch) -> None:
    assert patch.reason.startswith("Without the patch "), patch.reason
    assert re.search(r"\w/\w+\.py", patch.reason), patch.reason
    assert re.match("(verl|vLLM)", patch.remove_when), patch.remove_when


def test_every_module_of_patches_is_looked_at_here() -> None:
    modules = {file.stem for file in (Path(mechanism.__file__).parent / "patches").glob("*.py")} - {"__init__"}
    assert modules == set(MODULES) == {patch.name.partition(".")[0] for patch in PATCHES}
    assert len({patch.name for patch in PATCHES}) == len(PATCHES)
