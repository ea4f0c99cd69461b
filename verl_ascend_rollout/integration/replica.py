"""`AscendSafeReplica`: the TaskRunner's handle on one rollout server; it only chooses the server's class and name."""

from __future__ import annotations

from typing import Any

import ray
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMReplica

from verl_ascend_rollout import ROLLOUT_NAME
from verl_ascend_rollout.integration import engine_death, parity, tracking
from verl_ascend_rollout.integration.actor import AscendSafeServerActor
from verl_ascend_rollout.integration.patch import assert_intact
from verl_ascend_rollout.options import AscendSafeOptions
from verl_ascend_rollout.policy.request import ModelFacts


class AscendSafeReplica(vLLMReplica):
    """verl's replica, with our server."""

    def __init__(self, replica_rank: int, config: Any, *args: Any, **kwargs: Any) -> None:
        """See verl's `RolloutReplica`.

        Raises:
            OptionError: an unknown option of ours, or a bad value.
            DriftError: verl has drifted away from something that we rely on.
        """
        assert_intact()
        AscendSafeOptions.from_rollout(config)
        super().__init__(replica_rank, config, *args, **kwargs)
        self.server_class = ray.remote(AscendSafeServerActor)
        engine_death.follow(self)
        self._follow()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._follow()

    def _follow(self) -> None:
        """Track this replica, and compare its policy with the trainer's, in each process that it comes to.

        Every trainer of verl holds the replicas that it sends weights to.  Most of them make the replicas; the fully
        asynchronous one is an actor of its own, and gets them from the rollouter by pickle (verl 0.9.1,
        experimental/fully_async_policy/fully_async_trainer.py:219).
        """
        # A reward model's or a teacher's engine is not the rollout that the trackers speak of.
        if self._is_the_rollout():
            tracking.follow(self)
            model = ModelFacts.from_config(getattr(self.model_config, "hf_config", None) or {})
            parity.watch(
                AscendSafeOptions.from_rollout(self.config).parity,
                parity.about_routing(model.experts, bool(self.config.get("enable_rollout_routing_replay"))),
            )

    def _is_the_rollout(self) -> bool:
        # verl 0.7.1 has no teachers.
        return not (self.is_reward_model or getattr(self, "is_teacher_model", False))

    def _get_server_name_prefix(self) -> str:
        # verl's replica says "vllm_" whatever the rollout's name is, and verl's adapter looks for "<name>_" (0.8.0 to
        # 0.9.1: vllm_async_server.py:1487 against vllm_rollout.py:323).
        return f"{ROLLOUT_NAME}_"
