"""A real Ray cluster of three nodes on this machine, asked as the driver of a job asks it before anything is placed."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from verl_ascend_rollout import __version__
from verl_ascend_rollout.integration import cluster
from verl_ascend_rollout.integration.cluster import Joined, Node
from verl_ascend_rollout.platforms.base import installed_versions
from verl_ascend_rollout.policy.conflicts import Pool

pytestmark = pytest.mark.e2e

HIDES_US = """
import importlib.util, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'verl_ascend_rollout':
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == 'verl_ascend_rollout' else found(name, package)
"""
"""What a node without our package is like to Python."""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, ...]]:
    """A head without an accelerator, a node with two slots, and one with one where our package is not installed."""
    from ray.cluster_utils import Cluster

    hidden = tmp_path_factory.mktemp("hidden")
    (hidden / "sitecustomize.py").write_text(HIDES_US, encoding="utf-8")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        made.add_node(num_cpus=6, num_gpus=2)
        made.add_node(num_cpus=3, num_gpus=1, env_vars={"PYTHONPATH": str(hidden)})
        yield cluster.ask(Joined("the Ray cluster of this test", made.address))
    finally:
        made.shutdown()


def test_each_node_says_what_it_has(nodes: tuple[Node, ...]) -> None:
    by_slots = {node.has("GPU"): node for node in nodes}
    assert sorted((node.has("GPU"), node.has("CPU")) for node in nodes) == [(0, 2), (1, 3), (2, 6)]
    assert [node.error for node in nodes] == [None] * 3
    for slots in (0, 2):
        answer = by_slots[slots].answer
        assert (answer["plugin"], answer["loaded"]) == (__version__, True)
        assert answer["versions"]["verl"] == importlib.metadata.version("verl")
        assert Path(answer["python"]).exists()
    assert by_slots[1].answer["plugin"] is None


def test_the_driver_of_a_job_is_told(nodes: tuple[Node, ...]) -> None:
    (missing,) = cluster.installations(nodes, installed_versions(), "GPU")
    assert f"has no verl_ascend_rollout in the Python that Ray runs there ({sys.executable})" in missing
    joined = Joined("the Ray cluster of this test", None)
    assert list(cluster.placement(joined, nodes, [Pool("good", 2, 1), Pool("small", 1, 1)], "GPU")) == []
    (refused,) = cluster.placement(joined, nodes, [Pool("large", 3, 1)], "GPU")
    assert "has room for 0" in refused and "has 2 GPU and 6 CPUs" in refused
    (together,) = cluster.placement(joined, nodes, [Pool("good", 2, 1), Pool("small", 1, 2)], "GPU")
    assert together.startswith("verl asks Ray for 4 GPU in all (good; small), and the Ray cluster of this test has 3 (")


def test_a_cluster_that_is_not_there_is_one_sentence() -> None:
    with pytest.raises(cluster.ClusterError, match=r"^a cluster that is gone cannot be joined \(.*\): see whether it"):
        cluster.ask(Joined("a cluster that is gone", "127.0.0.1:1"))


def test_a_cluster_that_asks_for_a_token_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"]
    folder = tempfile.mkdtemp()  # pytest's is too long for Ray's sockets
    head = subprocess.Popen(
        [*command, "--num-cpus=1", "--include-dashboard=false", "--disable-usage-stats"],
        env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 32, "RAY_TMPDIR": folder},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert head.stdout is not None
        assert any("Ray runtime started" in line for line in head.stdout)
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        with pytest.raises(cluster.ClusterError, match=r"^a cluster asks for a token, and this process has none or an"):
            cluster.ask(Joined("a cluster", f"127.0.0.1:{port}"))
    finally:
        head.terminate()  # with --block it ends all that it has started
        head.communicate(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)
