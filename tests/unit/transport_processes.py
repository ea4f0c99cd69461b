"""The other ends of the weight transport in processes of their own: a receiver and a sender that do as they are told.

    python transport_processes.py receive | send

reads a line of JSON from standard input for each sync, and writes one with what came of it.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Peer:
    """One such process, seen from a test."""

    def __init__(self, role: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, role],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        )
        self.is_ready = False
        self.is_at_rest = True

    def ask(self, **what: Any) -> None:
        """Start something, as soon as the process has imported what it needs: no time-out is to count that.  `line`
        has what comes of it."""
        assert self.process.stdin is not None
        self._wait_until_ready()
        self.is_at_rest = False
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()

    def line(self) -> Any:
        """The next line that the process writes; `None` when it has ended."""
        assert self.process.stdout is not None
        self._wait_until_ready()
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {}
        self.is_at_rest = bool({"tensors", "sent", "error"} & set(answer))
        return answer or None

    def _wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        if not self.is_ready:
            assert json.loads(self.process.stdout.readline()) == {"ready": True}
            self.is_ready = True

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=30)

    def close(self) -> None:
        self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def receive(task: dict[str, Any]) -> None:
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
            task["folder"], load, rank=task.get("rank", 0), copy=task.get("copy", True), timeout=task.get("timeout", 60)
        )
    except Exception as error:
        say(error=str(error), kind=type(error).__name__)
        return
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    say(tensors=found, buckets=buckets, bytes=summary.bytes, checksum=summary.checksum, peak=peak)


def send(task: dict[str, Any]) -> None:
    """Send `count` tensors of `size` bytes, all of whose bytes are their number; stop for ever after `stand_still`."""
    import torch

    from verl_ascend_rollout.transport.sender import WeightSender

    try:
        if task.get("limit_file_size"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (task["limit_file_size"], resource.RLIM_INFINITY))
        with WeightSender(
            receivers=task.get("receivers", 1), bucket_bytes=task["bucket_bytes"], timeout=60, base=task.get("base")
        ) as sender:
            say(folder=sender.folder)
            sender.connect()
            for number in range(task["count"]):
                if task.get("stand_still") == number:
                    say(standing_still=True)
                    time.sleep(600)
                sender.send(f"weight.{number}", torch.full((task["size"],), number % 256, dtype=torch.uint8))
            say(sent=sender.finish().tensors)
    except Exception as error:
        say(error=str(error), kind=type(error).__name__)


def main() -> None:
    # Imported before the first task, so that no time-out counts it.
    import torch

    import verl_ascend_rollout.transport.receiver
    import verl_ascend_rollout.transport.sender  # noqa: F401

    torch.set_num_threads(1)
    say(ready=True)
    do = {"receive": receive, "send": send}[sys.argv[1]]
    for line in sys.stdin:
        do(json.loads(line))


if __name__ == "__main__":
    main()
