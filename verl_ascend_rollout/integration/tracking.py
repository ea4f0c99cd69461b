"""The rollout's numbers, for the trainer of this process: `patches.metrics` puts them among those that verl logs."""

from __future__ import annotations

import logging
import weakref
from typing import Any

logger = logging.getLogger("verl_ascend_rollout.server")

SECONDS = 10.0
"""How long the servers may take to answer: numbers are not worth a wait."""

NAMES = {
    "sleep": "timing_s/rollout_sleep",
    "wake_up": "timing_s/rollout_wake_up",
    "sync": "timing_s/rollout_sync",
    "abort": "timing_s/rollout_abort",
}
"""The tracker's name by step: `timing_s/` is verl's own prefix for seconds (trainer/ppo/metric_utils.py)."""

ROUTING = {"records": "rollout/routing_records", "dropped": "rollout/routing_records_dropped"}
"""Answers with a record of routing since the last step, and those whose record did not cover them."""

KV_CACHE = "perf/rollout_kv_cache_gb"
DEVICE = "perf/rollout_device_memory_used_gb"
RESTARTS = "perf/rollout_engine_restarts"
"""In GiB, and called gb, as verl's `perf/max_memory_allocated_gb` is."""

_replicas: weakref.WeakSet[Any] = weakref.WeakSet()


def follow(replica: Any) -> None:
    """Count `replica`, whose `servers` answer `step_metrics`, from now on."""
    _replicas.add(replica)


def rollout_metrics() -> dict[str, float]:
    """Return the numbers of every replica that is followed: the slowest one's seconds, and the bytes of all together.

    Never raises: a run does not end for the sake of a number.
    """
    import ray

    # In a set: a replica may come to this process more than once.
    servers = {server for replica in _replicas for server in getattr(replica, "servers", None) or ()}
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
        for name, number in answer["routing"].items():
            found[ROUTING[name]] = found.get(ROUTING[name], 0.0) + number
        if answer["restarts"]:
            found[RESTARTS] = found.get(RESTARTS, 0.0) + answer["restarts"]
        for worker in answer["memory"]:
            found[KV_CACHE] = found.get(KV_CACHE, 0.0) + worker["kv_bytes"] / 2**30
            if worker["device_used"]:
                found[DEVICE] = found.get(DEVICE, 0.0) + worker["device_used"] / 2**30
    return found
