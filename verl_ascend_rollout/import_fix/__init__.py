"""The import fix: where a folder hides the real vLLM, the processes of a rollout import the real one, and say so.

Two things hide it.  A folder named `vllm` without `__init__.py`, in the working directory or on the path, is to Python
a namespace package; it goes before an editable install, whose finder is asked after the path, and every import ends in
"cannot import name ... from 'vllm' (unknown location)".  And a folder `vllm` with `__init__.py`, in the working
directory or beside the script that runs, goes before anything installed: a checkout, say, without its compiled parts.

What is done is no more than that.  A finder for these names alone goes to the front of `sys.meta_path`, so that no
other name is found anywhere else than before.  An entry of `sys.path` would be wrong twice: the folder of an installed
package is all of site-packages, and even in front it would not help `python -m`, which vLLM starts to look at a model's
class (vllm 0.28, model_executor/models/registry.py:763) and which looks in the working directory first of all.
Processes that are started from here get the finder by a `sitecustomize` (`start_up/`) in PYTHONPATH, as tracing tools
do it; a Python that ignores the environment or `site` (-I, -E, -S), and the other nodes of a cluster, do not.  There
our plug-in applies the fix again in each process that imports verl.

What somebody has chosen is left alone: a regular package in a folder that PYTHONPATH names goes first with us too, and
a regular `verl` beside the job is how verl is run from its checkout.  `ASCEND_SAFE_IMPORT_FIX=0` turns all of it off.

`python -m verl_ascend_rollout.import_fix` prints, for a shell to evaluate, what a command that is started next needs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from verl_ascend_rollout.import_fix.start_up import sitecustomize as start_up
from verl_ascend_rollout.platforms.installed import PACKAGES, Found, Search, home_of, pth_entries, same

# By name: this module is also run by itself.
logger = logging.getLogger("verl_ascend_rollout.import_fix")

SWITCH = "ASCEND_SAFE_IMPORT_FIX"

MENDED = ("vllm", "vllm_ascend", "verl")
MENDED_WHERE_REGULAR = ("vllm", "vllm_ascend")


class ImportFixError(RuntimeError):
    """Another package of that name was imported before the real one could be put first.  One sentence."""


@dataclass(frozen=True)
class Fix:
    """One package that is hidden.

    Attributes:
        package: its name.
        hidden_by: the folder that is taken for it.
        regular: that folder has an `__init__.py`.
        real: the folder of the real one.
        distribution: the name of its distribution, and the folder that holds the metadata; `None` where it has none.
    """

    package: str
    hidden_by: Path
    regular: bool
    real: Path
    distribution: tuple[str, Path] | None

    def sentence(self) -> str:
        """Return what hides it, and what is imported instead."""
        what = "another package of that name" if self.regular else "a folder without __init__.py"
        return f"{self.hidden_by} ({what}) hides {self.package}: {self.real} goes first"


def plan(search: Search) -> tuple[Fix, ...]:
    """Find what is hidden here and can be put first; change nothing.

    Returns:
        Nothing where every package is found as it should be, and nothing for one that is not there at all: the doctor
        has sentences for that.
    """
    return tuple(fix for package in MENDED for fix in [_plan_for(search, package)] if fix is not None)


def apply(search: Search | None = None, *, strict: bool = False) -> tuple[Fix, ...]:
    """Put first what is hidden, in this process and in those that it starts; a second call does nothing more.

    Args:
        search: where to look; this process's search path by default.
        strict: raise where it is too late, instead of a warning.

    Returns:
        What is put first: nothing where nothing is hidden, where it is switched off, or where it is too late.

    Raises:
        ImportFixError: only with `strict`.
    """
    if switched_off():
        return ()
    try:
        fixes = plan(search or Search.of_this_process())
    except OSError:  # the working directory is gone, or a folder cannot be read: then no job hides in it
        return ()
    if not fixes:
        return ()
    first = start_up.installed()
    new = [fix for fix in fixes if first is None or first.packages.get(fix.package) != str(fix.real)]
    late = [sentence for fix in new for sentence in [_too_late(fix)] if sentence is not None]
    if late:
        sentence = "; ".join(late)
        if strict:
            raise ImportFixError(sentence)
        logger.warning("import fix: %s", sentence)
        return ()
    for fix in new:
        _forget(fix.package)
    finder = start_up.install(
        {fix.package: str(fix.real) for fix in new},
        {fix.distribution[0]: str(fix.distribution[1]) for fix in new if fix.distribution is not None},
    )
    importlib.invalidate_caches()
    os.environ.update(_for_children(finder, os.environ.get("PYTHONPATH", "")))
    for fix in new:
        logger.warning(
            "import fix: %s, here and in the processes that are started from here; %s=0 leaves it as it is",
            fix.sentence(),
            SWITCH,
        )
    return fixes


def switched_off() -> bool:
    """Return whether the environment says that nothing is to be put first."""
    return os.environ.get(SWITCH, "1").strip().lower() in ("0", "false", "no", "off")


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add `--no-import-fix` to a command; `begin` reads it."""
    parser.add_argument(
        "--no-import-fix",
        action="store_true",
        help="where a folder hides the real vLLM, leave it so; by default the real one is put first, and that is said",
    )


