"""verl's training loops, which end when a rollout engine has died."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from verl_ascend_rollout.integration.engine_death import ends_the_job
from verl_ascend_rollout.integration.patch import Patch, patch_of

PATCHES: list[Patch] = []


@patch_of(PATCHES, "verl.trainer.ppo.v1.trainer_base:PPOTrainer.fit", "self", "agent_loop_manager", required=False)
def end_with_the_engine(original: Callable[..., Any], self: Any, agent_loop_manager: Any) -> Any:
    """Run the loop, and end it with a sentence when a rollout engine, or a worker of the agent loop, has died.

    Without the patch such a job goes on for ever: the trainer polls for finished prompts and refills those that failed
    (trainer/ppo/v1/replay_buffer.py).  Remove when verl ends a job whose rollout engine or agent loop is dead.
    """
    # A manager of the user's own may have none.
    workers = (*(getattr(agent_loop_manager, "agent_loop_workers", None) or ()), *(self.get_reward_handles() or ()))
    with ends_the_job(workers):
        return original(self, agent_loop_manager)


@patch_of(PATCHES, "verl.trainer.ppo.ray_trainer:RayPPOTrainer.fit", "self", required=False)
def end_legacy_with_the_engine(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Do the same for the trainer of before V1.

    Without the patch a call of an engine that is dead may have no answer, and the job waits for it (vLLM 0.28,
    v1/engine/core_client.py).  Remove when verl ends a job whose rollout engine is dead.
    """
    with ends_the_job():
        return original(self, *args, **kwargs)
