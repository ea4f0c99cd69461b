"""Whether the rollout and the trainer hold the same policy: their probabilities of the same tokens, compared each step.

A weight sync that went wrong in a way that no count and no checksum can see shows here, and nowhere else: the engine
generates with another policy than the one that is trained, the loss goes on falling, and the reward stops rising.
verl 0.9.1 computes the correlation of both sides' probabilities where `rollout.calculate_log_probs` is set (as our
configuration sets it), logs it, and looks no further.  Here it is looked at: in the trainer's process, at every step.
"""

from __future__ import annotations

import functools
import logging
import math
import sys
from collections.abc import Callable
from typing import Any

from verl_ascend_rollout.options import KEY, Parity

logger = logging.getLogger("verl_ascend_rollout.server")

CORRELATION = "training/rollout_actor_probs_pearson_corr"
"""verl 0.9.1, utils/debug/metrics.py:120."""

FLOOR = 0.9
"""Two implementations of one bf16 policy correlate to 0.999 (the CPU demo: at least 0.9996 at every step); a rollout
whose syncs were dropped on purpose came to 0.36 within four steps.  Trainers that generate ahead lie between."""

MODULES = ("verl.trainer.ppo.v1.trainer_base", "verl.utils.debug.metrics")
FUNCTION = "calculate_debug_metrics"
MARK = "_ascend_safe_parity"


class ParityError(RuntimeError):
    """The rollout engine generates with another policy than the trainer's."""


def watch(action: Parity) -> None:
    """Look at the correlation of every step from now on.  A second call changes nothing.

    Args:
        action: `warn`, `error` (stop the run with `ParityError`), or `off`.
    """
    if action == "off":
        return
    for name in MODULES:
        module = sys.modules.get(name)
        original = getattr(module, FUNCTION, None)
        if original is not None and not hasattr(original, MARK):
            setattr(module, FUNCTION, _watched(original, action))


def _watched(original: Callable[..., dict[str, Any]], action: Parity) -> Callable[..., dict[str, Any]]:
    @functools.wraps(original)
    def calculate_debug_metrics(*args: Any, **kwargs: Any) -> dict[str, Any]:
        metrics = original(*args, **kwargs)
        judge(metrics.get(CORRELATION), action)
        return metrics

    setattr(calculate_debug_metrics, MARK, True)
    return calculate_debug_metrics


def judge(correlation: Any, action: Parity) -> None:
    """Warn or raise where a correlation says that the policies differ; one that could not be computed says nothing.

    Raises:
        ParityError: it is below `FLOOR`, and `action` is `error`.
    """
    value = float("nan") if correlation is None else float(correlation)
    if math.isnan(value) or value >= FLOOR:
        return
    sentence = (
        f"The rollout engine does not generate with the trainer's policy: the probabilities that both give to the "
        f"generated tokens correlate to {value:.3f}, and one policy comes to {FLOOR} or more. Set {KEY}.verify=always "
        "to see which weights differ, and report it with the events file; a trainer that generates many steps ahead "
        f"may set {KEY}.parity=off"
    )
    if action == "error":
        raise ParityError(sentence)
    logger.warning("%s", sentence)
