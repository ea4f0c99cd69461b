"""verl's replay buffer, asked more often.

verl 0.9.1 looks every 2 seconds whether a step's responses are all there (trainer/ppo/v1/replay_buffer.py:409); a toy's
are there after half a second.  Used through verl's own setting, `trainer.v1.sampler.custom_sampler`.
"""

from __future__ import annotations

from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer


class QuickReplayBuffer(ReplayBuffer):
    """Polls every 0.1 s."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "poll_interval": 0.1})
