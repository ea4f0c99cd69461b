"""What is changed in verl and vLLM, by target.  Nothing in `integration` imports it: `plugin` does.

Each module has the functions that a `Patch` puts in the place of verl's.  The first line of such a function's docstring
says what it does; the second paragraph what goes wrong without it, why, where that is in the source (of verl 0.9.1,
relative to the package, where nothing else is said), and when it can go.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable

from verl_ascend_rollout import ROLLOUT_NAME
from verl_ascend_rollout.integration.contract import CONTRACT, ENTRY_POINTS, Generation
from verl_ascend_rollout.integration.patch import Patch

OF_VERL = ("rollouts", "names", "metrics", "platforms", "experts", "death", "routing", "devices")
"""The modules with patches of verl, in the order in which they are installed."""

MODULES = (*OF_VERL, "vllm")
"""All modules of patches; `plugin` installs vLLM's in vLLM's own processes."""


def patches_of(modules: Iterable[str] = MODULES, lists: Iterable[str] = ("PATCHES", "CPU_PATCHES")) -> list[Patch]:
    """Import the modules named, and return the patches in their lists: for every platform, and for a CPU only."""
    found = [importlib.import_module(f"{__name__}.{name}") for name in modules]
    return [patch for module in found for name in lists for patch in getattr(module, name, ())]


def install(generation: Generation = "gate") -> tuple[str, ...]:
    """Arrange for every patch of verl that this process needs.  Idempotent; imports neither verl nor what verl imports.

    Args:
        generation: of the verl that is installed: one without entry points has no platforms either.

    Returns:
        What that makes known to verl, one phrase each.
    """
    from verl_ascend_rollout.integration import cpu_platform
    from verl_ascend_rollout.integration.patches import vllm

    others = {(row.module, row.name) for row in CONTRACT if row.generations and generation not in row.generations}
    every = patches_of(OF_VERL, ["PATCHES"])
    patches = [patch for patch in every if (patch.module, patch.attribute) not in others]
    patches.append(vllm.NAME_FUNCTIONS_OF_TRITON)
    has_platforms = generation in ENTRY_POINTS
    if cpu_platform.is_chosen():
        patches += patches_of(["platforms"] if has_platforms else ["platforms", "devices"], ["CPU_PATCHES"])
        # verl's FSDP engine is registered for the devices cuda and npu; it runs on a CPU as it is.  This variable is
        # verl's own way to say which one to take (verl 0.9.1, workers/engine/base.py:402).
        os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")
    for patch in patches:
        patch.install()
    known = "platforms cpu, npu (huawei), cuda (nvidia)" if has_platforms else "the device cpu, where it is asked for"
    return f"rollout {ROLLOUT_NAME}", known
