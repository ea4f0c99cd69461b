"""Looks up the contract in verl's source, without importing it: tens of milliseconds, in every process of a job."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from verl_ascend_rollout.integration.contract import CONTRACT, HOOKS, SERVER, Generation, Symbol

Function = ast.FunctionDef | ast.AsyncFunctionDef

Trees = Callable[[str], ast.Module | None]
"""A file by its path below site-packages, parsed; `None` where there is none."""


@dataclass(frozen=True)
class Probe:
    """What a verl has of the contract.

    Attributes:
        generation: how we are plugged into it.
        missing: the required symbols that are not there.
    """

    generation: Generation
    missing: tuple[Symbol, ...]


def probe(trees: Trees) -> Probe:
    """Look up what the contract requires on every platform."""
    generation = _generation(trees)
    missing = [symbol for symbol in CONTRACT if applies(symbol, generation) and find(symbol, trees) is None]
    return Probe(generation, tuple(missing))


def _generation(trees: Trees) -> Generation:
    if any(find(symbol, trees) is not None for symbol in CONTRACT if symbol.generations == ("gate",)):
        return "gate"
    plugins = next(symbol for symbol in CONTRACT if symbol.key == "plugins")
    if find(plugins, trees) is not None:
        return "no gate"
    hooks = (symbol for symbol in CONTRACT if symbol.module == SERVER and symbol.generations == HOOKS)
    return "no entry points" if any(find(hook, trees) is not None for hook in hooks) else "no hooks"


def applies(symbol: Symbol, generation: Generation) -> bool:
    """Return whether registration refuses without it."""
    return symbol.required and not symbol.only and generation in (symbol.generations or (generation,))


def find(symbol: Symbol, trees: Trees) -> tuple[str, int] | None:
    """Return file and line of a symbol; `None` where it is gone, or does not take a parameter that we give."""
    for file in files(symbol.module):
        tree = trees(file)
        if tree is not None:
            node = locate(tree, symbol.name, symbol.parameters, symbol.expression)
            return None if node is None else (file, int(getattr(node, "lineno", 0)))
    return None


def locate(tree: ast.AST, name: str, parameters: tuple[str, ...] = (), expression: bool = False) -> ast.AST | None:
    """Return what defines a dotted name, or sets it on `self`; `None` where it does not take all the parameters."""
    node = _expression(tree, name) if expression else definition(tree, name) or _set_on_self(tree, name)
    if node is None or not parameters:
        return node
    takes = {argument.arg for argument in all_arguments(node)} if isinstance(node, Function) else set()
    return node if takes.issuperset(parameters) else None


def files(module: str) -> tuple[str, str]:
    """Return the two paths that a module may have."""
    path = module.replace(".", "/")
    return f"{path}.py", f"{path}/__init__.py"


def folder() -> Path | None:
    """Return where the verl lies that this process imports, or would; `None` where there is none."""
    try:
        spec = importlib.util.find_spec("verl")
    except ValueError:  # something without a spec under that name
        spec = None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def installed() -> Trees | None:
    """Return the source of that verl; `None` where there is none."""
    verl = folder()
    if verl is None:
        return None

    @functools.cache
    def tree(file: str) -> ast.Module | None:
        try:
            return ast.parse((verl / file.removeprefix("verl/")).read_bytes())
        except (OSError, SyntaxError, ValueError):
            return None

    return tree


def definition(tree: ast.AST, name: str) -> ast.AST | None:
    """Return the node that defines a dotted name; also inside of `if` and `try`, as for a package's optional parts."""
    node: ast.AST | None = tree
    for part in name.split("."):
        node = next((child for child in _statements(node) if _defines(child, part)), None) if node else None
    return node


def all_arguments(function: Function) -> list[ast.arg]:
    """Return every parameter, also `*args` and `**kwargs`."""
    given = function.args
    rest = [argument for argument in (given.vararg, given.kwarg) if argument is not None]
    return [*given.posonlyargs, *given.args, *given.kwonlyargs, *rest]


def assignments(tree: ast.AST, owner: str, attribute: str) -> Iterator[ast.stmt]:
    """Yield the statements by which a class sets an attribute on `self`, in whichever method."""
    node = definition(tree, owner)
    for child in ast.walk(node) if node is not None else ():
        if not isinstance(child, ast.Assign | ast.AnnAssign | ast.AugAssign):
            continue
        for target in child.targets if isinstance(child, ast.Assign) else [child.target]:
            if any(
                isinstance(part, ast.Attribute)
                and part.attr == attribute
                and isinstance(part.value, ast.Name)
                and part.value.id == "self"
                for part in ast.walk(target)
            ):
                yield child


def _set_on_self(tree: ast.AST, name: str) -> ast.AST | None:
    owner, _, attribute = name.rpartition(".")
    return next(assignments(tree, owner, attribute), None) if owner else None


def _expression(tree: ast.AST, source: str) -> ast.AST | None:
    """Return the first piece of code that reads so, whatever its spaces and quotes."""
    wanted = ast.parse(source, mode="eval").body
    same = (node for node in ast.walk(tree) if type(node) is type(wanted))
    return next((node for node in same if ast.dump(node) == ast.dump(wanted)), None)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        yield child
        if isinstance(child, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _statements(child)


def _defines(node: ast.AST, name: str) -> bool:
    if isinstance(node, Function | ast.ClassDef):
        # The signatures of @overload come before the function.
        return node.name == name and not any(ast.unparse(one).endswith("overload") for one in node.decorator_list)
    if isinstance(node, ast.Assign):
        return any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
    if isinstance(node, ast.AnnAssign):
        return isinstance(node.target, ast.Name) and node.target.id == name
    return False
