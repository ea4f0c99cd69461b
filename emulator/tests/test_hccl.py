"""torch.distributed with backend "hccl" over the stand-in: real torch-npu, one process per rank, 1 to 8 ranks.

See hccl_ranks.py for what each case asserts.  Starting a rank (torch, torch-npu) takes seconds and a case milliseconds,
so all cases of one number of ranks run in one job.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

RANKS = Path(__file__).with_name("hccl_ranks.py")
CASES = (
    "all_reduce",
    "all_reduce_rounds_16_bit_floats_once",
    "larger_than_the_staging_area",
    "broadcast",
    "reduce",
    "all_gather",
    "all_gather_of_different_lengths",
    "reduce_scatter",
    "scatter",
    "all_to_all",
    "all_to_all_uneven",
    "send_before_receive",
    "batch_isend_irecv",
    "barrier_and_objects",
    "sub_groups",
    "pyhccl",
    "fsdp2",
)
SECONDS = 540  # eight ranks import torch on whatever cores there are


@dataclass(frozen=True)
class Ended:
    """How one rank ended."""

    exit_status: int
    results: dict[str, str]  # case: "ok" or a traceback; empty when it did not come that far
    errors: str


def segments() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("fake_cann-hccl-")}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def environment(rank: int, world: int, port: int, settings: dict[str, str]) -> dict[str, str]:
    plain = {
        name: value for name, value in os.environ.items() if not name.startswith(("FAKE_CANN_", "ASCEND_", "HCCL_"))
    }
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    texts = {name: str(value) for name, value in place.items()}
    run = {"FAKE_CANN_RUN": f"port{port}", "FAKE_CANN_DEVICES": str(world), "OMP_NUM_THREADS": "1"}
    return {**plain, **texts, **run, **settings}


def job(world: int, cases: tuple[str, ...], seed: int, folder: Path, **settings: str) -> list[Ended]:
    """Runs the cases on `world` ranks; how each rank ended, in the order of ranks."""
    port = free_port()
    command = [sys.executable, str(RANKS), ",".join(cases), str(seed)]
    name = uuid.uuid4().hex
    files = [(folder / f"{name}.{rank}.out", folder / f"{name}.{rank}.err") for rank in range(world)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, (out, err) in enumerate(files):
            with out.open("wb") as stdout, err.open("wb") as stderr:
                variables = environment(rank, world, port, settings)
                processes.append(subprocess.Popen(command, env=variables, stdout=stdout, stderr=stderr))
        deadline = time.monotonic() + SECONDS
        for process in processes:
            process.wait(timeout=max(1.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    ended = []
    for process, (out, err) in zip(processes, files, strict=True):
        lines = [line for line in out.read_text().splitlines() if line.startswith("RESULTS ")]
        results = json.loads(lines[0].removeprefix("RESULTS ")) if lines else {}
        ended.append(Ended(process.returncode, results, err.read_text()[-4000:]))
    return ended


@pytest.fixture(autouse=True, scope="module")
def nothing_stays_behind() -> Iterator[None]:
    """After all jobs, one of whose ranks is killed, /dev/shm holds no segment that was not there before."""
    before = segments()
    yield
    assert segments() <= before


@pytest.fixture(scope="module")
def seed() -> int:
    """FAKE_CANN_TEST_SEED repeats a run."""
    chosen = int(os.environ.get("FAKE_CANN_TEST_SEED", random.SystemRandom().randrange(10**6)))
    print(f"\nFAKE_CANN_TEST_SEED={chosen}")
    return chosen


def all_ok(ended: list[Ended], cases: tuple[str, ...], seed: int) -> None:
    problems = [
        f"rank {rank}, {case}, FAKE_CANN_TEST_SEED={seed}: {end.results.get(case, end.errors)}"
        for rank, end in enumerate(ended)
        for case in cases
        if end.results.get(case) != "ok"
    ]
    assert not problems, "\n".join(problems)
    assert [end.exit_status for end in ended] == [0] * len(ended), [end.errors for end in ended]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_collective(world: int, seed: int, tmp_path: Path) -> None:
    all_ok(job(world, CASES, seed, tmp_path), CASES, seed)


def test_eight_ranks(seed: int, tmp_path: Path) -> None:
    cases = ("all_reduce_rounds_16_bit_floats_once", "all_to_all_uneven", "send_before_receive", "sub_groups")
    all_ok(job(8, cases, seed, tmp_path), cases, seed)


def test_delayed_streams(seed: int, tmp_path: Path) -> None:
    """A collective waits for the stream that it is launched on, also when streams stand still until they must go on."""
    cases = tuple(case for case in CASES if case != "pyhccl")
    all_ok(job(2, cases, seed, tmp_path, FAKE_CANN_ASYNC="1"), cases, seed)


def test_a_killed_rank_is_an_error_on_the_others(seed: int, tmp_path: Path) -> None:
    ended = job(3, ("killed_rank",), seed, tmp_path)
    assert ended[2].exit_status == -9, ended[2].errors
    for end in ended[:2]:
        assert end.results == {"killed_rank": "ok"}, end
        assert re.search(r"in AllReduce: rank 2 \(process \d+\) has ended", end.errors), end.errors


def test_a_rank_that_never_comes_ends_the_wait(seed: int, tmp_path: Path) -> None:
    ended = job(2, ("late_rank",), seed, tmp_path, FAKE_CANN_TIMEOUT_S="3", HCCL_CONNECT_TIMEOUT="300")
    assert [end.results for end in ended] == [{"late_rank": "ok"}] * 2, ended
    assert "in AllReduce: rank 1 did not come within 3 s" in ended[0].errors, ended[0].errors


def test_ranks_that_call_different_things_are_told(seed: int, tmp_path: Path) -> None:
    ended = job(2, ("different_calls",), seed, tmp_path)
    assert [end.results for end in ended] == [{"different_calls": "ok"}] * 2, ended
    assert "count 10, but rank 1 is in AllReduce" in ended[0].errors, ended[0].errors
