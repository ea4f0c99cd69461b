"""The rollout's numbers among those that verl's trainer logs after each step.

verl 0.9.1 has one place for numbers about weight syncs: `PPOTrainer._consume_sync_metrics`, whose mapping every V1
trainer merges into what it logs (trainer/ppo/v1/trainer_base.py:488, 674).  Only the trainer with a rollout of its own
devices fills it (trainer_separate_async.py:381); the others drop what `update_weights` returns (trainer_sync.py:38),
and `rollout.checkpoint_manager_class` is read nowhere.  So the method is wrapped, in the process of the trainer, which
is the one in which the replicas live.  The trainer of before (`trainer.use_v1=false`) has no such place.
"""

from __future__ import annotations

import functools
import logging
import sys
import weakref
from typing import Any

logger = logging.getLogger("verl_ascend_rollout.server")

TRAINER = "verl.trainer.ppo.v1.trainer_base"
MARK = "_ascend_safe_tracked"
SECONDS = 10.0
"""How long the servers may take to answer: numbers are not worth a wait."""

NAMES = {
    "sleep": "timing_s/rollout_sleep",
    "wake_up": "timing_s/rollout_wake_up",
    "sync": "timing_s/rollout_sync",
    "abort": "timing_s/rollout_abort",
}
"""The tracker's name by step: `timing_s/` is verl's own prefix for seconds (trainer/ppo/metric_utils.py)."""

KV_CACHE = "perf/rollout_kv_cache_gb"
DEVICE = "perf/rollout_device_memory_used_gb"
"""In GiB, and called gb, as verl's `perf/max_memory_allocated_gb` is."""

_replicas: weakref.WeakSet[Any] = weakref.WeakSet()


def follow(replica: Any) -> None:
    """Log the numbers of `replica`, whose `servers` answer `step_metrics`, from now on.

    Does nothing where another trainer runs, and warns where verl's own has no such place.
    """
    module = sys.modules.get(TRAINER)
    if module is None:
        return
    trainer: Any = getattr(module, "PPOTrainer", object)
    original = vars(trainer).get("_consume_sync_metrics")
    if original is None:
        logger.warning("verl's trainer has no _consume_sync_metrics: the rollout's numbers do not reach its trackers")
        return
    _replicas.add(replica)
    if getattr(original, MARK, False):
        return

    @functools.wraps(original)
    def with_rollout(self: Any) -> dict[str, Any]:
        return {**rollout_metrics(), **original(self)}

    setattr(with_rollout, MARK, True)
    trainer._consume_sync_metrics = with_rollout


def rollout_metrics() -> dict[str, float]:
    """The numbers of every replica that is followed: the slowest replica's seconds, and the bytes of all together.

    Never raises: a run does not end for the sake of a number.
    """
    import ray

    servers = [server for replica in _replicas for server in getattr(replica, "servers", None) or ()]
    calls = [server.step_metrics.remote() for server in servers]
    if not calls:
        return {}
    try:
        answers = ray.get(calls, timeout=SECONDS)
    except Exception as error:
        logger.warning("The rollout servers' numbers could not be had: %s", error)
        return {}
    return summed(answers)


def summed(answers: list[dict[str, Any]]) -> dict[str, float]:
    """One number for each name, of what the servers' `step_metrics` answered."""
    found: dict[str, float] = {}
    for answer in answers:
        for step, seconds in answer["seconds"].items():
            name = NAMES.get(step)
            if name is not None:
                found[name] = max(found.get(name, 0.0), seconds)
        for worker in answer["memory"]:
            found[KV_CACHE] = found.get(KV_CACHE, 0.0) + worker["kv_bytes"] / 2**30
            if worker["device_used"]:
                found[DEVICE] = found.get(DEVICE, 0.0) + worker["device_used"] / 2**30
    return found
