"""`smoke.pyz`: this package in one file, to hand to a colleague whose machine has vLLM and nothing of ours."""

from __future__ import annotations

import importlib.resources
import zipapp
import zipfile
from importlib.abc import Traversable
from pathlib import Path

import verl_ascend_rollout

MAIN = "import sys\nfrom verl_ascend_rollout.tools.smoke.__main__ import main\n\nsys.exit(main())\n"
PACKAGE = "verl_ascend_rollout"
TIME = (1980, 1, 1, 0, 0, 0)
"""Of every file in it: the same package gives the same bytes."""


def write(path: Path) -> int:
    """Write the archive, and answer its size in bytes.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            _add(archive, "__main__.py", MAIN.encode())
            _walk(archive, importlib.resources.files(verl_ascend_rollout), PACKAGE)
    path.chmod(0o755)
    if zipapp.get_interpreter(path) is None:
        raise OSError(0, "it came out as no archive that Python runs")
    return path.stat().st_size


def _walk(archive: zipfile.ZipFile, folder: Traversable, name: str) -> None:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            if entry.name != "__pycache__":
                _walk(archive, entry, f"{name}/{entry.name}")
        elif entry.name.endswith((".py", ".yaml", ".typed")):
            _add(archive, f"{name}/{entry.name}", entry.read_bytes())


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name, TIME), data, zipfile.ZIP_DEFLATED)
