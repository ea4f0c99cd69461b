"""What a process that the import fix has reached runs before anything else; see `verl_ascend_rollout.import_fix`.

Python imports a module of this name when it starts (docs.python.org, module `site`), and this folder, which has nothing
else in it, goes first in PYTHONPATH where the fix is applied.  Where the environment has a module of the same name,
that one is run after this one, in its place.  Nothing is imported that Python has not imported by then, unless it is
needed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec, PathFinder

VARIABLE = "ASCEND_SAFE_IMPORT_FIRST"
"""What to put first, as JSON: `prefix` (the environment for which it holds), `packages`, `distributions`."""

FOLDER = os.path.dirname(os.path.abspath(__file__))


class RealPackages:
    """A finder that knows where a few packages really are; goes first in `sys.meta_path`.

    Attributes:
        packages: package folder by name.
        distributions: the folder that holds a distribution's metadata, by the distribution's name.
    """

    ascend_safe = True

    def __init__(self, packages: dict[str, str], distributions: dict[str, str]) -> None:
        self.packages = packages
        self.distributions = distributions

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Find the real package; leave everything else, and a package that has gone since, to the other finders."""
        folder = self.packages.get(name)
        if folder is None:
            return None
        file = os.path.join(folder, "__init__.py")
        if not os.path.isfile(file):
            return None
        from importlib.util import spec_from_file_location

        return spec_from_file_location(name, file, submodule_search_locations=[folder])

    def find_distributions(self, context: object = None) -> Iterable[object]:
        """Find the metadata that goes with the real package, unless a caller looks in folders of its own choice.

        A checkout that was once installed still has a *.egg-info beside the package, with another version in it.
        """
        name = getattr(context, "name", None)
        place = self.distributions.get(name.lower().replace("_", "-")) if isinstance(name, str) else None
        if place is None or "path" in vars(context):
            return ()
        from importlib.metadata import DistributionFinder, MetadataPathFinder

        return MetadataPathFinder.find_distributions(DistributionFinder.Context(name=name, path=[place]))


def install(packages: dict[str, str], distributions: dict[str, str]) -> RealPackages:
    """Put these first in this process, beside what has been put first already."""
    finder = installed() or RealPackages({}, {})
    finder.packages.update(packages)
    finder.distributions.update(distributions)
    if finder not in sys.meta_path:
        sys.meta_path.insert(0, finder)
    return finder


def installed() -> RealPackages | None:
    """Return the finder of this process, if it has one."""
    # Not isinstance: where Python has run this file as `sitecustomize`, the class is that module's.
    return next((finder for finder in sys.meta_path if getattr(finder, "ascend_safe", False)), None)  # type: ignore[return-value]


def _start() -> None:
    told = os.environ.get(VARIABLE)
    if not told:
        return
    import json

    try:
        table = json.loads(told)
        # Another environment's Python has packages of its own.
        if table["prefix"] == sys.prefix:
            install(dict(table["packages"]), dict(table["distributions"]))
    except (ValueError, KeyError, TypeError) as error:
        print(f"ascend_safe: {VARIABLE} cannot be read ({error!r}): nothing is put first here", file=sys.stderr)


def _run_the_next() -> None:
    """Run the `sitecustomize` that the environment would have run without us."""
    places = [place for place in sys.path if os.path.abspath(place or ".") != FOLDER]
    spec = PathFinder.find_spec("sitecustomize", places)
    if spec is None or spec.loader is None:
        return
    from importlib.util import module_from_spec

    module = sys.modules["sitecustomize"] = module_from_spec(spec)
    spec.loader.exec_module(module)


if __name__ == "sitecustomize":
    _start()
    _run_the_next()
