"""A GRPO job whose rollout engine, or a worker beside it, is killed: it ends with one sentence, or, with `restart`, it
goes on and learns.

ASCEND_SAFE_KILLS=10 ASCEND_SAFE_STEPS=30 make the second that many, at random moments; ASCEND_SAFE_SEED draws others.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import time
from pathlib import Path

import pytest
from killed_engine import OPTION, ROOT, STATES, TITLES, costs, job, processes

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3000)]

KILLS = int(os.environ.get("ASCEND_SAFE_KILLS", "2"))
STEPS = int(os.environ.get("ASCEND_SAFE_STEPS", "6"))
SEED = int(os.environ.get("ASCEND_SAFE_SEED", "1"))
SECONDS = 10 + 5 * os.getloadavg()[0]
"""In which a job must have ended: ten on a machine that does nothing else."""


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


LONG = pytest.mark.long
FORMS = [
    ("EngineCore", "generate", "v1"),
    ("worker", "sync", "legacy"),
    pytest.param("EngineCore", "generate", "legacy", marks=LONG),
    pytest.param("worker", "sync", "v1", marks=LONG),
]


OLDER = ("verl0.9.0-vllm0.23", "verl0.8.0-vllm0.18", "verl0.7.1-vllm0.11")


@pytest.mark.parametrize(("part", "state", "trainer"), FORMS)
def test_a_job_ends_with_one_sentence(tmp_path: Path, part: str, state: str, trainer: str) -> None:
    assert state in STATES and part in TITLES
    ends_with_one_sentence(tmp_path / "run", part, state, sys.executable, f"trainer.use_v1={trainer == 'v1'}")


@pytest.mark.long
@pytest.mark.parametrize("stack", OLDER)
def test_a_job_of_an_older_verl_ends_with_one_sentence(tmp_path: Path, stack: str) -> None:
    python = ROOT / f".venv-{stack}" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"the stack is not here: make .venv-{stack}/.ready")
    ends_with_one_sentence(tmp_path / "run", "EngineCore", "generate", str(python))


@pytest.mark.parametrize("title", ["AgentLoopWorkerTQ", pytest.param("RewardLoopWorker", marks=pytest.mark.long)])
def test_a_job_whose_prompts_nobody_runs_any_more_ends_with_one_sentence(tmp_path: Path, title: str) -> None:
    """As Ray kills such a worker where memory runs out; verl's V1 trainer then waits for ever."""
    lines = ends_soon(tmp_path / "run", title, "generate", sys.executable)
    assert re.match(rf"ascend_safe: {title} \(process \d+ on \S+\) of this job died, .*Worker exit type", lines[-1])


def ends_with_one_sentence(out: Path, part: str, state: str, python: str, *settings: str) -> None:
    lines = ends_soon(out, part, state, python, *settings)
    assert re.match(
        r"ascend_safe: The rollout engine of replica 0 died while it .*\(process \d+\).* are in /", lines[-1]
    )
    assert sum("died while it" in line and " ERROR:" in line for line in lines) == 1
    assert len(lines) < 3000


def ends_soon(out: Path, part: str, state: str, python: str, *settings: str) -> list[str]:
    """Kill a part of a job, which must end of it in time and leave no process; the lines that it printed."""
    with job(out, *settings, PYTHON=python, STEPS="4") as running:
        killed = running.kill(part, state, step=1)
        code = running.process.wait(timeout=120)
        seconds = time.time() - killed
        lines = running.log.read_text().splitlines()
        time.sleep(3)
        left = processes(running.out)
    print(f"\n{part} while {state}: exit code {code} after {seconds:.1f} s, {len(lines)} lines; {lines[-1]}")
    assert code == 1
    assert seconds < SECONDS
    assert not left
    return lines


@pytest.mark.long
def test_a_job_goes_on_with_an_engine_that_is_made_again(tmp_path: Path) -> None:
    source, before = random.Random(SEED), shared_memory()
    settings = [f"{OPTION}.on_engine_death=restart", f"{OPTION}.max_engine_restarts={KILLS}"]
    with job(tmp_path / "run", *settings, PYTHON=sys.executable, STEPS=str(STEPS)) as running:
        killed = running.kill_at_random(KILLS, STEPS, source)
        code = running.process.wait(timeout=900)
        metrics = running.metrics()
        lines = list(costs(killed, running.events()))
        time.sleep(3)
        left = processes(running.out)
        log = running.log.read_text()
    rewards = [step["critic/score/mean"] for step in metrics]
    pearson = [step["training/rollout_actor_probs_pearson_corr"] for step in metrics]
    print("", *lines, f"rewards {rewards}", f"Pearson {min(pearson)}", sep="\n")
    assert code == 0, log[-3000:]
    assert len(killed) == KILLS and len(metrics) == STEPS
    assert log.count("It is made again (") == KILLS
    assert metrics[-1]["perf/rollout_engine_restarts"] == KILLS
    assert rewards[-1] > rewards[0] + 0.1
    assert min(pearson) >= 0.99
    assert not left
    assert {name for name in shared_memory() - before if not name.startswith(("sem.", "psm_"))} == set()
    print(json.dumps({"left in /dev/shm, of all jobs": sorted(shared_memory() - before)}))


@pytest.mark.long
def test_of_two_replicas_the_other_goes_on(tmp_path: Path) -> None:
    settings = [f"{OPTION}.on_engine_death=restart", "actor_rollout_ref.rollout.tensor_model_parallel_size=1"]
    with job(tmp_path / "run", *settings, PYTHON=sys.executable, STEPS="4", DEVICES="2") as running:
        killed = running.kill("EngineCore", "generate", step=2)
        code = running.process.wait(timeout=900)
        metrics, events = running.metrics(), running.events()
        time.sleep(3)
        left = processes(running.out)
        log = running.log.read_text()
    assert code == 0, log[-3000:]
    (restart,) = (event for event in events if event["step"] == "restart")
    made = {event["pid"] for event in events if (event["step"], event["process"]) == ("decide", "server")}
    assert len(made) == 2 and restart["pid"] in made
    pearson = [step["training/rollout_actor_probs_pearson_corr"] for step in metrics]
    print(
        f"\n{restart['time'] - killed:.1f} s to an engine of replica {restart['detail']['replica']}; Pearson {pearson}"
    )
    assert len(metrics) == 4 and min(pearson) >= 0.99
    assert metrics[-1]["perf/rollout_engine_restarts"] == 1
    assert not left