def begin(arguments: argparse.Namespace) -> tuple[Fix, ...]:
    """Apply the fix at the start of a command, before vLLM is imported, unless `--no-import-fix` was given.

    Raises:
        ImportFixError: it is too late.
    """
    if arguments.no_import_fix:
        os.environ[SWITCH] = "0"
    return apply(strict=True)


def _plan_for(search: Search, package: str) -> Fix | None:
    for start in search.starts or (None,):
        found = search.by_path(package, start)
        # A finder has it, or nothing has.
        if found is None:
            continue
        if found.regular and not (package in MENDED_WHERE_REGULAR and _is_by_chance(search, found)):
            continue
        real, distribution = _real(search, package)
        if real is not None and not same(real, found.folder):
            return Fix(package, found.folder, found.regular, real, distribution)
    return None


def _is_by_chance(search: Search, found: Found) -> bool:
    """Return whether a package is found only because of where the job was started."""
    entry = found.entry
    if entry is None or any(same(entry, place) for place in search.chosen):
        return False
    return any(same(entry, start) for start in search.starts)


def _real(search: Search, package: str) -> tuple[Path | None, tuple[str, Path] | None]:
    """Return the folder of the package that is meant to be imported, and where its metadata is."""
    for place in search.chosen:
        if (place / package / "__init__.py").is_file():
            return place / package, None
    paths = [str(path) for path in search.paths]
    known: tuple[str, Path] | None = None
    for name in PACKAGES[package]:
        for distribution in metadata.Distribution.discover(name=name, path=paths):
            place = home_of(distribution).parent
            # What a checkout beside the job says of itself is not what is installed.
            if any(same(place, start) for start in search.starts):
                continue
            known = known or (name, place)
            if (place / package / "__init__.py").is_file():
                return place / package, (name, place)
    editable = search.editable(package)
    if editable is not None:
        return editable.folder, known
    for _, place, _ in pth_entries(search.paths):
        if (place / package / "__init__.py").is_file():
            return place / package, known
    return None, None


def _too_late(fix: Fix) -> str | None:
    """Return why the package cannot be put first any more in this process, or `None`."""
    module = sys.modules.get(fix.package)
    file = getattr(module, "__file__", None)
    if file is not None:
        if same(Path(file).parent, fix.real):
            return None
        taken = str(Path(file).parent)
    else:
        # An empty package can be forgotten; code that was found in it cannot.
        inside = [
            name
            for name, loaded in list(sys.modules.items())
            if name.startswith(f"{fix.package}.") and getattr(loaded, "__file__", None) is not None
        ]
        if not inside:
            return None
        taken = f"{fix.hidden_by}, of which {inside[0]} is in use"
    return (
        f"{fix.package} was imported from {taken} before {fix.real} could be put first, and is left as it is in this "
        f"process: start the job from another folder, or import verl_ascend_rollout.import_fix and call apply() before "
        f"the first import of {fix.package}; {SWITCH}=0 says that it is meant so"
    )


def _forget(package: str) -> None:
    """Take an empty package out of the imported ones; one that somebody made, without a path, stays."""
    module = sys.modules.get(package)
    if module is None or getattr(module, "__file__", None) is not None or not hasattr(module, "__path__"):
        return
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]


def _for_children(finder: start_up.RealPackages, python_path: str) -> dict[str, str]:
    """Return the environment variables that let a process started from here do the same before it imports anything."""
    table = {"prefix": sys.prefix, "packages": finder.packages, "distributions": finder.distributions}
    if start_up.FOLDER not in python_path.split(os.pathsep):
        # Nothing but the folder where PYTHONPATH is empty: an empty entry would mean the working directory.
        python_path = os.pathsep.join([start_up.FOLDER, *([python_path] if python_path else [])])
    return {start_up.VARIABLE: json.dumps(table), "PYTHONPATH": python_path}


def main(argv: Sequence[str] | None = None) -> int:
    """Print `export` lines for what a shell starts next; nothing where nothing is hidden.

    Returns:
        The exit status: 0.
    """
    parser = argparse.ArgumentParser(
        prog="python -m verl_ascend_rollout.import_fix",
        description="Print shell commands that let the Python programs started next import the real vLLM where a "
        "folder hides it, and say what hides it on standard error.",
    )
    add_option(parser)
    if begin(parser.parse_args(argv)):
        for name in (start_up.VARIABLE, "PYTHONPATH"):
            print(f"export {name}={shlex.quote(os.environ[name])}")
    return 0
