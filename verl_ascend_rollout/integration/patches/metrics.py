"""verl's numbers of a training step: with the rollout's, and judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from verl_ascend_rollout.integration import tracking
from verl_ascend_rollout.integration.patch import Patch, patch_of

PATCHES: list[Patch] = []


@patch_of(PATCHES, "verl.trainer.ppo.metric_utils:compute_timing_metrics", "batch", "timing_raw", required=False)
def log_rollout_numbers(original: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Add the rollout's numbers to the step's seconds; verl's own win.

    Without the patch the rollout's numbers do not reach verl's trackers: the trainers drop what `update_weights`
    returns (trainer/ppo/v1/trainer_sync.py:38), and rollout.checkpoint_manager_class is read nowhere.  Remove when
    verl's trainers log what `update_weights` returns.

    The one function of these that every trainer calls, once a step: V1, those of before (0.7.1 to main,
    trainer/ppo/ray_trainer.py), and those with a rollout of its own devices (experimental/separation).
    """
    return {**tracking.rollout_metrics(), **original(*args, **kwargs)}


@patch_of(PATCHES, "verl.utils.debug.metrics:calculate_debug_metrics", "data", required=False)
def judge_step(original: Callable[..., dict[str, Any]], data: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Judge what verl found at this step, as the replicas in this process ask for (see `integration.parity`).

    Without the patch a rollout with another policy than the trainer's goes unseen: verl logs the correlation of
    both and looks no further (utils/debug/metrics.py:120).  Remove when verl stops a run whose policies differ.

    Its callers are a copy in trainer/ppo/v1/trainer_base.py, and imports within trainer/ppo/ray_trainer.py:1613 and
    experimental/separation/ray_trainer.py:553, which run at the first step.
    """
    from verl_ascend_rollout.integration import parity

    metrics = original(data, *args, **kwargs)
    parity.judge(data, metrics)
    return metrics
