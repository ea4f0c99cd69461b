"""verl's training loops, which end when a rollout engine has died."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from verl_ascend_rollout.integration.engine_death import end_with_the_engines, ends_the_job
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


@patch_of(
    PATCHES,
    "verl.experimental.fully_async_policy.fully_async_rollouter:FullyAsyncRollouter.fit",
    "self",
    required=False,
)
async def end_fully_async_with_the_engine(original: Callable[..., Any], self: Any) -> Any:
    """Do the same for the rollouter of the fully asynchronous trainer, which has the replicas.

    Without the patch such a job ends as if its data had, with exit code 0: `fit` keeps to itself what its parts raise,
    and the end of its samples is the trainer's (verl 0.9.1, experimental/fully_async_policy/fully_async_trainer.py:648,
    fully_async_rollouter.py:1065 and :1099).  Remove when verl ends that job with an error.
    """
    return await end_with_the_engines(original(self))


@patch_of(PATCHES, "verl.experimental.one_step_off_policy.ray_trainer:OneStepOffRayTrainer.fit", "self", required=False)
async def end_one_step_off_with_the_engine(original: Callable[..., Any], self: Any) -> Any:
    """Do the same for the trainer that is one step behind its rollout.

    Without the patch a call of an engine that is dead may have no answer, and the job waits for it (vLLM 0.28,
    v1/engine/core_client.py).  Remove when verl ends a job whose rollout engine is dead.
    """
    return await end_with_the_engines(original(self))
