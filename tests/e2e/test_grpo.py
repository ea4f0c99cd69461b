"""GRPO end to end: verl's trainer, Ray, a real vLLM engine and our rollout, on a toy Qwen1.5-MoE.  Minutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "recipes" / "grpo_tiny_cpu" / "demo.py"


def run_demo(out: Path, steps: int, **environment: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run the demo; its process and its summary."""
    done = subprocess.run(
        [sys.executable, str(DEMO), "--steps", str(steps), "--out", str(out), "--timeout", "1200"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=1400,
        cwd=out.parent,
    )
    print(done.stdout[-3000:], done.stderr[-3000:])
    return done, json.loads((out / "summary.json").read_text())


def metrics(out: Path, name: str) -> list[float]:
    """A metric of verl's at each training step."""
    entries = [json.loads(line)["data"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [entry[name] for entry in entries if "timing_s/step" in entry]


def test_grpo_learns_through_the_synced_rollout(tmp_path: Path) -> None:
    done, summary = run_demo(tmp_path / "run", steps=6)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert summary["steps"] == 6
    assert summary["reward_last"] > summary["reward_first"] + 0.1
    assert summary["pearson_min"] >= 0.99
    assert summary["kv_bytes_freed"] == summary["kv_bytes_restored"] == 256 * 2**20
    assert all(summary["seconds_per_step"][part] > 0 for part in ("generate", "sync", "train"))
    for picture in ("reward.png", "memory.png"):
        assert (tmp_path / "run" / picture).stat().st_size > 10_000

    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    syncs = [event for event in events if (event["step"], event["process"]) == ("sync", "trainer")]
    # Two tensors for the 60 experts of each of two layers, where a checkpoint's 391 have 180.
    assert {event["detail"]["tensors"] for event in syncs} == {391 - 2 * 180 + 2 * 2}

    log = (tmp_path / "run" / "train.log").read_text()
    # One line a process says that the plug-in is there: the driver, Ray's workers and vLLM's worker process among them.
    assert log.count("verl_ascend_rollout") >= 5
    assert "KV cache of" in log and "given back by 'reallocate'" in log


def test_control_without_weight_syncs_the_correlation_falls(tmp_path: Path) -> None:
    """The correlation is what would show a rollout that goes on with old weights; here it is made to."""
    saboteur = {
        "VERL_USE_EXTERNAL_MODULES": "drop_syncs",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])),
    }
    done, summary = run_demo(tmp_path / "run", steps=4, **saboteur)
    pearson = metrics(tmp_path / "run", "training/rollout_actor_probs_pearson_corr")
    assert pearson[0] >= 0.99, "the first sync is not dropped"
    assert summary["pearson_min"] < 0.99
    assert pearson[-1] < pearson[0]
    assert done.returncode == 1
    assert "correlation" in done.stdout + done.stderr
