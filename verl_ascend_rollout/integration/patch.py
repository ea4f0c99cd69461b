"""The one way in which functions, classes and registries of verl and vLLM are changed: `Patch`.

A patch is applied right after the import of its module, so nothing is imported that is not used.  It changes nothing
for any other rollout: where a release has drifted and a patch no longer fits, the import goes on, the problem is logged
once, and `ascend_safe` refuses to start (see `assert_intact`).

The patches themselves are in `patches/`, by target.  This module knows none of them.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

from verl_ascend_rollout import PATCHED

logger = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])

WHAT_TO_DO = "use a release that the support matrix lists, or set actor_rollout_ref.rollout.name=vllm"
"""The end of a sentence about a patch that does not fit."""


class DriftError(RuntimeError):
    """A patch that is required does not fit, so `ascend_safe` could be wrong in silence."""


class _MisfitError(Exception):
    """What a patch missed in its module; becomes a part of a problem's sentence."""


@dataclass(frozen=True)
class Patch:
    """One thing in verl or vLLM that is another with us.

    Attributes:
        module, attribute: the function, class or registry that is replaced, by its module and a dotted path in there.
        function: called in its place as `function(original, *args, **kwargs)`.  The second paragraph of its docstring
            is the patch's `reason`, and ends in "Remove when ..."
        parameters: the parameters of the original that are relied on.
        once: `function` is called once instead, with the original, and answers with what takes its place: the original
            itself where it was filled.
        copies: whether it is replaced as well in the modules that took a copy (`from verl.utils.config import ...`).
        required: whether `ascend_safe` refuses to run without it.
        everywhere: whether a release that has not got the attribute is one that has drifted: it is not where the patch
            is about something that came late.
    """

    module: str
    attribute: str
    function: Callable[..., Any]
    parameters: tuple[str, ...] = ()
    once: bool = False
    copies: bool = True
    required: bool = True
    everywhere: bool = True

    @property
    def name(self) -> str:
        """The function, by its module's name and its own."""
        return f"{self.function.__module__.rpartition('.')[2]}.{self.function.__name__}"

    @property
    def reason(self) -> str:
        """What goes wrong without the patch, why, and where that is in the source."""
        return self._header().partition("Remove when")[0].rstrip(" .")

    @property
    def remove_when(self) -> str:
        """What has to be true of a release so that the patch can go."""
        return self._header().partition("Remove when ")[2].rstrip(".")

    def _header(self) -> str:
        paragraphs = [*inspect.cleandoc(self.function.__doc__ or "").split("\n\n"), ""]
        return " ".join(paragraphs[1].split())

    def install(self) -> None:
        """Apply the patch: at once where its module is imported already, else right after the import."""
        import wrapt  # here: `ascend-safe smoke` runs where there is none, and applies its patch itself

        wrapt.register_post_import_hook(self.apply, self.module)

    def apply(self, module: Any) -> None:
        """Change `module`; a second time does nothing.

        Never raises: an exception in an import hook would break the import for users of other rollouts too.  What does
        not fit is logged once and kept in `problems`.
        """
        try:
            self._apply(module)
        except Exception as error:  # whatever a registry that has changed answers
            what = str(error) if isinstance(error, _MisfitError) else f"is another ({type(error).__name__}: {error})"
            root = self.module.partition(".")[0]
            version = getattr(sys.modules.get(root), "__version__", "(version unknown)")
            reason = self.reason[:1].lower() + self.reason[1:]
            problem = f"{root} {version}: {self.module}.{self.attribute} {what}, and {reason}"
            if _drift.get(self) != problem:
                _drift[self] = problem
                logger.log(logging.ERROR if self.required else logging.WARNING, "%s", problem)

    def _apply(self, module: Any) -> None:
        *path, name = self.attribute.split(".")
        if not self.everywhere and self.attribute.partition(".")[0] not in vars(module):
            return
        owner = functools.reduce(_own, path, module)
        original = _own(owner, name)
        done: tuple[str, ...] = getattr(original, PATCHED, ())
        if self.name in done:
            return
        changed = self.function(original) if self.once else self._around(original)
        if changed is not original:
            setattr(changed, PATCHED, (*done, self.name))
            setattr(owner, name, changed)
            if self.copies and owner is module:
                _replace_copies(original, changed)

    def _around(self, original: Callable[..., Any]) -> Callable[..., Any]:
        function, known = self.function, inspect.signature(original).parameters
        missing = [name for name in self.parameters if name not in known]
        if missing:
            raise _MisfitError(f"has no parameter {' or '.join(missing)}")

        @functools.wraps(original)
        def patched(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

        @functools.wraps(original)
        async def patched_coroutine(*args: Any, **kwargs: Any) -> Any:
            return await function(original, *args, **kwargs)

        # Ray awaits no method that is not a coroutine function itself.
        return patched_coroutine if inspect.iscoroutinefunction(original) else patched


def patch_of(patches: list[Patch], target: str, *parameters: str, **flags: bool) -> Callable[[Function], Function]:
    """Add a function's `Patch`, of `module:attribute`, to a list; a decorator, which leaves the function as it is."""

    def add(function: Function) -> Function:
        module, _, attribute = target.partition(":")
        patches.append(Patch(module, attribute, function, parameters, **flags))
        return function

    return add


_drift: dict[Patch, str] = {}
"""A sentence about each patch that did not fit."""


def problems() -> tuple[str, ...]:
    """Return a sentence for each required patch that did not fit the modules imported so far."""
    return tuple(problem for patch, problem in _drift.items() if patch.required)


def assert_intact() -> None:
    """Refuse to go on as `ascend_safe` where a required patch did not fit.

    Raises:
        DriftError: with every problem, and what to do.
    """
    if problems():
        raise DriftError(f"{'; '.join(problems())}: {WHAT_TO_DO}")


def _own(owner: Any, name: str) -> Any:
    # vars(): an attribute that is only inherited (object.__init__) is not the one that is meant.
    found = getattr(owner, name, None) if hasattr(owner, "__ray_actor_class__") else vars(owner).get(name)
    if found is None:
        raise _MisfitError("is gone")
    # `ray.remote` puts another object in a class's place, and keeps a subclass of it (ray 2.60, actor.py).
    remote = getattr(found, "__ray_metadata__", None)
    return found if remote is None else remote.modified_class


def _replace_copies(original: Any, changed: Any) -> None:
    """Replace the original in each module that has it by now, under whatever name.

    `import verl` itself imports verl.utils.config, before it loads its plug-ins (verl 0.9.1, __init__.py:36 and :55).
    verl.utils keeps a copy of validate_config, and so does verl's entry point, which is run as a script.
    """
    # Ordinary modules only: one of another type may import what it stands for when it is looked into.
    for module in [module for module in list(sys.modules.values()) if type(module) is ModuleType]:
        for name in [name for name, value in list(vars(module).items()) if value is original]:
            setattr(module, name, changed)
