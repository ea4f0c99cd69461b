"""The patch machinery itself, on stand-in modules: no verl, no vLLM, no torch."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

from verl_ascend_rollout import compat


@pytest.fixture
def no_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "_problems", [])


def module_with(**attributes: Any) -> types.ModuleType:
    module = types.ModuleType("verl.stand_in")
    vars(module).update(attributes)
    return module


def patch_for(attribute: str, parameters: tuple[str, ...] = ("name",)) -> compat.Patch:
    def shout(original: Callable[..., str], *args: Any, **kwargs: Any) -> str:
        return original(*args, **kwargs).upper()

    return compat.Patch("verl.stand_in", attribute, parameters, shout, "stand_in.py:1 says it quietly")


def test_install_imports_neither_verl_nor_what_verl_imports() -> None:
    program = (
        "import sys; from verl_ascend_rollout import compat; compat.install(); compat.install();"
        "print(sorted({'verl', 'vllm', 'torch', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


def test_a_patched_function_keeps_its_face_and_is_patched_once(no_problems: None) -> None:
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
    assert (first.__wrapped__, getattr(first, compat.MARK)) == (greet, True)
    assert (first.__name__, first.__doc__, inspect.signature(first)) == (
        "greet",
        "Say hello.",
        inspect.signature(greet),
    )
    assert compat.problems() == ()


def test_copies_taken_before_the_patch_are_replaced_in_verl_and_nowhere_else(
    no_problems: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greet(name: str) -> str:
        return name

    module, early, other = module_with(greet=greet), module_with(greet=greet), module_with(greet=greet)
    monkeypatch.setitem(sys.modules, "verl.early_importer", early)
    monkeypatch.setitem(sys.modules, "verlandia.early_importer", other)
    patch_for("greet").apply(module)
    assert early.greet is module.greet
    assert other.greet is greet


class Inherits:
    """Has only object's __init__."""


@pytest.mark.parametrize(
    ("attribute", "attributes", "what"),
    [
        ("greet", {}, "is gone"),
        ("Client.generate", {}, "is gone"),
        ("Client.__init__", {"Client": Inherits}, "is gone"),
        ("greet", {"greet": lambda who: who}, "has no parameter name"),
    ],
    ids=["function", "class", "only inherited", "parameter"],
)
def test_drift_is_said_once_and_stops_only_ascend_safe(
    attribute: str,
    attributes: dict[str, Any],
    what: str,
    no_problems: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    patch = patch_for(attribute)
    with caplog.at_level(logging.ERROR, logger=compat.logger.name):
        patch.apply(module_with(**attributes))
        patch.apply(module_with(**attributes))
    (problem,) = compat.problems()
    assert [record.getMessage() for record in caplog.records] == [problem]
    assert f"verl.stand_in.{attribute} {what}, so the rollout 'ascend_safe' cannot be treated as 'vllm'" in problem
    assert "stand_in.py:1 says it quietly" in problem

    assert compat._is_ours("vllm") is False
    with pytest.raises(
        compat.CompatError, match=r"stand_in\.py:1 .*: use a verl release that the support matrix lists"
    ):
        compat._is_ours("ascend_safe")


def test_intact_without_problems(no_problems: None) -> None:
    compat.assert_intact()
    assert compat._is_ours("ascend_safe") is True


def test_every_patch_says_where_and_what_would_go_wrong() -> None:
    for patch in compat.PATCHES:
        where = patch.module.removeprefix("verl.").replace(".", "/") + ".py:"
        assert patch.reason.startswith(where), patch
        assert "without the patch" in patch.reason, patch
        assert patch.wrapper.__doc__, patch
