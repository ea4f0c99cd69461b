"""GRPO on emulated NPUs: the demo of the CPU recipe, with `VERL_PLATFORM=npu` and the number of devices changed.

verl's own `huawei` platform, Ray's NPU resource, FSDP2 over HCCL, the real vllm-ascend with sleep mode.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verl", reason="this stack has no verl: see emulator/stacks.toml")
pytestmark = pytest.mark.e2e

DEMO = Path(__file__).resolve().parents[2] / "recipes" / "grpo_tiny_cpu" / "demo.py"
TWO_RANKS = [
    "trainer.n_gpus_per_node=2",
    "actor_rollout_ref.rollout.tensor_model_parallel_size=2",
    "ray_kwargs.ray_init.num_cpus=16",
    # 32 samples a rank cannot be cut into micro-batches of 64.
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16",
]
EXPERTS_APART = "actor_rollout_ref.rollout.expert_parallel_size=2"


@pytest.mark.parametrize(
    ("case", "ranks", "steps", "settings"),
    [
        ("unchanged", 1, 6, []),
        pytest.param("two ranks, TP 2", 2, 3, TWO_RANKS, marks=pytest.mark.cluster),
        pytest.param("two ranks, EP 2", 2, 3, [*TWO_RANKS, EXPERTS_APART], marks=pytest.mark.cluster),
    ],
)
def test_the_cpu_recipe_trains(
    case: str, ranks: int, steps: int, settings: list[str], tmp_path: Path, report: Any
) -> None:
    from fake_npu import toolkit

    environment = {
        **os.environ,
        **toolkit.environment(),
        "VERL_PLATFORM": "npu",
        "FAKE_CANN_DEVICES": str(ranks),
        # Device memory of its own, whatever else runs here.
        "FAKE_CANN_RUN": "test_grpo",
    }
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_ASCEND_ENABLE_NZ"):
        environment.pop(name, None)  # set for the engine in this process; a job must not need them
    done = subprocess.run(
        [sys.executable, str(DEMO), "--steps", str(steps), "--out", str(tmp_path), "--timeout", "540", *settings],
        capture_output=True,
        text=True,
        timeout=580,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == steps
    assert summary["pearson_min"] >= 0.999
    assert summary["reward_last"] > summary["reward_first"]

    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    decided = next(event["detail"] for event in events if event["step"] == "decide")
    values = {decision["name"]: decision["value"] for decision in decided["decisions"]}
    assert decided["rung"] == values["kv_release"][0] == "sleep"
    assert (values["sleep_level"], values["weight_path"]) == (1, "by_layout")
    assert [worker["worker"] for worker in decided["workers"]] == ["NPUWorker"] * ranks
    syncs = [event for event in events if event["step"] == "sync" and event["process"] == "worker"]
    # One before the first step, and one after each but the last or after each, as verl's trainer has it.
    assert len(syncs) >= steps * ranks
    assert [event["detail"]["path"] for event in syncs] == ["loader"] * ranks + ["replay"] * (len(syncs) - ranks)
    report(
        f"GRPO {case}, {steps} steps",
        f"reward {summary['reward_first']:.3f} -> {summary['reward_last']:.3f}, Pearson at least "
        f"{summary['pearson_min']:.5f}, {len(syncs)} syncs, first step after {summary['seconds_to_first_step']:.0f} s "
        f"of {summary['seconds_total']:.0f} s",
    )
