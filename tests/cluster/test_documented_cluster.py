"""docs/cluster.md, followed line by line: its `ray start` on a head without devices and on a node with one, and its
`ray job submit`.  What differs is said in `INSTEAD`."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import pytest
from two_nodes import INTERFACE, ROOT, bare_nodes, why_not

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

PAGE = (ROOT / "docs" / "cluster.md").read_text()
STEPS = 2
INSTEAD = {
    "/shared/verl_ascend_rollout": str(ROOT),
    '"STEPS": "12"': f'"STEPS": "{STEPS}"',
    # One of the two nodes is the head, which has no device.
    "trainer.nnodes=2": "trainer.nnodes=1",
    '"eth0"': f'"{INTERFACE}"',
}
# Ray counts cores and NPUs, and this machine may have two of those and none of these.
CPUS, DEVICE = " --num-cpus=16", " --num-gpus=1"


def commands(start: str) -> list[str]:
    """Return the page's commands that start so, each on one line."""
    blocks = re.sub(r"\\\n\s+", "", PAGE)
    return [line.strip() for line in blocks.splitlines() if re.match(rf"    {re.escape(start)}", line)]


def test_the_page_starts_a_cluster_and_a_job_on_it(tmp_path: Path) -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    (head_start,) = commands("ray start --head")
    (node_start,) = commands("ray start --address")
    (submit,) = commands("ray job submit")
    assert "--num-gpus=0" in head_start
    for words, ours in {**INSTEAD, "/shared/run1": str(tmp_path)}.items():
        assert words in submit
        submit = submit.replace(words, ours)
    with (
        tempfile.TemporaryDirectory(prefix="page_") as folder,
        bare_nodes({"RAY_TMPDIR": folder}) as (head, node),
    ):
        head.run("bash", "-c", head_start + CPUS)
        node.run("bash", "-c", node_start + CPUS + DEVICE)
        log = tmp_path / "job.log"
        with head.popen("bash", "-c", submit, log=log) as job:
            code = job.wait(900)
        assert code == 0, log.read_text()[-4000:]
        left = [words for words in node.processes() if "VLLM::" in words and "<defunct>" not in words]
    assert left == []
    metrics = [json.loads(line)["data"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    pearson = [data["training/rollout_actor_probs_pearson_corr"] for data in metrics if "timing_s/step" in data]
    assert len(pearson) == STEPS
    assert min(pearson) >= 0.999
    hosts = {json.loads(line)["host"] for line in (tmp_path / "events.jsonl").read_text().splitlines()}
    assert "node2" in hosts
