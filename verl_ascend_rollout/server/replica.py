"""`AscendSafeReplica`: the TaskRunner's handle on one rollout server; it only chooses the server's class and name."""

from __future__ import annotations

from typing import Any

import ray
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMReplica
from verl.workers.rollout.vllm_rollout.vllm_pd_replica import vLLMPDReplica

from verl_ascend_rollout import ROLLOUT_NAME, compat
from verl_ascend_rollout.options import AscendSafeOptions
from verl_ascend_rollout.server import parity, tracking
from verl_ascend_rollout.server.actor import AscendSafeServerActor


class AscendSafeReplica(vLLMReplica):
    """verl's replica, with our server."""

    def __init__(self, replica_rank: int, config: Any, *args: Any, **kwargs: Any) -> None:
        """See verl's `RolloutReplica`.

        Raises:
            OptionError: an unknown option of ours, or a bad value.
            CompatError: verl has drifted away from something that we rely on.
        """
        compat.assert_intact()
        options = AscendSafeOptions.from_rollout(config)
        super().__init__(replica_rank, config, *args, **kwargs)
        self.server_class = ray.remote(AscendSafeServerActor)
        # A reward model's or a teacher's engine is not the rollout that the trackers speak of.
        if not (self.is_reward_model or self.is_teacher_model):
            tracking.follow(self)
            parity.watch(options.parity)

    def _get_server_name_prefix(self) -> str:
        # verl's replica says "vllm_" whatever the rollout's name is, and verl's adapter looks for "<name>_" (0.8.0 to
        # 0.9.1: vllm_async_server.py:1487 against vllm_rollout.py:323).
        return f"{ROLLOUT_NAME}_"


class AscendSafePDReplica(vLLMPDReplica):
    """verl's replica with prefill and decode apart, with our server.  Read, not run: it needs NIXL or Mooncake."""

    def __init__(self, replica_rank: int, config: Any, *args: Any, **kwargs: Any) -> None:
        """See verl's `vLLMPDReplica`."""
        compat.assert_intact()
        AscendSafeOptions.from_rollout(config)
        super().__init__(replica_rank, config, *args, **kwargs)
        self.server_class = ray.remote(AscendSafeServerActor)

    def _get_server_name_prefix(self) -> str:
        return f"{ROLLOUT_NAME}_"

    def _spawn_pd_server(self, *args: Any, **kwargs: Any) -> Any:
        # verl 0.9.1 writes the actor names out here (vllm_pd_replica.py:154 and :185).
        kwargs["actor_name"] = self._get_server_name_prefix() + kwargs["actor_name"].removeprefix("vllm_")
        return super()._spawn_pd_server(*args, **kwargs)
