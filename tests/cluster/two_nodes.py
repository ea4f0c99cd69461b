"""Two Ray nodes on one machine: each in network, mount, process and host-name namespaces of its own.

    with two_nodes(folder) as (head, other):
        job = head.submit(["recipes/grpo_tiny_cpu/run.sh", "trainer.nnodes=2"], {"GLOO_SOCKET_IFNAME": "eth0"})

The nodes see the same files, `/tmp` among them, as containers with one volume for it do: what has a name in a folder
must have the node in it.  `/dev/shm` is each node's own.  Nothing is left when the `with` ends: the first process of a
process namespace takes all others with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INTERFACE = "eth0"
PORT = 6390
START_SECONDS = 120

# What is done in a namespace before it is a node.  The default route goes nowhere: Ray asks the kernel for one to learn
# its own address.
_INSIDE = """
mount -t tmpfs -o size=6g tmpfs /dev/shm
hostname {name}
ip link set lo up
echo ready
# Bash, since the first process of a node has to reap its orphans.
read -r _ || true
"""
_NETWORK = "ip addr add {address}/24 dev {interface}; ip link set {interface} up; ip route add default via {other}"


def why_not() -> str | None:
    """Return why no two nodes can be made here; `None` where they can."""
    missing = [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]
    if missing:
        return f"two nodes on one machine take {', '.join(missing)} (iproute2, util-linux)"
    if subprocess.run(["unshare", "-m", "-n", "-p", "-u", "-f", "true"], capture_output=True).returncode:
        return "two nodes on one machine take namespaces, which only root may make"
    return None


@dataclass(frozen=True)
class Job:
    """How a submitted job ended: its exit code as Ray has it (1 for any failure), what it printed, its seconds."""

    code: int
    output: str
    seconds: float


@dataclass(frozen=True)
class Node:
    """A node.

    Attributes:
        name: its host name.
        address: its IP address.
        process: the id, on this machine, of the first process of its namespaces.
        environ: of every process on it.
    """

    name: str
    address: str
    process: int
    environ: Mapping[str, str]

    def command(self, *words: str) -> list[str]:
        """Return the command that runs `words` on this node."""
        return ["nsenter", "-t", str(self.process), "-m", "-n", "-p", "-u", *words]

    def popen(self, *words: str, log: Path) -> subprocess.Popen[bytes]:
        """Start a command on this node; what it prints goes to `log`."""
        with log.open("ab") as file:
            return subprocess.Popen(
                self.command(*words), stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=self.environ, cwd=ROOT
            )

    def run(self, *words: str, timeout: float = START_SECONDS) -> str:
        """Run a command on this node; what it printed.

        Raises:
            RuntimeError: it failed, with the end of what it printed.
        """
        done = subprocess.run(
            self.command(*words),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=self.environ,
            cwd=ROOT,
            timeout=timeout,
        )
        if done.returncode:
            raise RuntimeError(
                f"{words} on {self.name}: exit status {done.returncode}: {done.stdout[-2000:]}{done.stderr}"
            )
        return done.stdout

    def submit_command(self, words: Sequence[str], env_vars: Mapping[str, str]) -> list[str]:
        """Return the command that submits a job from this node, the head."""
        return [
            *(ray(), "job", "submit", "--address", "http://127.0.0.1:8265"),
            *("--runtime-env-json", json.dumps({"env_vars": dict(env_vars)}), "--", *words),
        ]

    def submit(self, words: Sequence[str], env_vars: Mapping[str, str], log: Path, timeout: float = 900) -> Job:
        """Submit a job from this node, the head, and wait for its end.

        Raises:
            TimeoutExpired: it did not end.
        """
        started = time.monotonic()
        with self.popen(*self.submit_command(words, env_vars), log=log) as process:
            try:
                code = process.wait(timeout)
            finally:
                process.kill()
        return Job(code, log.read_text(errors="replace"), time.monotonic() - started)

    def die(self) -> None:
        """End the node at once, as a power cut does: no connection is closed."""
        self.run("ip", "link", "set", INTERFACE, "down")
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process, 9)

    def processes(self) -> list[str]:
        """Return the command lines of what runs on this node, beside its first process and what looks."""
        lines = self.run("ps", "-e", "-o", "pid=,args=").splitlines()
        found = [line.split(None, 1) for line in lines]
        return [words for number, words in found if number != "1" and not words.startswith("ps ")]


def ray() -> str:
    """Return the `ray` of the environment that runs this."""
    return str(Path(sys.executable).with_name("ray"))


@contextlib.contextmanager
def two_nodes(
    folder: Path,
    *,
    devices: int = 1,
    cpus: int = 16,
    resource: str = "GPU",
    environ: Mapping[str, str] | None = None,
) -> Iterator[tuple[Node, Node]]:
    """Make two nodes and start Ray on both; the first is the head, and has the job server.

    Args:
        folder: for Ray's own files; its path must be short (a socket's address has room for 107 bytes).
        devices: how many of `resource` each node has; slots, where there is no device.
        cpus: how many CPUs Ray takes each for.
        resource: what Ray calls a device: `GPU` or `NPU`.
        environ: more variables for every process on both.
    """
    # A GPU has an option of its own, and is no resource for `--resources`.
    has = [f"--num-cpus={cpus}"]
    has += (
        [f"--num-gpus={devices}"] if resource == "GPU" else ["--num-gpus=0", f'--resources={{"{resource}": {devices}}}']
    )
    with bare_nodes(environ) as (head, other):
        dashboard = ["--dashboard-host=127.0.0.1", "--dashboard-port=8265"]
        for node, words in ((head, ["--head", f"--port={PORT}", *dashboard, f"--temp-dir={folder}"]), (other, [])):
            words = words or [f"--address={head.address}:{PORT}"]
            node.run(ray(), "start", *words, f"--node-ip-address={node.address}", *has, "--disable-usage-stats")
        yield head, other


@contextlib.contextmanager
def bare_nodes(environ: Mapping[str, str] | None = None) -> Iterator[tuple[Node, Node]]:
    """Make two nodes, 10.9.0.1 and 10.9.0.2, without Ray.

    Args:
        environ: more variables for every process on both.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_"))}
    shared = {
        **inherited,
        # A token that some earlier `ray.init` left in the home folder switches authentication on for a cluster, and not
        # for those who come to it (ray 2.60).
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_worker_prestart": "false",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **(environ or {}),
    }
    with contextlib.ExitStack() as stack:
        one, other = [stack.enter_context(_node(f"node{number}", f"10.9.0.{number}", shared)) for number in (1, 2)]
        _connect(one, other)
        yield one, other


@contextlib.contextmanager
def _node(name: str, address: str, environ: Mapping[str, str]) -> Iterator[Node]:
    inside = ["bash", "-euc", _INSIDE.format(name=name)]
    with subprocess.Popen(
        ["unshare", "--mount", "--net", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc", *inside],
        # Its end is the node's, also where this process is killed.
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as outer:
        try:
            assert outer.stdout is not None
            if outer.stdout.readline() != "ready\n":
                raise RuntimeError(f"the namespaces of {name} could not be made")
            (process,) = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
            yield Node(name, address, int(process), environ)
        finally:
            outer.kill()


def _connect(one: Node, other: Node) -> None:
    """Join two nodes by a cable: a veth pair whose ends have the same name in both."""
    names = [f"as{one.process}", f"as{other.process}"]
    subprocess.run(["ip", "link", "add", names[0], "type", "veth", "peer", "name", names[1]], check=True)
    for node, name in zip((one, other), names, strict=True):
        subprocess.run(["ip", "link", "set", name, "netns", str(node.process), "name", INTERFACE], check=True)
    for node, peer in ((one, other), (other, one)):
        node.run("bash", "-euc", _NETWORK.format(address=node.address, other=peer.address, interface=INTERFACE))
