"""Every order of calls, with requests in flight, many times over: no wrong token, no hang, and no memory that stays.

ASCEND_SAFE_CYCLES=1000 makes the cycles that many (100 else), ASCEND_SAFE_SEED=... tries one more order of calls.
"""

from __future__ import annotations

import contextlib
import os
import resource
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import rollout_server

from verl_ascend_rollout import events

pytestmark = pytest.mark.engine

CYCLES = int(os.environ.get("ASCEND_SAFE_CYCLES", "100"))
SEEDS = [1, 2, 3, *([int(os.environ["ASCEND_SAFE_SEED"])] if "ASCEND_SAFE_SEED" in os.environ else [])]

IN_FLIGHT = 64
TOKENS = 40
SECONDS = 120
"""In which everything must have come to an end; on two cores under load it takes a tenth of that."""


@pytest.fixture(scope="module", autouse=True)
def synced(server: Any, checkpoints: Any) -> None:
    server.sync(checkpoints[0].tensors())


@pytest.fixture(autouse=True)
def awake(server: Any) -> Iterator[None]:
    """Whatever a test did, the next one finds the engine awake."""
    yield
    server.call("wake_up")
    server.call("resume_generation")
    assert server.call("explain")["state"] == "awake"


def state(server: Any) -> str:
    return str(server.call("explain")["state"])


def kv_bytes(server: Any) -> int:
    (memory,) = server.call("memory")
    return int(memory["kv_bytes"])


# --- order ------------------------------------------------------------------------------------------------------------


def test_the_states_by_their_calls(server: Any) -> None:
    expected = server.answers()
    for method, arguments, then in rollout_server.ORDERS:
        server.call(method, *arguments)
        assert state(server) == then, method
        assert (kv_bytes(server) > 0) == (then == "awake"), method
    assert server.answers() == expected


def test_resuming_generation_while_asleep_does_not_run_on_memory_that_is_away(server: Any) -> None:
    expected = ray.get(server.start(range(10, 60), "reference"), timeout=SECONDS)
    server.call("abort_all_requests")
    server.call("sleep")
    server.call("resume_generation")
    waiting = server.start(range(10, 60), "while-asleep-and-resumed")
    assert ray.wait([waiting], timeout=2)[0] == []
    server.call("wake_up", ["kv_cache"])
    assert list(ray.get(waiting, timeout=SECONDS).token_ids) == list(expected.token_ids)


def test_an_abort_outlasts_a_wake_up_until_generation_is_resumed(server: Any) -> None:
    server.call("abort_all_requests")
    server.call("sleep")
    server.call("wake_up", ["weights"])
    server.call("wake_up", ["kv_cache"])
    waiting = server.start(range(10, 60), "aborted-and-awake")
    assert ray.wait([waiting], timeout=2)[0] == []
    server.call("resume_generation")
    assert ray.get(waiting, timeout=SECONDS).stop_reason == "completed"


def test_a_server_that_leaves_the_rotation_turns_requests_away_also_while_asleep(server: Any) -> None:
    server.call("sleep")
    waiting = server.start(range(10, 60), "waits-when-turned-away")
    assert ray.wait([waiting], timeout=1)[0] == []
    server.call("abort_all_requests", reject_request=True)
    assert ray.get(waiting, timeout=SECONDS).stop_reason == "aborted"
    assert ray.get(server.start(range(10, 60), "turned-away"), timeout=SECONDS).stop_reason == "aborted"


def test_too_little_memory_is_said_and_generation_refused_until_an_init_passes(server: Any) -> None:
    expected = server.answers()
    server.call("sleep")
    (memory,) = server.call("memory")
    worker = psutil.Process(memory["pid"])
    waiting = server.start(range(10, 60), "waits-for-memory")
    with limited_memory(worker, 256 << 20):
        numbers = (
            r"it takes 1\.00 GiB, and .* are available .*allocate 536870912 bytes.*; lower .*gpu_memory_utilization"
        )
        with pytest.raises(Exception, match=numbers):
            server.call("wake_up", ["kv_cache"])
        assert state(server) == "dirty"
        assert kv_bytes(server) == 0
        with pytest.raises(Exception, match=r"refuses to generate: init failed: .*it takes 1\.00 GiB"):
            ray.get(waiting, timeout=SECONDS)
        with pytest.raises(Exception, match="refuses to generate"):
            server.answers()
    server.call("wake_up", ["kv_cache"])
    assert server.answers() == expected


