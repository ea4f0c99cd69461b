"""Whether what verl imports from vLLM is there: read in the source of both, without importing either.

Looked at is what runs whenever a rollout is started: imports at the top of verl's rollout modules, and in the functions
that these call while they are imported.  An import that is tried, or that hangs on a condition, is verl's own way to
get along without it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from verl_ascend_rollout.integration.probe import definition, files
from verl_ascend_rollout.platforms.base import PlatformName
from verl_ascend_rollout.platforms.installed import vllm_distribution
from verl_ascend_rollout.tools.doctor.checks import failed, passed
from verl_ascend_rollout.tools.doctor.source import Sources
from verl_ascend_rollout.tools.report import Check, Evidence

MODULES = tuple(
    f"verl/workers/rollout/vllm_rollout/{name}.py" for name in ("vllm_async_server", "vllm_rollout", "utils")
)

ON_NPU = (("verl/utils/vllm/npu_vllm_patch.py", "apply_npu_vllm_patches"),)
"""What verl calls on an NPU while its vLLM utilities are imported (verl 0.9.1, utils/vllm/__init__.py:26)."""


class Imported(NamedTuple):
    """One name that verl imports."""

    where: str  # file and line in verl
    module: str
    name: str = ""  # empty for a module as a whole

    def __str__(self) -> str:
        return f"from {self.module} import {self.name}" if self.name else f"import {self.module}"


def check_imports(sources: Sources, platform: PlatformName, versions: Mapping[str, str]) -> Iterator[Check]:
    """Whether a rollout's imports would end in an ImportError."""
    if not (sources.has("verl") and sources.has("vllm")):
        return
    wanted = [found for file in MODULES if (tree := sources.tree(file)) for found in _imports(tree.body, file)]
    if platform == "npu":
        wanted += [found for file, function in ON_NPU for found in _in_function(sources, file, function, set())]
    missing = [(one, why) for one in wanted if (why := _missing(sources, one)) is not None]
    _, vllm = vllm_distribution(versions.get) or ("", "")
    pair = f"verl {versions.get('verl', '')} and vLLM {vllm}"
    if not missing:
        yield passed("stack.imports", f"{len(wanted)} names that verl imports from vLLM are there", confidence="read")
        return
    first, _ = missing[0]
    summary = f"{pair} do not go together: a rollout ends in ImportError at {first.where}, {first}"
    advice = "install releases that go together: docs/stacks.md has those that were looked at"
    evidence = [evidence for one, why in missing for evidence in (Evidence(one.where, str(one)), why)]
    yield failed("stack.imports", summary, advice, *evidence, confidence="read")


def _in_function(sources: Sources, file: str, function: str, seen: set[str]) -> Iterator[Imported]:
    """Yield what a function imports whenever it is called, and what it calls in its own file."""
    tree = sources.tree(file)
    node = definition(tree, function) if tree else None
    if not isinstance(node, ast.FunctionDef) or function in seen:
        return
    seen.add(function)
    yield from _imports(node.body, file)
    for statement in node.body:
        call = statement.value if isinstance(statement, ast.Expr) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
            yield from _in_function(sources, file, call.func.id, seen)


def _imports(statements: list[ast.stmt], file: str) -> Iterator[Imported]:
    for statement in statements:
        where = f"{file}:{statement.lineno}"
        if isinstance(statement, ast.ImportFrom) and not statement.level and _is_vllm(statement.module or ""):
            for alias in statement.names:
                yield Imported(where, statement.module or "", alias.name)
        elif isinstance(statement, ast.Import):
            for alias in statement.names:
                if _is_vllm(alias.name):
                    yield Imported(where, alias.name)


def _is_vllm(module: str) -> bool:
    return module.partition(".")[0] == "vllm"


def _missing(sources: Sources, one: Imported) -> Evidence | None:
    """Return what is not there; `None` where it is, or may be (a module that answers for itself)."""
    file = _file(sources, one.module)
    if file is None:
        return Evidence(one.module.replace(".", "/"), "is not there")
    if not one.name or one.name == "*" or _file(sources, f"{one.module}.{one.name}") is not None:
        return None
    name = re.escape(one.name)
    if re.search(rf"^(?:class|def|async def) +{name}\b|^{name}\b[^=(\n]*=", sources.read(file) or "", re.MULTILINE):
        return None  # without parsing all of it
    tree = sources.tree(file)
    if tree is None or {one.name, "*", "__getattr__"}.intersection(_bound(tree)):
        return None
    return Evidence(file, f"has no {one.name}")


def _file(sources: Sources, module: str) -> str | None:
    return next((file for file in files(module) if sources.read(file) is not None), None)


def _bound(tree: ast.Module) -> Iterator[str]:
    """Yield the names that a module may have, wherever in it they are bound."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.alias):
            yield node.asname or node.name.partition(".")[0]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
