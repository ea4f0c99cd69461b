"""A job that is killed goes on from its last checkpoint: `trainer.resume_mode=auto`, verl's own, with our rollout."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8
SAVE_EVERY = 2
TRAINER_DEATH_SECONDS = 60
"""A trainer worker that is gone ends the job within that."""


def start(out: Path, toy: Path) -> subprocess.Popen[bytes]:
    environ = {**os.environ, "OUT": str(out), "TOY": str(toy), "STEPS": str(STEPS), "PYTHON": sys.executable}
    # As each run writes the file anew.
    environ["VERL_FILE_LOGGER_PATH"] = str(out / f"metrics-{time.monotonic_ns()}.jsonl")
    out.mkdir(exist_ok=True)
    with (out / "train.log").open("ab") as log:
        return subprocess.Popen(
            [
                str(ROOT / "recipes" / "grpo_tiny_cpu" / "run.sh"),
                f"trainer.save_freq={SAVE_EVERY}",
                "trainer.resume_mode=auto",
                f"trainer.default_local_dir={out}/checkpoints",
            ],
            stdout=log,
            stderr=log,
            cwd=out,
            env=environ,
            start_new_session=True,
        )


def rewards(out: Path) -> list[dict[int, float]]:
    """The mean reward by step, of each run."""
    runs = []
    for file in sorted(out.glob("metrics-*.jsonl"), key=lambda file: int(file.stem.partition("-")[2])):
        entries: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
        steps = [entry for entry in entries if "timing_s/step" in entry["data"]]
        runs.append({int(entry["step"]): float(entry["data"]["critic/score/mean"]) for entry in steps})
    return runs


def trainer_workers(run: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes with the actor's weights, by the title that Ray gives them."""
    found = psutil.Process(run.pid).children(recursive=True)
    return [process for process in found if "WorkerDict" in " ".join(process.cmdline())]


def test_a_trainer_that_is_killed_goes_on_from_its_last_checkpoint(tmp_path: Path, record_property: Any) -> None:
    whole = start(tmp_path / "whole", tmp_path / "toy")
    assert whole.wait(600) == 0
    (expected,) = rewards(tmp_path / "whole")
    assert sorted(expected) == list(range(1, STEPS + 1))

    out = tmp_path / "killed"
    run = start(out, tmp_path / "toy")
    while not (out / "checkpoints" / "latest_checkpointed_iteration.txt").exists():
        assert run.poll() is None
        time.sleep(0.2)
    # Anywhere in a step, or while a checkpoint is written.
    time.sleep(random.uniform(0, 8))
    (worker,) = trainer_workers(run)
    worker.kill()
    killed = time.monotonic()
    assert run.wait(TRAINER_DEATH_SECONDS) != 0
    seconds = time.monotonic() - killed
    last = int((out / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())

    assert start(out, tmp_path / "toy").wait(600) == 0
    before, after = rewards(out)
    line = f"killed after step {max(before)}, the job ended {seconds:.1f} s later, went on after step {last}"
    record_property("measured", line)
    print(line, expected, before, after, sep="\n")
    assert sorted(after) == list(range(last + 1, STEPS + 1))
    # The same prompts and the same weights; sampling and the order of sums are what is left to chance.
    assert all(abs(after[step] - expected[step]) < 0.1 for step in after)
    assert after[STEPS] > expected[1] + 0.1
