"""Reading the source of a package that is not imported: where a class, a method, a parameter or an attribute is.

The source is that of an installed package (`Folders`), or of a wheel that was never installed (see `wheels`).  A file
is given by its path below site-packages, `vllm/v1/worker/gpu_worker.py`, and that is also how evidence names it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from verl_ascend_rollout.report import Evidence

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Sources(Protocol):
    """Where files are read from."""

    def has(self, package: str) -> bool:
        """Whether the top-level package is there."""

    def read(self, file: str) -> str | None:
        """The text of a file; `None` where there is none."""

    def tree(self, file: str) -> ast.Module | None:
        """The file parsed; `None` where there is none, or it is no Python of this version."""


class Parsed:
    """Parses each file once."""

    def __init__(self) -> None:
        self._trees: dict[str, ast.Module | None] = {}

    def read(self, file: str) -> str | None:
        """The text of a file; `None` where there is none."""
        raise NotImplementedError

    def tree(self, file: str) -> ast.Module | None:
        """The file parsed; `None` where there is none, or it is no Python of this version."""
        if file not in self._trees:
            text = self.read(file)
            try:
                self._trees[file] = ast.parse(text) if text is not None else None
            except (SyntaxError, ValueError):
                self._trees[file] = None
        return self._trees[file]


class Folders(Parsed):
    """The source of installed packages."""

    def __init__(self, packages: Mapping[str, Path]) -> None:
        """Take the folder of each top-level package, by its name."""
        super().__init__()
        self._packages = packages

    def has(self, package: str) -> bool:
        """Whether the top-level package is there."""
        return package in self._packages

    def read(self, file: str) -> str | None:
        """The text of a file; `None` where there is none."""
        package, _, rest = file.partition("/")
        folder = self._packages.get(package)
        if folder is None:
            return None
        try:
            return (folder / rest).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None


@dataclass(frozen=True)
class Defines:
    """A class, function, method, constant or class attribute, by its dotted path in a file.

    Attributes:
        file: below site-packages.
        name: `Worker.sleep`.
        parameters: what the function must take.
    """

    file: str
    name: str
    parameters: tuple[str, ...] = ()

    def find(self, sources: Sources) -> Evidence | None:
        """The line that defines it; `None` where there is none, or a parameter is missing."""
        tree = sources.tree(self.file)
        node = definition(tree, self.name) if tree else None
        if node is None:
            return None
        if self.parameters:
            if not isinstance(node, Function):
                return None
            has = {argument.arg for argument in all_arguments(node)}
            if not set(self.parameters) <= has:
                return None
        shown = f"{self.name}({', '.join(self.parameters)})" if self.parameters else self.name
        return Evidence(f"{self.file}:{line_of(node)}", f"defines {shown}")


@dataclass(frozen=True)
class Assigns:
    """An attribute that a class sets on `self`, in whichever method."""

    file: str
    owner: str
    attribute: str

    def find(self, sources: Sources) -> Evidence | None:
        """The first line that sets it."""
        tree = sources.tree(self.file)
        node = definition(tree, self.owner) if tree else None
        if node is None:
            return None
        for child in ast.walk(node):
            if not isinstance(child, ast.Assign | ast.AnnAssign | ast.AugAssign):
                continue
            for target in child.targets if isinstance(child, ast.Assign) else [child.target]:
                for part in ast.walk(target):
                    if isinstance(part, ast.Attribute) and part.attr == self.attribute and is_self(part.value):
                        return Evidence(f"{self.file}:{child.lineno}", f"{self.owner} sets self.{self.attribute}")
        return None


@dataclass(frozen=True)
class Uses:
    """A name that is used: read, called, compared with, imported, given as a keyword, or the whole of a string.

    Attributes:
        file: below site-packages.
        word: the name; with `part_of_text`, a part of a string is enough.
        within: dotted path of the function or class in which it is looked for; empty looks in the whole file.
        part_of_text: look in strings only.
    """

    file: str
    word: str
    within: str = ""
    part_of_text: bool = False

    def find(self, sources: Sources) -> Evidence | None:
        """The first line that uses it."""
        tree = sources.tree(self.file)
        node: ast.AST | None = definition(tree, self.within) if tree and self.within else tree
        if node is None:
            return None
        lines = sorted(line for line, word in words(node) if self._is(word))
        if not lines:
            return None
        place = f" in {self.within}" if self.within else ""
        return Evidence(f"{self.file}:{lines[0]}", f"{self.word!r} is used{place}")

    def _is(self, word: tuple[str, bool]) -> bool:
        text, is_string = word
        return (is_string and self.word in text) if self.part_of_text else text == self.word


@dataclass(frozen=True)
class Says:
    """A line of a file that has a piece of text in it, for what is no name: `assert len(runner_kv_caches)`."""

    file: str
    text: str

    def find(self, sources: Sources) -> Evidence | None:
        """The first such line."""
        for number, line in enumerate((sources.read(self.file) or "").splitlines(), 1):
            if self.text in line:
                return Evidence(f"{self.file}:{number}", line.strip())
        return None


Place = Defines | Assigns | Uses | Says


def first(places: tuple[Place, ...], sources: Sources) -> Evidence | None:
    """The evidence of the first place that is there."""
    for place in places:
        found = place.find(sources)
        if found is not None:
            return found
    return None


OURS = "verl_ascend_rollout"


def our_source() -> Folders:
    """Our own source, for evidence about what we do."""
    return Folders({OURS: Path(__file__).resolve().parents[2]})


def default_of(sources: Sources, file: str, name: str) -> tuple[int, str] | None:
    """Line and source text of the value that a constant or a class attribute starts with."""
    tree = sources.tree(file)
    node = definition(tree, name) if tree else None
    if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
        return node.lineno, ast.unparse(node.value)
    return None


def dictionary_value(sources: Sources, file: str, key: str) -> tuple[int, ast.expr] | None:
    """Line and value of the first entry with this key in a literal dictionary of the file."""
    tree = sources.tree(file)
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Dict):
            for name, value in zip(node.keys, node.values, strict=True):
                if isinstance(name, ast.Constant) and name.value == key:
                    return name.lineno, value
    return None


def line_with(sources: Sources, file: str, text: str) -> int | None:
    """The first line of a text file (YAML) that starts with `text` after its indentation."""
    content = sources.read(file)
    for number, line in enumerate((content or "").splitlines(), 1):
        if line.strip().startswith(text):
            return number
    return None


def definition(tree: ast.AST, name: str) -> ast.AST | None:
    """The node that defines a dotted name; also inside of `if` and `try`, as packages do for their optional parts."""
    node: ast.AST | None = tree
    for part in name.split("."):
        node = next((child for child in _statements(node) if _defines(child, part)), None) if node else None
    return node


def words(node: ast.AST) -> Iterator[tuple[int, tuple[str, bool]]]:
    """Line, word and whether it stands in a string, for everything that is named in the node."""
    for child in ast.walk(node):
        if isinstance(child, ast.Name):
            yield child.lineno, (child.id, False)
        elif isinstance(child, ast.Attribute):
            # The line of the attribute itself, which may be far below that of the expression.
            yield child.end_lineno or child.lineno, (child.attr, False)
        elif isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child.lineno, (child.value, True)
        elif isinstance(child, ast.keyword) and child.arg:
            yield child.value.lineno, (child.arg, False)
        elif isinstance(child, ast.alias):
            yield child.lineno, (child.name, False)
        elif isinstance(child, ast.arg):
            yield child.lineno, (child.arg, False)
        elif isinstance(child, Function | ast.ClassDef):
            yield child.lineno, (child.name, False)


def all_arguments(function: Function) -> list[ast.arg]:
    """Every parameter, also `*args` and `**kwargs`."""
    given = function.args
    rest = [argument for argument in (given.vararg, given.kwarg) if argument is not None]
    return [*given.posonlyargs, *given.args, *given.kwonlyargs, *rest]


def is_self(node: ast.expr) -> bool:
    """Whether the expression is the word `self`."""
    return isinstance(node, ast.Name) and node.id == "self"


def line_of(node: ast.AST) -> int:
    """The node's line; that of `def`, not of a decorator."""
    return int(getattr(node, "lineno", 0))


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
