"""The demo's reward: the share of the response that is digits.

verl loads this file through `reward.custom_reward_function.path` and calls `compute_score` for every response
(verl 0.9.1, trainer/ppo/reward.py and experimental/reward_loop/reward_manager/naive.py).

A random policy earns about 10 / 96.  Nothing in the data tells the answer: a prompt has no digit in it, and the ground
truth goes to this function only.  So a rising reward was learned by sampling, through weights that reached the rollout.
"""

from __future__ import annotations

import string
from typing import Any


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **_: Any
) -> float:
    """Score one response.

    Args:
        data_source: the data set's name; not used.
        solution_str: the response as text, special tokens left out.  One token is one character.
        ground_truth: how many digits earn the full reward, as text: the response length, so that ending early with a
            few digits does not pay.
        extra_info: verl's extra columns; not used.

    Returns:
        A number from 0 (no digit) to 1.

    Raises:
        ValueError: when the ground truth is not a positive whole number.
    """
    try:
        wanted = int(ground_truth)
    except (TypeError, ValueError):
        wanted = 0
    if wanted <= 0:
        raise ValueError(
            f"reward_model.ground_truth is {ground_truth!r}: it must be the number of digits wanted, as make_tiny.py "
            "writes it"
        )
    return min(1.0, sum(character in string.digits for character in solution_str) / wanted)
