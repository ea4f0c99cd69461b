"""Reading the source of a package that is not imported: where a class, a method, a parameter or an attribute is.

The source is that of an installed package, or of a wheel that was never installed (see `wheels`).  A file is given by
its path below site-packages, `vllm/v1/worker/gpu_worker.py`, and that is also how evidence names it.
"""

from __future__ import annotations

import ast
import functools
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from verl_ascend_rollout.integration.probe import definition, locate
from verl_ascend_rollout.tools.report import Evidence

OURS = "verl_ascend_rollout"


class Sources:
    """The source of some top-level packages, each in a folder or in a wheel; a file is parsed once."""

    def __init__(self, packages: Mapping[str, Path | zipfile.Path]) -> None:
        """Take the folder of each package, by its name."""
        self._packages = packages
        self._trees: dict[str, ast.Module | None] = {}

    def has(self, package: str) -> bool:
        """Whether the top-level package is there."""
        return package in self._packages

    def read(self, file: str) -> str | None:
        """Return the text of a file; `None` where there is none."""
        package, _, rest = file.partition("/")
        try:
            return self._packages[package].joinpath(rest).read_text(encoding="utf-8")
        except (KeyError, OSError, zipfile.BadZipFile, UnicodeDecodeError):
            return None

    def tree(self, file: str) -> ast.Module | None:
        """Return the file parsed; `None` where there is none, or it is no Python of this version."""
        if file not in self._trees:
            text = self.read(file)
            try:
                self._trees[file] = ast.parse(text) if text is not None else None
            except (SyntaxError, ValueError):
                self._trees[file] = None
        return self._trees[file]


def text_of(file: Path) -> str:
    """Return the text of a file of the system; nothing where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


@dataclass(frozen=True)
class Defines:
    """A class, function, method, constant or attribute (also one that a method sets on `self`), by its dotted path."""

    file: str  # below site-packages; the module may have become a package
    name: str  # `Worker.sleep`
    parameters: tuple[str, ...] = ()  # what the function must take
    expression: bool = False  # the name is no definition, but a piece of code that the file has
    value: str = ""  # source of the value that it starts with

    def __str__(self) -> str:
        return f"{self.name}({', '.join(self.parameters)})" if self.parameters else self.name

    def find(self, sources: Sources) -> Evidence | None:
        """Return the line that defines it; `None` where there is none, or a parameter is missing."""
        for file in (self.file, f"{self.file.removesuffix('.py')}/__init__.py"):
            tree = sources.tree(file)
            node = locate(tree, self.name, self.parameters, self.expression) if tree else None
            value = ast.unparse(node.value) if isinstance(node, ast.AnnAssign) and node.value else ""
            if node is not None and self.value in ("", value):
                verb = "has" if self.expression else "defines"
                return Evidence(
                    f"{file}:{getattr(node, 'lineno', 0)}", f"{verb} {self}{f' = {value}' if value else ''}"
                )
        return None


@dataclass(frozen=True)
class Uses:
    """A name that is used: read, called, compared with, imported, given as a keyword, or the whole of a string."""

    file: str  # below site-packages
    name: str  # what is used
    within: str = ""  # dotted path of the function or class in which it is looked for; empty: the whole file
    part_of_text: bool = False  # look in strings only, where a part of one is enough

    def __str__(self) -> str:
        return self.name

    def find(self, sources: Sources) -> Evidence | None:
        """Return the first line that uses it."""
        tree = sources.tree(self.file)
        node: ast.AST | None = definition(tree, self.within) if tree and self.within else tree
        lines = [line for line, text, quoted in _words(node) if self._is(text, quoted)] if node else []
        place = f" in {self.within}" if self.within else ""
        return Evidence(f"{self.file}:{min(lines)}", f"{self.name!r} is used{place}") if lines else None

    def _is(self, text: str, quoted: bool) -> bool:
        return (quoted and self.name in text) if self.part_of_text else text == self.name


Place = Defines | Uses


def first(places: Iterable[Place], sources: Sources) -> Evidence | None:
    """Return the evidence of the first place that is there; a place of ours is looked for in this package."""
    looked = ((our_source() if place.file.startswith(f"{OURS}/") else sources, place) for place in places)
    return next((found for source, place in looked if (found := place.find(source)) is not None), None)


@functools.cache
def our_source() -> Sources:
    """Our own source, for evidence about what we do."""
    return Sources({OURS: Path(__file__).resolve().parents[2]})


def _words(node: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """Line, word and whether it stands in a string, for everything that is named in the node."""
    for child in ast.walk(node):
        match child:
            case ast.Name(id=word) | ast.alias(name=word) | ast.arg(arg=word):
                yield child.lineno, word, False
            case ast.FunctionDef(name=word) | ast.AsyncFunctionDef(name=word) | ast.ClassDef(name=word):
                yield child.lineno, word, False
            case ast.Attribute(attr=word):
                # The line of the attribute itself, which may be far below that of the expression.
                yield child.end_lineno or child.lineno, word, False
            case ast.keyword(arg=str(word), value=value):
                yield value.lineno, word, False
            case ast.Constant(value=str(word)):
                yield child.lineno, word, True