@contextlib.contextmanager
def limited_memory(process: psutil.Process, more: int) -> Iterator[None]:
    """Let a process have `more` bytes of address space than it has, and no more."""
    before = resource.prlimit(process.pid, resource.RLIMIT_AS)
    resource.prlimit(process.pid, resource.RLIMIT_AS, (process.memory_info().vms + more, before[1]))
    try:
        yield
    finally:
        resource.prlimit(process.pid, resource.RLIMIT_AS, before)


def test_an_abort_is_an_event(server: Any, events_file: Path) -> None:
    running = [server.start(range(5, 25), f"abort-event-{number}", max_tokens=150) for number in range(4)]
    time.sleep(0.3)
    report = server.call("abort_all_requests")
    ray.get(running, timeout=SECONDS)
    aborted = [event for event in events.read(events_file) if event["step"] == "abort"][-1]
    assert aborted["process"] == "server"
    assert aborted["detail"] == {
        "replica": 0, "requests": report["aborted_count"], "rung": "reallocate", "state": "awake",
    }  # fmt: skip
    assert report["aborted_count"] > 0 and 0 < aborted["seconds"] < SECONDS


# --- many cycles ------------------------------------------------------------------------------------------------------


def segments(process: psutil.Process) -> set[str]:
    """Shared memory that a process has mapped; /dev/shm itself has that of other jobs as well."""
    maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in maps if "/dev/shm/" in line}


def test_cycles_change_no_answer_and_leave_nothing_behind(server: Any) -> None:
    expected = server.answers()
    (memory,) = server.call("memory")
    worker = psutil.Process(memory["pid"])
    before = (worker.num_fds(), segments(worker))
    resident, free_seconds, init_seconds, given_back = [], [], [], []
    for cycle in range(1, CYCLES + 1):
        (freed,) = server.call("free_cache_engine")
        (made,) = server.call("init_cache_engine")
        assert freed["bytes_after"] == 0 and made["bytes_after"] == freed["bytes_before"] > 0
        resident.append(freed["rss_after"])
        given_back.append((freed["rss_before"] - freed["rss_after"]) / freed["bytes_before"])
        free_seconds.append(freed["seconds"])
        init_seconds.append(made["seconds"])
        if cycle % max(2, CYCLES // 20) == 0:
            assert server.answers() == expected, f"cycle {cycle}"
    # What the first generations leave (buffers of kernels) is no growth.
    settled = resident[len(resident) // 10 :]
    drift = (max(settled) - min(settled)) / statistics.median(settled)
    print(
        f"\n{CYCLES} cycles: resident after free {min(settled) / 2**20:.1f} to {max(settled) / 2**20:.1f} MiB "
        f"({drift:.3%}); given back at least {min(given_back):.3%}; medians: free "
        f"{statistics.median(free_seconds) * 1e3:.1f} ms, init {statistics.median(init_seconds) * 1e3:.1f} ms"
    )
    assert drift < 0.01
    assert min(given_back) >= 0.99
    assert worker.num_fds() == before[0]
    assert segments(worker) <= before[1]


# --- concurrency ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(server: Any) -> list[list[int]]:
    return rollout_server.alone(server, TOKENS, SECONDS)


@pytest.mark.parametrize("seed", SEEDS)
def test_requests_in_flight_while_everything_is_called_in_random_order(
    server: Any, checkpoints: Any, reference: list[list[int]], seed: int
) -> None:
    """Each request ends, with the tokens that it has when it is alone, or aborted with the first of them."""
    print(f"\nseed {seed}")
    ends = rollout_server.storm(
        server,
        checkpoints[0].tensors,
        reference,
        seed=seed,
        in_flight=IN_FLIGHT,
        tokens=TOKENS,
        rounds=25,
        seconds=SECONDS,
    )
    print(f"requests: {ends}")
    assert ends["completed"] >= rollout_server.AFTERWARDS
