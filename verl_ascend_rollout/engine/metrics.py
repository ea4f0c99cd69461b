"""How long the rollout's steps take, for verl's trackers and for Prometheus.

The server actor counts each step that passes through it (`StepMetrics`).  Prometheus takes the counts from vLLM's own
`/metrics`, which is served by the actor's process.  verl's trackers take them from the trainer (`tracking`).
"""

from __future__ import annotations

from typing import Any

STEPS = {
    "sleep": "sleep",
    "release_kv_cache": "sleep",
    "free_cache_engine": "sleep",
    "wake_up": "wake_up",
    "resume_kv_cache": "wake_up",
    "init_cache_engine": "wake_up",
    "abort_all_requests": "abort",
}
"""The step that a call of the server is, by the method's name; a weight sync is a call by name too (`step_of`)."""

SYNC_METHOD = "update_weights_from_ipc"

PROMETHEUS_NAME = "ascend_safe_rollout_step_seconds"


def step_of(method: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> str | None:
    """Return the step that a call of the rollout server is; `None` for a call that is none."""
    if method == "collective_rpc":
        called = keywords.get("method", arguments[0] if arguments else None)
        return "sync" if called == SYNC_METHOD else STEPS.get(str(called))
    return STEPS.get(method)


class StepMetrics:
    """Seconds and counts by step since they were last taken."""

    def __init__(self, replica: int, prometheus: bool) -> None:
        """Start at nothing.

        Args:
            replica: the replica's rank, a label in Prometheus.
            prometheus: also count for Prometheus (verl's `rollout.prometheus.enable`).
        """
        self._seconds: dict[str, float] = {}
        self._replica = str(replica)
        self._summary = _summary() if prometheus else None

    def add(self, step: str, seconds: float) -> None:
        """Count one step."""
        self._seconds[step] = self._seconds.get(step, 0.0) + seconds
        if self._summary is not None:
            self._summary.labels(step=step, replica=self._replica).observe(seconds)

    def take(self) -> dict[str, float]:
        """Return the seconds by step since the last call of this."""
        taken, self._seconds = self._seconds, {}
        return taken


def _summary() -> Any:
    """Return the metric in prometheus_client's registry, which vLLM serves (vllm 0.28
    vllm/v1/metrics/prometheus.py:39).

    `None` where prometheus_client is missing; then vLLM serves no metrics either.
    """
    try:
        from prometheus_client import REGISTRY, Summary
    except ImportError:
        return None
    # A process has one registry, and a name can be registered once.
    existing = REGISTRY._names_to_collectors.get(PROMETHEUS_NAME)
    if existing is not None:
        return existing
    return Summary(
        PROMETHEUS_NAME,
        "Seconds of each sleep, wake-up, weight sync and abort of the rollout engine",
        ["step", "replica"],
    )
