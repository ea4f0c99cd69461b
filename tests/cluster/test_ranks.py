"""GRPO on one node with more than one trainer rank, as a job of its own: engines of TP 2, one of them and two."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

DEMO = Path(__file__).resolve().parents[2] / "recipes" / "grpo_tiny_cpu" / "demo.py"
TP, STEPS = 2, 3


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_of_one_node_train(ranks: int, tmp_path: Path, record_property: Any) -> None:
    setting = f"actor_rollout_ref.rollout.tensor_model_parallel_size={TP}"
    done = subprocess.run(
        [sys.executable, DEMO, "--steps", str(STEPS), "--tp", str(ranks), "--out", tmp_path, setting],
        capture_output=True,
        text=True,
        timeout=1400,
        cwd=tmp_path,
        # vLLM binds the workers of one engine to memory nodes, and most machines have one.
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["pearson_min"] >= 0.999
    assert summary["reward_last"] > summary["reward_first"]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    decided = [event for event in events if event["step"] == "decide"]
    assert [len(event["detail"]["workers"]) for event in decided] == [TP] * (ranks // TP)
    syncs = [event for event in events if (event["step"], event["process"]) == ("sync", "worker")]
    assert len(syncs) >= STEPS * ranks
    line = (
        f"{ranks} ranks of one node, {ranks // TP} engine(s) of TP {TP}: reward {summary['reward_first']:.3f} -> "
        f"{summary['reward_last']:.3f}, Pearson at least {summary['pearson_min']:.5f}, {len(syncs)} syncs of "
        f"{statistics.median(event['seconds'] for event in syncs):.3f} s in the middle, first step after "
        f"{summary['seconds_to_first_step']:.0f} s of {summary['seconds_total']:.0f} s"
    )
    record_property("measured", line)
    print(line)
