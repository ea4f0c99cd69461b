"""`on_engine_death: restart` on a real engine: EngineCore or its worker is killed -9 in every state, and whoever calls
the server sees the answers of an engine that never died; weights that are not proven to be the last are not used."""

from __future__ import annotations

import os
import re
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import rollout_server
from engine_settings import ENGINE

from verl_ascend_rollout import events
from verl_ascend_rollout.engine.death import EngineDiedError

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

TOKENS, SECONDS = 40, 180
PARTS = ("EngineCore", pytest.param("worker", marks=pytest.mark.long))


@pytest.fixture(scope="module")
def restart_events(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("restart") / "events.jsonl"


@pytest.fixture(scope="module")
def mortal(server: Any, checkpoints: Any, restart_events: Path) -> Iterator[Any]:
    """A second server beside `server`, which never dies."""
    made = rollout_server.start_server(
        checkpoints[0].path,
        restart_events,
        {"kv_cache_memory_bytes": 2**28, "block_size": 32},
        {"on_engine_death": "restart", "max_engine_restarts": 12},
        replica=1,
        max_model_len=ENGINE["max_model_len"],
        max_num_seqs=ENGINE["max_num_seqs"],
    )
    yield made
    # Now: what an actor prints as it ends by itself would come into the output of some later test.
    ray.kill(made.actor)


@pytest.fixture(scope="module")
def reference(server: Any, checkpoints: Any) -> list[list[list[int]]]:
    """What an engine that never died says with the weights of each checkpoint."""
    found = []
    for checkpoint in checkpoints:
        server.sync(checkpoint.tensors())
        found.append(rollout_server.alone(server, TOKENS, SECONDS))
    assert found[0] != found[1]
    return found


def process(server: Any, part: str) -> psutil.Process:
    (memory,) = server.call("memory", timeout=SECONDS)
    worker = psutil.Process(memory["pid"])
    return worker if part == "worker" else worker.parent()


def trainer_seconds(file: Path, count: int) -> list[float]:
    """Of the last syncs, as the trainer saw them."""
    syncs = [event for event in events.read(file) if (event["step"], event["process"]) == ("sync", "trainer")]
    return [event["seconds"] for event in syncs[-count:]]


def kill(server: Any, part: str) -> None:
    process(server, part).send_signal(signal.SIGKILL)


def restarts(file: Path) -> list[dict[str, Any]]:
    return [event for event in events.read(file) if event["step"] == "restart"]


def test_a_snapshot_is_the_weights_once_more(
    server: Any, mortal: Any, checkpoints: Any, events_file: Path, restart_events: Path, record_property: Any
) -> None:
    """What it costs when nothing dies: the same syncs in turn, without and with."""
    rounds = 12
    for number in range(rounds):
        for one in (server, mortal):
            one.sync(checkpoints[number % 2].tensors())
    without, kept = trainer_seconds(events_file, rounds), trainer_seconds(restart_events, rounds)
    details = [event["detail"] for event in events.read(restart_events) if event["detail"].get("snapshot_bytes")]
    tensors = dict(checkpoints[0].tensors()).values()
    assert details[-1]["snapshot_bytes"] == details[-1]["bytes"] == sum(tensor.nbytes for tensor in tensors)
    pairs = [with_it / alone for with_it, alone in zip(kept, without, strict=True)]
    line = (
        f"{details[-1]['bytes']} bytes: a sync takes {statistics.median(without):.4f} s without a snapshot, "
        f"{statistics.median(kept):.4f} s with one, {statistics.median(pairs):.2f} times as long in the middle; "
        f"writing it {statistics.median(detail['snapshot_seconds'] for detail in details):.4f} s"
    )
    record_property("measured", line)
    print(line)


@pytest.mark.parametrize("part", PARTS)
def test_requests_in_flight_run_again_from_their_prompts(
    mortal: Any, checkpoints: Any, reference: Any, restart_events: Path, part: str
) -> None:
    mortal.sync(checkpoints[0].tensors())
    before = len(list(events.read(restart_events)))
    prompts = rollout_server.storm_prompts()
    running = [
        mortal.start(prompt, f"killed-{part}-{number}", max_tokens=TOKENS, prompt_logprobs=None)
        for number, prompt in enumerate(prompts)
    ]
    time.sleep(0.2)
    assert len(ray.wait(running, num_returns=len(running), timeout=0)[0]) < len(running)
    kill(mortal, part)
    killed = time.time()
    first = mortal.start(prompts[0], f"first-{part}", max_tokens=1, prompt_logprobs=None)
    late = mortal.start(prompts[0], f"late-{part}", max_tokens=TOKENS, prompt_logprobs=None)
    assert list(ray.get(first, timeout=SECONDS).token_ids) == reference[0][0][:1]
    next_token = time.time() - killed
    assert [list(output.token_ids) for output in ray.get(running, timeout=SECONDS)] == reference[0]
    assert list(ray.get(late, timeout=SECONDS).token_ids) == reference[0][0]
    assert len(list(events.read(restart_events))) > before
    event = restarts(restart_events)[-1]
    assert part.split()[0] in event["detail"]["cause"] or "EngineCore" in event["detail"]["cause"]
    print(f"\n{part}: {next_token:.1f} s from the kill to the next token; the engine: {event}")


def test_an_engine_that_ends_by_an_error_says_which(
    mortal: Any, checkpoints: Any, reference: Any, restart_events: Path
) -> None:
    mortal.sync(checkpoints[0].tensors())
    worker = process(mortal, "worker")
    limit = worker.memory_info().vms
    worker.rlimit(psutil.RLIMIT_AS, (limit, limit))  # memory has run out
    assert rollout_server.alone(mortal, TOKENS, SECONDS) == reference[0]
    cause = restarts(restart_events)[-1]["detail"]["cause"]
    print(f"\n{cause}")
    # Native code may not stand it and end its process without a word.
    without_a_word = r"worker 0 \(process \d+\) ended without being asked to$"
    assert re.search(rf"\((RuntimeError|MemoryError|OSError|ImportError): .*\)$|{without_a_word}", cause)
    assert "psm_" not in cause


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("state", ["asleep", "weights_only"])
def test_an_engine_that_dies_while_memory_is_away_comes_back_in_that_state(
    mortal: Any, checkpoints: Any, reference: Any, state: str, part: str
) -> None:
    mortal.sync(checkpoints[0].tensors())
    mortal.call("sleep" if state == "asleep" else "free_cache_engine")
    kill(mortal, part)
    (memory,) = mortal.call("memory", timeout=SECONDS)
    assert mortal.call("explain")["state"] == state and memory["kv_bytes"] == 0
    mortal.call("wake_up", timeout=SECONDS)
    assert rollout_server.alone(mortal, TOKENS, SECONDS) == reference[0]


@pytest.mark.parametrize("part", PARTS)
def test_an_engine_that_dies_in_a_wake_up_is_woken(mortal: Any, checkpoints: Any, reference: Any, part: str) -> None:
    mortal.sync(checkpoints[0].tensors())
    mortal.call("sleep")
    (memory,) = mortal.call("memory")
    worker = psutil.Process(memory["pid"])
    worker.suspend()  # the wake-up waits for it
    waking = mortal.actor.wake_up.remote()
    assert ray.wait([waking], timeout=1)[0] == []
    (worker if part == "worker" else worker.parent()).send_signal(signal.SIGKILL)
    ray.get(waking, timeout=SECONDS)
    assert rollout_server.alone(mortal, TOKENS, SECONDS) == reference[0]


@pytest.mark.parametrize("part", [pytest.param("EngineCore", marks=pytest.mark.long), "worker"])
def test_a_sync_in_which_the_engine_dies_brings_its_weights(
    mortal: Any, checkpoints: Any, reference: Any, part: str
) -> None:
    mortal.sync(checkpoints[0].tensors())

    killed = process(mortal, part)  # a worker in a sync answers nothing else

    def weights() -> Iterator[tuple[str, Any]]:
        for number, pair in enumerate(checkpoints[1].tensors()):
            if number == 200:
                killed.send_signal(signal.SIGKILL)
            yield pair

    mortal.sync(weights(), timeout=SECONDS)
    assert rollout_server.alone(mortal, TOKENS, SECONDS) == reference[1]


def test_weights_that_changed_in_the_snapshot_are_never_used(
    mortal: Any, checkpoints: Any, restart_events: Path
) -> None:
    """The last of this file: the server has no engine afterwards."""
    mortal.sync(checkpoints[0].tensors())
    number = len(restarts(restart_events))
    descriptor = mortal.adapter._snapshot._descriptor
    byte = os.pread(descriptor, 1, 4096)
    os.pwrite(descriptor, bytes([byte[0] ^ 1]), 4096)
    dying = mortal.actor.engine_death.remote()
    kill(mortal, "EngineCore")
    said = ray.get(dying, timeout=SECONDS)
    assert "died while it was awake" in said and "its checksum differs" in said
    assert len(restarts(restart_events)) == number
    with pytest.raises(EngineDiedError, match="its checksum differs"):
        mortal.call("sleep")
