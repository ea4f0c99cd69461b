"""The policies of trainer and rollout are compared at every step, by verl's own figure."""

from __future__ import annotations

import logging
import types
from typing import Any

import pytest
import torch

from verl_ascend_rollout.server import parity


def batch(noise: float) -> Any:
    """What verl's trainer hands over: log-probs of both sides, and which tokens count."""
    generator = torch.Generator().manual_seed(0)
    actor = -4 * torch.rand(8, 32, generator=generator)
    rollout = actor + noise * torch.randn(8, 32, generator=generator)
    tensors = {
        "rollout_log_probs": rollout,
        "old_log_probs": actor,
        "response_mask": torch.ones(8, 32),
        "responses": torch.zeros(8, 32, dtype=torch.long),
    }
    return types.SimpleNamespace(batch=tensors)


@pytest.fixture
def verls_trainer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """verl's V1 trainer module, put back after the test."""
    from verl.trainer.ppo.v1 import trainer_base
    from verl.utils.debug import metrics

    for module in (trainer_base, metrics):
        monkeypatch.setattr(module, parity.FUNCTION, getattr(module, parity.FUNCTION))
    return trainer_base


def test_one_policy_passes_and_another_is_an_error(verls_trainer: Any) -> None:
    parity.watch("error")
    parity.watch("error")
    metrics = verls_trainer.calculate_debug_metrics(batch(noise=0.003))
    assert metrics[parity.CORRELATION] > 0.999
    with pytest.raises(parity.ParityError, match=r"correlate to 0\.\d+, and one policy comes to 0\.9 or more"):
        verls_trainer.calculate_debug_metrics(batch(noise=2.0))


def test_a_warning_lets_the_run_go_on(verls_trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    parity.watch("warn")
    with caplog.at_level(logging.WARNING, logger="verl_ascend_rollout.server"):
        metrics = verls_trainer.calculate_debug_metrics(batch(noise=2.0))
    assert metrics[parity.CORRELATION] < parity.FLOOR
    assert "does not generate with the trainer's policy" in caplog.text


def test_off_leaves_verls_function_alone(verls_trainer: Any) -> None:
    before = verls_trainer.calculate_debug_metrics
    parity.watch("off")
    assert verls_trainer.calculate_debug_metrics is before


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_a_step_without_tokens_says_nothing(nothing: Any) -> None:
    parity.judge(nothing, "error")
