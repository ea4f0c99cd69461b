"""verl's stream of weights from the trainer, in which merged experts can stay merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from verl_ascend_rollout.integration.patch import Patch, patch_of

PATCHES: list[Patch] = []


@patch_of(PATCHES, "verl.workers.engine.fsdp.utils:unfuse_moe_params", "weights", required=False)
def keep_experts_merged(original: Callable[..., Any], weights: Any, *args: Any, **kwargs: Any) -> Any:
    """Give verl's own stream, from which our adapter can take the experts as they were before (see `ExpertStream`).

    Without the patch experts are sent and loaded one by one, thousands of tensors a weight sync, which is slower
    and as right: verl takes merged ones apart (workers/engine/fsdp/utils.py:90).  Remove when verl sends merged
    experts as they are.
    """
    from verl_ascend_rollout.integration.expert_stream import ExpertStream

    return ExpertStream(lambda pairs: original(pairs, *args, **kwargs), weights)
