"""The other ends of the weight transport in processes of their own: a receiver and a sender that do as they are told.

They are forked from a server that has imported torch, of which each would take seconds otherwise.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
import zlib
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch", "verl_ascend_rollout.transport.receiver", "verl_ascend_rollout.transport.sender"]
)

Say = Callable[..., None]


class Peer:
    """One such process, seen from a test: `receive` or `send`."""

    def __init__(self, role: str) -> None:
        self._connection, theirs = FORKS.Pipe()
        self.process = FORKS.Process(target=serve, args=(role, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.is_ready = False
        self.is_at_rest = True

    def ask(self, **what: Any) -> None:
        """Start something, as soon as the process has imported what it needs: no time-out is to count that.  `line`
        has what comes of it."""
        self._wait_until_ready()
        self.is_at_rest = False
        self._connection.send(what)

    def line(self) -> Any:
        """The next that the process says; `None` when it has ended."""
        self._wait_until_ready()
        try:
            answer = self._connection.recv()
        except EOFError:
            return None
        self.is_at_rest = bool({"tensors", "sent", "error"} & set(answer))
        return answer

    def _wait_until_ready(self) -> None:
        if not self.is_ready:
            assert self._connection.recv() == {"ready": True}
            self.is_ready = True

    def kill(self) -> None:
        self.process.kill()
        self.process.join(30)
        assert not self.process.is_alive()

    def close(self) -> None:
        self.kill()
        self._connection.close()


def receive(task: dict[str, Any], say: Say) -> None:
    """Receive one sync; say each tensor with its bytes if `contents`, else with their crc32.

    Stops for ever after bucket `stand_still`, and raises after bucket `fail`.
    """
    import torch

    from verl_ascend_rollout.transport.receiver import receive_weights

    found = []
    buckets = 0

    def load(tensors: list[tuple[str, torch.Tensor]]) -> None:
        nonlocal buckets
        buckets += 1
        for name, tensor in tensors:
            flat = tensor.contiguous().view(-1).view(torch.uint8)
            contents = flat.numpy().tobytes().hex() if task.get("contents") else zlib.crc32(flat.numpy().data)
            found.append([name, str(tensor.dtype), list(tensor.shape), contents])
        if task.get("stand_still") == buckets:
            say(standing_still=True)
            time.sleep(600)
        if task.get("fail") == buckets:
            raise ValueError("the model has no such layer")

    try:
        summary = receive_weights(
            task["name"], load, rank=task.get("rank", 0), copy=task.get("copy", True), timeout=task.get("timeout", 60)
        )
    except Exception as error:
        say(error=str(error), kind=type(error).__name__)
        return
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    say(tensors=found, buckets=buckets, bytes=summary.bytes, checksum=summary.checksum, peak=peak)


def send(task: dict[str, Any], say: Say) -> None:
    """Send `count` tensors of `size` bytes, all of whose bytes are their number; stop for ever after `stand_still`."""
    import torch

    from verl_ascend_rollout.transport.sender import WeightSender

    try:
        if task.get("limit_file_size"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (task["limit_file_size"], resource.RLIM_INFINITY))
        with WeightSender(
            receivers=task.get("receivers", 1), bucket_bytes=task["bucket_bytes"], timeout=60, name=task.get("name")
        ) as sender:
            say(name=sender.name)
            sender.connect()
            for number in range(task["count"]):
                if task.get("stand_still") == number:
                    say(standing_still=True)
                    time.sleep(600)
                sender.send(f"weight.{number}", torch.full((task["size"],), number % 256, dtype=torch.uint8))
            say(sent=sender.finish().tensors)
    except Exception as error:
        say(error=str(error), kind=type(error).__name__)


def serve(role: str, connection: Connection) -> None:
    """Do what is asked, one after the other."""
    import torch

    import verl_ascend_rollout.transport.receiver
    import verl_ascend_rollout.transport.sender  # noqa: F401

    def say(**what: Any) -> None:
        connection.send(what)

    torch.set_num_threads(1)
    say(ready=True)
    while True:
        {"receive": receive, "send": send}[role](connection.recv(), say)
