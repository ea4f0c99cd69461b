"""The stacks of stacks.toml: list them, compile their locks, make their environments.

    python requirements/stacks.py list
    python requirements/stacks.py lock NAME
    python requirements/stacks.py setup NAME
    python requirements/stacks.py python NAME
    python requirements/stacks.py emulator NAME

`lock` and `setup` run with a Python that has uv, take pip's settings, and `setup` installs into its environment.
`python` prints the path of the Python that the stack wants, `emulator` the emulator's stack that goes with it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import interpreters
from pip_settings import settings

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    # pytest brings the same, and so does pip, whose import turns setuptools' distutils off.
    tomllib = importlib.import_module("tomli" if importlib.util.find_spec("tomli") else "pip._vendor.tomli")

HERE = Path(__file__).resolve().parent
DEMO = ("matplotlib>=3.8",)
"""What the demo needs beside verl and vLLM."""


def main() -> int:
    """Run the command line; the exit status."""
    table = tomllib.loads((HERE / "stacks.toml").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("list", "lock", "setup", "python", "emulator"))
    parser.add_argument("name", nargs="?", metavar="NAME", default=table["default"])
    asked = parser.parse_args()
    stacks: dict[str, dict[str, Any]] = table["stack"]
    if asked.what == "list":
        for name, stack in stacks.items():
            print(f"{name:<22}{' '.join(stack['requires'])}\n{'':<22}{stack['image']}")
        return 0
    stack = stacks.get(asked.name)
    if stack is None:
        parser.error(f"there is no stack {asked.name}: {', '.join(stacks)}")
    if asked.what == "emulator":
        if "emulator" not in stack:
            parser.error(f"the stack {asked.name} has no NPU emulator: no wheel of vllm-ascend goes with it")
        print(stack["emulator"])
        return 0
    version = stack.get("python", table["python"])
    if asked.what == "python":
        found = interpreters.find(version)
        if found is None:
            print(interpreters.lacking(version, f"stacks.py: the stack {asked.name}"), file=sys.stderr)
            return 1
        print(found)
        return 0
    lock = HERE / "stacks" / f"{asked.name}.txt"
    overrides = [*stack["overrides"], *(f'{name} ; sys_platform == "never"' for name in table["without"])]
    with tempfile.TemporaryDirectory() as folder:
        against = Path(folder, "overrides.txt")
        against.write_text("\n".join(overrides), encoding="utf-8")
        if asked.what == "lock":
            wanted = Path(folder, "requirements.in")
            wanted.write_text("\n".join([*stack["requires"], *DEMO]), encoding="utf-8")
            return _uv(
                *("pip", "compile", "--quiet", "--no-emit-index-url", "--no-emit-find-links", "--no-annotate"),
                *("--custom-compile-command", f"make lock STACK={asked.name}", "--python-version", version),
                *("--override", str(against), str(wanted), "-o", str(lock)),
            )
        install = ("pip", "install", "--quiet", "--python", sys.executable)
        failed = _uv(*install, "--compile-bytecode", "--override", str(against), "-r", str(lock))
        failed = failed or _uv(*install, "--no-deps", "--editable", str(HERE.parent))
        if not failed and "known_as" in stack:
            _name(*stack["known_as"].split("=="))
        return failed


def _name(name: str, version: str) -> None:
    """Give the environment metadata of this name, for a package that is installed under another one."""
    folder = Path(sysconfig.get_path("purelib"), f"{name}-{version}.dist-info")
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{file},,\n" for file in ("METADATA", "RECORD")))


def _uv(*arguments: str) -> int:
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    environment = {**os.environ, **settings(listing.stdout)}
    return subprocess.run([sys.executable, "-m", "uv", *arguments], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
