"""GRPO with routing replay (R3) where each batch is gone over twice, cut by its tokens, and validated in between.

`make r3` has the plain job; this one has what changes which tokens a pass sees, with each of verl's two trainers.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from killed_engine import ROOT, job

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

STEPS, EPOCHS, MINI_BATCHES = 2, 2, 2
SAMPLES, PROMPTS_OF_VALIDATION = 64, 16
SETTINGS = (
    "actor_rollout_ref.rollout.enable_rollout_routing_replay=True",
    f"actor_rollout_ref.actor.ppo_epochs={EPOCHS}",
    "actor_rollout_ref.actor.use_dynamic_bsz=True",
    # A sample has 80 tokens at most: no fewer than five micro-batches for the 32 of a mini-batch.
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=512",
    "trainer.val_before_train=True",
    "trainer.test_freq=1",
)


@pytest.fixture(scope="module")
def ab() -> ModuleType:
    spec = importlib.util.spec_from_file_location("routing_replay_ab", ROOT / "recipes" / "routing_replay" / "ab.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("trainer", ["legacy", pytest.param("v1", marks=pytest.mark.long)])
def test_each_pass_over_a_batch_replays_its_record(trainer: str, ab: ModuleType, tmp_path: Path) -> None:
    ab.make_toy(tmp_path / "toy")
    settings = [
        *SETTINGS,
        f"trainer.use_v1={trainer == 'v1'}",
        f"actor_rollout_ref.actor.optim.lr={ab.LEARNING_RATE}",
    ]
    files = {"TOY": str(tmp_path / "toy"), "VERL_FILE_LOGGER_PATH": str(tmp_path / "run" / "metrics.jsonl")}
    with job(tmp_path / "run", *settings, PYTHON=sys.executable, STEPS=str(STEPS), **files) as running:
        code = running.process.wait(timeout=900)
        log = running.log.read_text()
        events, steps = running.events(), running.metrics()
    assert code == 0, log[-3000:]
    passes = [event["detail"] for event in events if event["step"] == "routing"]
    one_step = ["log_prob", *["update"] * (EPOCHS * MINI_BATCHES)]
    assert [one["pass"] for one in passes] == one_step * STEPS, "validation has no pass, and no pass is left out"
    for one in passes:
        # The last token of each answer has no record; nothing else lacks one.
        assert one["native"] == one["sequences"] and one["unrecorded"] == 0, one
        assert one["sequences"] == (SAMPLES if one["pass"] == "log_prob" else SAMPLES // MINI_BATCHES)
        assert 0 < one["differed"] < one["cells"]
    print(f"\n{trainer}: " + ", ".join(f"{one['pass']} {one['share']:.3f}" for one in passes))
    print({name: [step[metric] for step in steps] for name, metric in ab.METRICS.items()})
    assert len(steps) == STEPS
    for step in steps:
        assert step[ab.METRICS["pearson"]] > ab.PEARSON_WANTED
        assert step[ab.METRICS["k3_kl"]] < 1e-3
        assert step["rollout/routing_records_dropped"] == 0
        assert step["rollout/routing_records"] >= SAMPLES
