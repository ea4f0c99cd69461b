"""Whether the rollout and the trainer hold the same policy: their probabilities of the same tokens, compared each step.

A weight sync that went wrong in a way that no count and no checksum can see shows here, and nowhere else: the engine
generates with another policy than the one that is trained, the loss goes on falling, and the reward stops rising.
verl 0.9.1 computes the correlation of both sides' probabilities where `rollout.calculate_log_probs` is set (as our
configuration sets it), logs it, and looks no further.  Here it is looked at: in the trainer's process, at every step.
"""

from __future__ import annotations

import importlib
import logging
import math
from typing import Any

import torch

from verl_ascend_rollout import PATCHED
from verl_ascend_rollout.options import KEY, Parity

logger = logging.getLogger("verl_ascend_rollout.server")

CORRELATION = "training/rollout_actor_probs_pearson_corr"
"""verl 0.9.1, utils/debug/metrics.py:120."""

FLOOR = 0.9
"""Two implementations of one bf16 policy correlate to 0.999 (the CPU demo: at least 0.9996 at every step); a rollout
whose syncs were dropped on purpose came to 0.36 within four steps.  Trainers that generate ahead lie between, and so
do deep mixtures of experts of which each side routes tokens for itself: 0.86 with 8 layers and 0.63 with 16, with right
weights."""

_REPLAY = (
    "each side picks the experts for itself, and right weights came to 0.86 with 8 layers and to 0.63 with 16; replay "
    "the rollout's routing (actor_rollout_ref.rollout.enable_rollout_routing_replay=True; with Megatron also "
    f"router_replay.mode=R3), or set {KEY}.parity=warn"
)
ANY_ROUTING = f"Where none does and the model is a mixture of experts, look at its routing: {_REPLAY}"

HIGHEST = 1.0
"""No log-probability is above 0; what rounding adds stays far below this."""

MODULE = "verl.utils.debug.metrics"
FUNCTION = "calculate_debug_metrics"
"""What compares the two, once a step; `patches.metrics` hands its findings to `judge`."""

SIDES = {"rollout engine": "rollout_log_probs", "trainer": "old_log_probs"}
"""Whose log-probabilities they are, and their name in the batch that verl compares."""

_action: Parity = "off"
_routing = ""
_blind: list[str] = []


class ParityError(RuntimeError):
    """The rollout engine generates with another policy than the trainer's."""


def watch(action: Parity, routing: str = "") -> None:
    """Judge every step of the trainers in this process from now on, as the last call says.

    Args:
        action: `warn`, `error` (stop the run with `ParityError`), or `off`.
        routing: what to say about the model's routing, as a sentence without its end; empty for what fits any model.

    Raises:
        ParityError: `error` was asked for, and in this verl the steps do not come to `judge`; an ERROR for `warn`.
    """
    global _action, _routing
    _action, _routing = action, routing
    if action == "off":
        return
    try:
        if not hasattr(getattr(importlib.import_module(MODULE), FUNCTION), PATCHED):
            _say_blind("it is not patched")
    except (ImportError, AttributeError) as error:
        _say_blind(str(error))


def about_routing(experts: int | None, replayed: bool) -> str:
    """Return what `watch` takes about a model with so many experts (`None`: not known), whose routing is `replayed`."""
    if experts == 0:
        return "The model has no experts, so routing is not the cause"
    if replayed:
        return "Routing is replayed, so it is not the cause, unless actor/routing_replay/agreement is low"
    return f"Where none does, look at the routing of its {experts} experts: {_REPLAY}" if experts else ""


def judge(data: Any, metrics: dict[str, Any]) -> None:
    """Say what is wrong at this step, if anything is.

    Args:
        data: what verl compared; see `finding`.
        metrics: what verl made of it.

    Raises:
        ParityError: something is, or cannot be judged, and `error` was asked for.
    """
    if _action == "off":
        return
    try:
        found = finding(data.batch, metrics)
    except Exception as error:  # a later verl's batch or metrics
        _say_blind(f"{type(error).__name__}: {error}")
        return
    if found is None:
        return
    level, sentence = found
    if _action == "error":
        raise ParityError(sentence)
    logger.log(level, "%s", sentence)


def finding(batch: Any, metrics: dict[str, Any]) -> tuple[int, str] | None:
    """Judge one step.

    A log-probability of a generated token that is none is the loudest case: it makes the correlation NaN, or hides in
    it.  A correlation that is NaN without one says nothing: one side's probabilities are all equal, or there is one
    token or none.

    Args:
        batch: what verl compared: for each of `SIDES` the log-probabilities, (sequences, response length), and masks.
        metrics: what verl made of it.

    Returns:
        The level to log at and a sentence, or `None` where nothing is wrong.
    """
    tokens = _generated(batch)
    broken = {side: _broken(batch[name], tokens) for side, name in SIDES.items()}
    if any(broken.values()):
        where = " and ".join(f"{count} from the {side}" for side, count in broken.items() if count)
        return logging.ERROR, (
            f"Of {int(tokens.sum())} generated tokens, log-probabilities are missing (NaN, infinite or above 0): "
            f"{where}. That side computes with broken weights, or loses numbers on the way, and this step's loss is "
            f"broken too. Set {KEY}.verify=always to see whether a weight sync brings NaN or Inf or leaves weights "
            "that differ, and report it with the events file"
        )
    correlation = float(metrics[CORRELATION])
    if math.isnan(correlation) or correlation >= FLOOR:
        return None
    return logging.WARNING, (
        "The rollout engine does not generate with the trainer's policy: the probabilities that both give to the "
        f"generated tokens correlate to {correlation:.3f}, and one policy comes to {FLOOR} or more. Set "
        f"{KEY}.verify=always to see whether weights differ. {_routing or ANY_ROUTING}. Otherwise report it with the "
        f"events file; a trainer that generates many steps ahead may set {KEY}.parity=off"
    )


def _generated(batch: Any) -> torch.Tensor:
    """Which tokens verl compares (verl 0.9.1, utils/debug/metrics.py:85-96), as (sequences, response length)."""
    for name in ("response_mask", "attention_mask"):
        if name in batch:
            mask: torch.Tensor = batch[name][:, -batch["responses"].size(1) :]
            return mask.bool()
    return torch.ones_like(batch[SIDES["trainer"]], dtype=torch.bool)


def _broken(log_probs: torch.Tensor, tokens: torch.Tensor) -> int:
    """How many of the tokens have no log-probability; a comparison with NaN is false."""
    values = torch.masked_select(log_probs, tokens)
    return int((~((values > -math.inf) & (values <= HIGHEST))).sum())


def _say_blind(reason: str) -> None:
    """Say once that the policies are not compared; stop where the job was to stop at a difference."""
    sentence = (
        f"{KEY}.parity={_action} cannot be kept: this verl's {MODULE}.{FUNCTION} is not the one of 0.9 ({reason}), so "
        "a rollout with another policy than the trainer's goes unseen; use a verl release that the support matrix "
        "lists, or set parity to off"
    )
    if _action == "error":
        raise ParityError(sentence)
    if not _blind:
        _blind.append(reason)
        logger.error("%s", sentence)
