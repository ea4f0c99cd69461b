"""verl's registries of rollouts, with ours."""

from __future__ import annotations

from typing import Any

from verl_ascend_rollout import ROLLOUT_NAME
from verl_ascend_rollout.integration.patch import Patch, patch_of

PATCHES: list[Patch] = []

ADAPTER = "verl_ascend_rollout.integration.adapter.AscendSafeServerAdapter"


@patch_of(PATCHES, "verl.workers.rollout.base:_ROLLOUT_REGISTRY", once=True)
def register_adapter(registry: Any) -> Any:
    """Name the class of the trainer worker's side.

    Without the patch verl knows no rollout `ascend_safe`: it has no call to register one (workers/rollout/base.py:89).
    Remove when verl has a call that registers an adapter.
    """
    registry[ROLLOUT_NAME, "async"] = ADAPTER
    return registry


@patch_of(PATCHES, "verl.workers.rollout.replica:RolloutReplicaRegistry", once=True)
def register_replica(registry: Any) -> Any:
    """Register the replica that the TaskRunner starts.

    Without the patch verl knows no replica of `ascend_safe`, since the registry is filled by code
    (workers/rollout/replica.py:318).  Remove when verl reads replicas from entry points.
    """
    registry.register(ROLLOUT_NAME, _load_replica)
    return registry


def _load_replica() -> Any:
    from verl_ascend_rollout.integration.replica import AscendSafeReplica

    return AscendSafeReplica
