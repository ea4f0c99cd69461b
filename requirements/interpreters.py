"""Find a Python of one version: `python requirements/interpreters.py 3.12` prints its path.

A stack may want another Python than the one that runs here.  On the PATH a name says little: a shim of pyenv's is there
for each version that it has and runs only the chosen one.  So each is asked, and pyenv's and uv's folders are looked
through as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


def find(version: str) -> Path | None:
    """The first Python of that version (`3.12`) that runs; `None` where there is none."""
    return next((path for path in _candidates(version) if _version_of(path) == version), None)


def lacking(version: str, what: str) -> str:
    """One sentence for `find(version)` that found nothing."""
    return (
        f"{what} needs Python {version}, which is neither on the PATH nor among pyenv's or uv's versions: install it "
        f"(pyenv install {version}, or your system's python{version} and python{version}-venv), then run this again"
    )


def _candidates(version: str) -> Iterator[Path]:
    yield Path(sys.executable)
    for folder in os.get_exec_path():
        yield Path(folder, f"python{version}")
    roots = (
        Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions"),
        Path(os.environ.get("UV_PYTHON_INSTALL_DIR", Path.home() / ".local/share/uv/python")),
    )
    for root in roots:
        yield from sorted(root.glob(f"*{version}.*/bin/python{version}"))


def _version_of(python: Path) -> str | None:
    if not os.access(python, os.X_OK):
        return None
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def main() -> int:
    """Run the command line; the exit status."""
    version = sys.argv[1]
    found = find(version)
    print(found or lacking(version, "this"), file=sys.stdout if found else sys.stderr)
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
