"""`on_engine_death: restart` on an emulated NPU, whose engine sleeps with its weights: three kills in one GRPO job."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verl", reason="this stack has no verl: see emulator/stacks.toml")

from killed_engine import OPTION, costs, job, processes

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(2400)]

KILLS, STEPS = 3, 8


def test_a_job_goes_on_with_an_engine_that_sleeps(tmp_path: Path, report: Any) -> None:
    from fake_npu import toolkit

    environment = {
        **toolkit.environment(),
        "PYTHON": sys.executable,
        "STEPS": str(STEPS),
        "VERL_PLATFORM": "npu",
        "FAKE_CANN_DEVICES": "1",
        # Device memory of its own, whatever else runs here.
        "FAKE_CANN_RUN": "test_engine_killed",
    }
    with job(tmp_path / "run", f"{OPTION}.on_engine_death=restart", **environment) as running:
        killed = running.kill_at_random(KILLS, STEPS, random.Random(1))
        code = running.process.wait(timeout=900)
        metrics, events = running.metrics(), running.events()
        time.sleep(3)
        left = processes(running.out)
        log = running.log.read_text()
    rewards = [step["critic/score/mean"] for step in metrics]
    pearson = min(step["training/rollout_actor_probs_pearson_corr"] for step in metrics)
    for number, cost in enumerate(costs(killed, events), start=1):
        report(f"kill {number} of {KILLS}", cost)
    report(f"GRPO with {KILLS} kills", f"rewards {rewards}, Pearson at least {pearson:.5f}")
    assert code == 0, log[-3000:]
    assert next(event["detail"]["rung"] for event in events if event["step"] == "decide") == "sleep"
    assert metrics[-1]["perf/rollout_engine_restarts"] == KILLS and len(metrics) == STEPS
    assert rewards[-1] > rewards[0]
    assert pearson >= 0.99
    assert not left
