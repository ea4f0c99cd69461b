"""What is changed in verl and vLLM, by target.  Nothing in `integration` imports it: `plugin` does.

Each module has the functions that a `Patch` puts in the place of verl's.  The first line of such a function's docstring
says what it does; the second paragraph what goes wrong without it, why, where that is in the source (of verl 0.9.1,
relative to the package, where nothing else is said), and when it can go.
"""

from __future__ import annotations

import os

from verl_ascend_rollout import ROLLOUT_NAME
from verl_ascend_rollout.integration.contract import CONTRACT, ENTRY_POINTS, Generation


def install(generation: Generation = "gate") -> tuple[str, ...]:
    """Arrange for every patch of verl that this process needs.  Idempotent; imports neither verl nor what verl imports.

    Args:
        generation: of the verl that is installed: one without entry points has no platforms either.

    Returns:
        What that makes known to verl, one phrase each.
    """
    from verl_ascend_rollout.integration import cpu_platform
    from verl_ascend_rollout.integration.patches import (
        death,
        devices,
        experts,
        metrics,
        names,
        platforms,
        rollouts,
        routing,
        vllm,
    )

    others = {(row.module, row.name) for row in CONTRACT if row.generations and generation not in row.generations}
    modules = (rollouts, names, metrics, platforms, experts, death, routing)
    patches = [patch for module in modules for patch in module.PATCHES if (patch.module, patch.attribute) not in others]
    patches.append(vllm.NAME_FUNCTIONS_OF_TRITON)
    has_platforms = generation in ENTRY_POINTS
    if cpu_platform.is_chosen():
        patches += platforms.CPU_PATCHES
        if not has_platforms:
            patches += devices.CPU_PATCHES
        # verl's FSDP engine is registered for the devices cuda and npu; it runs on a CPU as it is.  This variable is
        # verl's own way to say which one to take (verl 0.9.1, workers/engine/base.py:402).
        os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")
    for patch in patches:
        patch.install()
    known = "platforms cpu, npu (huawei), cuda (nvidia)" if has_platforms else "the device cpu, where it is asked for"
    return f"rollout {ROLLOUT_NAME}", known
