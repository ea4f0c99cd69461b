"""vLLM's record of routing for one answer: whether it covers the answer's tokens.

A record has a row for every token that went through the model: the prompt's and the answer's but the last (vLLM 0.22 to
0.28, v1/core/sched/scheduler.py: the prompt's rows come when its prefill ends, also those that the prefix cache had; a
row comes with each further token; what a preempted request had is kept).  verl lays it out by position from the first
token on (experimental/agent_loop/agent_loop.py:139), so one that lacks rows anywhere would be shifted.
"""

from __future__ import annotations

from typing import Any


def checked(record: Any, prompt: int, answer: int, shape: tuple[int, int]) -> tuple[Any, str]:
    """Return a record that covers its answer, and what is wrong with the one that came.

    Args:
        record: (tokens, layers, top k), or `None`.
        prompt, answer: how many tokens each has.
        shape: layers and top k of the model.

    Returns:
        The record and an empty text where it is whole; else rows of zeros, which say "not recorded", and the reason.
    """
    if answer == 0:  # aborted before the first token: there is nothing to train on
        return record, ""
    rows = prompt + answer - 1
    if record is None:
        reason = "vLLM gave no record of routing for an answer"
    elif len(record) != rows:
        reason = (
            f"vLLM's record of routing has {len(record)} tokens for a prompt of {prompt} and an answer of {answer}, "
            f"which take {rows}"
        )
    else:
        return record, ""
    import numpy

    return numpy.zeros((rows, *(shape if record is None else record.shape[1:])), dtype=numpy.uint8), reason


class Count:
    """How many records came, and how many of them were dropped."""

    def __init__(self) -> None:
        """Start at nothing."""
        self.dropped = 0
        self._taken = (0, 0)
        self._seen = 0

    def add(self, reason: str) -> None:
        """Count one answer; a reason is why its record was dropped."""
        self._seen += 1
        self.dropped += bool(reason)

    def take(self) -> dict[str, int]:
        """Return `records` and `dropped` since the last call; empty where no answer came at all."""
        if not self._seen:
            return {}
        before, self._taken = self._taken, (self._seen, self.dropped)
        return {"records": self._seen - before[0], "dropped": self.dropped - before[1]}
