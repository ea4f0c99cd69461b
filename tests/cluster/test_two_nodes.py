"""GRPO on two Ray nodes, submitted as a job: `make cluster`.  Minutes each.

The nodes share `/tmp`, which verl's own socket names do not stand (see `two_nodes`).
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from two_nodes import INTERFACE, ROOT, Job, Node, two_nodes, why_not

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

STEPS = 3
# A running cluster takes no numbers of `ray.init`, and 32 samples a rank cannot be cut into micro-batches of 64.
SETTINGS = [
    "ray_kwargs.ray_init.num_cpus=null",
    "ray_kwargs.ray_init.num_gpus=null",
    "trainer.nnodes=2",
    "trainer.n_gpus_per_node=1",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16",
]
PEARSON = "training/rollout_actor_probs_pearson_corr"


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[Node, Node]]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    # Short, for the sockets of Ray; pytest's own folders are too long.
    with tempfile.TemporaryDirectory(prefix="two_nodes_") as folder, two_nodes(Path(folder)) as made:
        yield made


@pytest.fixture
def train(nodes: tuple[Node, Node], tmp_path: Path) -> Callable[..., tuple[Job, list[dict[str, Any]], list[Any]]]:
    """Run the toy recipe as a job: how it ended, verl's metrics of each step, and our events."""

    def run(*settings: str, steps: int = STEPS, out: str = "out") -> tuple[Job, list[dict[str, Any]], list[Any]]:
        words = [str(ROOT / "recipes" / "grpo_tiny_cpu" / "run.sh"), *SETTINGS, *settings]
        environ = {
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "OUT": str(tmp_path / out),
            "STEPS": str(steps),
            "PYTHON": sys.executable,
        }
        job = nodes[0].submit(words, environ, tmp_path / "job.log")
        print(job.output[-4000:])
        return job, steps_of(tmp_path / out), lines(tmp_path / out / "events.jsonl")

    return run


def lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def steps_of(folder: Path) -> list[dict[str, Any]]:
    entries = [line["data"] for line in lines(folder / "metrics.jsonl")]
    return [entry for entry in entries if "timing_s/step" in entry]


def left_behind(node: Node) -> list[str]:
    """What a job of ours could leave on a node: memory, and processes of an engine."""
    shm = node.run("ls", "/dev/shm").split()
    found = [name for name in shm if name.startswith(("ascend_safe", "verl_weights", "psm_"))]
    return found + [words for words in node.processes() if "VLLM::" in words and "<defunct>" not in words]


def check(job: Job, steps: list[dict[str, Any]], nodes: tuple[Node, Node]) -> None:
    assert job.code == 0
    assert len(steps) == STEPS
    assert min(step[PEARSON] for step in steps) >= 0.999
    assert steps[-1]["critic/score/mean"] > steps[0]["critic/score/mean"]
    assert [left_behind(node) for node in nodes] == [[], []]


def note(record: Callable[[str, object], None], what: str, job: Job, steps: list[dict[str, Any]], syncs: int) -> None:
    rewards = " ".join(f"{step['critic/score/mean']:.3f}" for step in steps)
    pearson = min(step[PEARSON] for step in steps)
    line = f"{what}: reward {rewards}, Pearson at least {pearson:.5f}, {syncs} syncs, {job.seconds:.0f} s"
    record("measured", line)
    print(line)


def worker_syncs(events: list[Any]) -> list[Any]:
    return [event for event in events if (event["step"], event["process"]) == ("sync", "worker")]


def test_one_engine_over_both_nodes(
    nodes: tuple[Node, Node], train: Callable[..., Any], record_property: Callable[[str, object], None]
) -> None:
    """TP 2: each node's trainer sends to the engine's worker there."""
    job, steps, events = train("actor_rollout_ref.rollout.tensor_model_parallel_size=2")
    check(job, steps, nodes)
    syncs = worker_syncs(events)
    note(record_property, "one engine, TP 2, over both nodes", job, steps, len(syncs))
    assert len(syncs) == 2 * (STEPS + 1)
    # By our transport, on both nodes: verl's takes no checksums.
    senders = [event["detail"] for event in events if (event["step"], event["process"]) == ("sync", "trainer")]
    assert sorted({detail["rank"] for detail in senders if detail.get("tensors")}) == [0, 1]
    assert sum(detail.get("checksum") is not None for detail in senders) == 2


def test_two_replicas_then_a_node_dies(
    nodes: tuple[Node, Node],
    train: Callable[..., Any],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """A replica of one worker on each node; in a second job, last, one node goes: the job ends, with its name."""
    job, steps, events = train()
    check(job, steps, nodes)
    syncs = worker_syncs(events)
    note(record_property, "two replicas of one worker", job, steps, len(syncs))
    assert len(syncs) == 2 * (STEPS + 1)

    died: list[float] = []

    def die_in_the_second_step() -> None:
        while not steps_of(tmp_path / "dies"):
            time.sleep(0.5)
        died.append(time.monotonic())
        nodes[1].die()

    threading.Thread(target=die_in_the_second_step, daemon=True).start()
    job, _, _ = train(steps=200, out="dies")
    seconds = time.monotonic() - died[0]
    record_property("measured", f"a node died: the job ended {seconds:.0f} s later")
    print(f"the job ended {seconds:.0f} s after the node's death")
    assert job.code != 0
    # Ray's health checks have to miss it several times.
    assert seconds < 180
    assert nodes[1].address in job.output
