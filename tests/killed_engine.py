"""Kills a part of the rollout engine of a GRPO job that runs, in the state that is asked for."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from verl_ascend_rollout.transport.rendezvous import PREFIX

ROOT = Path(__file__).resolve().parents[1]
TITLES = {"EngineCore": "VLLM::EngineCore", "worker": "VLLM::Worker"}
STATES = ("generate", "asleep", "sync", "wake")
OPTION = "actor_rollout_ref.rollout.engine_kwargs.ascend_safe"


@dataclass
class Job:
    """The toy recipe as it runs; `log` is what its driver prints."""

    process: psutil.Popen
    out: Path
    log: Path

    def events(self) -> list[dict[str, Any]]:
        file = self.out / "events.jsonl"
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    def metrics(self) -> list[dict[str, float]]:
        """verl's, of each training step that has ended."""
        file = self.out / "metrics.jsonl"
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        entries = [json.loads(line)["data"] for line in lines if line.endswith(b"\n")]
        return [entry for entry in entries if "timing_s/step" in entry]

    def steps(self) -> int:
        return len(self.metrics())

    def count(self, step: str, process: str) -> int:
        return sum((event["step"], event["process"]) == (step, process) for event in self.events())

    def wait_for(self, condition: Callable[[], object], seconds: float = 400) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, f"not reached: {self.log.read_text()[-3000:]}"
            time.sleep(0.02)

    def part(self, name: str) -> psutil.Process:
        """`EngineCore`, `worker`, or what else a process's title has in it, as soon as there is one; the youngest."""
        found: list[psutil.Process] = []

        def look() -> list[psutil.Process]:
            for process in processes(self.out):
                with contextlib.suppress(psutil.Error):
                    if TITLES.get(name, name) in " ".join(process.cmdline()):
                        found.append(process)
            return found

        self.wait_for(look, seconds=60)
        return max(found, key=lambda process: process.create_time())

    def kill_at_random(self, kills: int, steps: int, source: random.Random) -> list[tuple[float, str]]:
        """Kill -9 EngineCore or a worker, once in each part of the job and at any moment of it; wait for each restart.

        Returns:
            When each was killed, and which.
        """
        killed: list[tuple[float, str]] = []
        for number in range(kills):
            step = 1 + number * (steps - 2) // kills
            self.wait_for(lambda step=step: self.steps() >= step, seconds=600)
            time.sleep(source.uniform(0, 4))
            part = source.choice(sorted(TITLES))
            self.part(part).kill()
            killed.append((time.time(), part))
            self.wait_for(lambda: self.count("restart", "server") == len(killed), seconds=600)
        return killed

    def kill(self, part: str, state: str, step: int = 1) -> float:
        """Kill -9 a part while the engine is in a state of a training step; the time of it."""
        worker = None
        if state == "generate":
            self.wait_for(lambda: self.count("init", "worker") >= step)
            time.sleep(0.3)
        elif state == "wake":
            # The sync is over; a worker that stands still keeps the wake-up from coming to an end.
            worker = self.part("worker")
            self.wait_for(lambda: self.count("sync", "worker") > step)
            worker.suspend()
            time.sleep(1.0)
        else:
            worker = self.part("worker") if self.count("free", "worker") else None
            self.wait_for(lambda: self.count("free", "worker") >= step)
            worker = self.part("worker")
            if state == "sync":
                worker.suspend()
                # The sender's socket has a name and no file.
                self.wait_for(lambda: f"@{PREFIX}" in Path("/proc/net/unix").read_text())
            time.sleep(0.5)
        self.part(part).send_signal(signal.SIGKILL)
        killed = time.time()
        if worker is not None and part != "worker":
            with contextlib.suppress(psutil.Error):
                worker.resume()
        return killed


def costs(killed: list[tuple[float, str]], events: list[dict[str, Any]]) -> Iterator[str]:
    """Say of each kill what it cost, by the event of the restart after it."""
    restarts = [event for event in events if event["step"] == "restart"]
    for (moment, part), event in zip(killed, restarts, strict=True):
        detail = event["detail"]
        yield (
            f"{part}: {event['time'] - moment:.1f} s to an engine ({detail['engine_seconds']:.1f} to make it, "
            f"{detail['weight_seconds']:.1f} for its weights); {detail['cause']}"
        )


@contextlib.contextmanager
def job(out: Path, *settings: str, **environment: str) -> Iterator[Job]:
    """Start the toy recipe's run.sh; kill what is left of it at the end."""
    out.mkdir(parents=True, exist_ok=True)
    log = out / "train.log"
    with log.open("wb") as target:
        process = psutil.Popen(
            ["bash", str(ROOT / "recipes" / "grpo_tiny_cpu" / "run.sh"), *settings],
            env={**os.environ, "OUT": str(out), **environment},
            stdout=target,
            stderr=subprocess.STDOUT,
            cwd=out,
        )
    try:
        yield Job(process, out, log)
    finally:
        for left in processes(out):
            with contextlib.suppress(psutil.Error):
                left.kill()
        process.wait()


def processes(out: Path) -> list[psutil.Process]:
    """All processes of the job that writes to `out`, whoever their parent is by now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("OUT") == str(out) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
