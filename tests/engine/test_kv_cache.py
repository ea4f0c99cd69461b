"""The KV cache's memory comes back to the system, and generation after that is exactly what it was."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import ray

from verl_ascend_rollout import events

pytestmark = pytest.mark.engine

CACHED = {"prompt_logprobs": None}
"""A request for the prompt's log-probs reads no prefix cache: it has to run the whole prompt."""


@pytest.fixture(scope="module", autouse=True)
def synced(server: Any, checkpoints: Any) -> None:
    """The engine comes up with dummy weights; give it real ones."""
    server.sync(checkpoints[0].tensors())


@pytest.fixture(autouse=True)
def awake(server: Any) -> Any:
    """Whatever a test did, the next one finds the engine awake."""
    yield
    server.call("wake_up", ["kv_cache"])


def test_decisions_are_those_of_the_policy_and_say_why(server: Any) -> None:
    explained = server.call("explain")
    decisions = {decision["name"]: decision for decision in explained["decisions"]}
    assert explained["kv_release"] == "reallocate"
    # The user left it open, and verl's config asks for sleep mode, which vLLM refuses on a CPU.
    assert decisions["enforce_eager"]["value"] is True
    assert decisions["enable_sleep_mode"]["value"] is False
    assert all(decision["reason"] and decision["source"] for decision in explained["decisions"])


def test_the_plugin_is_loaded_in_vllms_worker_process(server: Any, events_file: Any) -> None:
    (decided,) = [event for event in events.read(events_file) if event["step"] == "decide"]
    (worker,) = decided["detail"]["workers"]
    assert worker["worker"] == "CPUWorker"
    assert worker["pid"] != decided["pid"]
    assert any("rollout ascend_safe" in sentence for sentence in worker["registered"])


def test_the_engine_leaves_no_name_in_shared_memory(server: Any) -> None:
    """What has no name goes with its last process, however that ends."""
    (memory,) = server.call("memory")
    maps = Path(f"/proc/{memory['pid']}/maps").read_text()
    segments = {line.split(maxsplit=5)[5] for line in maps.splitlines() if "/dev/shm/psm_" in line}
    assert segments, "vLLM's message queues are mapped"
    assert all(segment.endswith(" (deleted)") for segment in segments)
    assert server.answers(), "and still work"


def test_users_engine_kwargs_reach_vllm(server: Any) -> None:
    (memory,) = server.call("memory")
    # engine_kwargs.vllm.kv_cache_memory_bytes; what does not fill a block is left over.
    assert 0.99 * 2**30 <= memory["kv_bytes"] <= 2**30


def test_memory_comes_back_to_the_system(server: Any) -> None:
    server.answers()
    (before,) = server.call("memory")
    server.call("sleep")
    (freed,) = server.call("memory")
    server.call("wake_up", ["kv_cache"])
    (restored,) = server.call("memory")

    assert freed["kv_bytes"] == 0
    assert restored["kv_bytes"] == before["kv_bytes"]
    print(f"\nresident: {before['rss']} before free, {freed['rss']} after free, {restored['rss']} after init")
    assert before["rss"] - freed["rss"] >= 0.99 * before["kv_bytes"]
    assert restored["rss"] - freed["rss"] >= 0.99 * before["kv_bytes"]


def test_generation_is_identical_after_each_of_five_cycles(server: Any) -> None:
    expected = server.answers()
    for _ in range(5):
        server.call("sleep")
        server.call("wake_up", ["kv_cache"])
        assert server.answers() == expected


def test_a_prefix_that_was_cached_before_the_free_is_not_taken_for_cached(server: Any) -> None:
    prompt = list(range(5, 85)) + list(range(5, 45))
    first = ray.get(server.start(prompt, "prefix-1", **CACHED))
    again = ray.get(server.start(prompt, "prefix-2", **CACHED))
    assert again.extra_fields["num_cached_tokens"] > 0, "the prefix cache is on, and this prompt has full blocks"
    server.call("sleep")
    server.call("wake_up", ["kv_cache"])
    after = ray.get(server.start(prompt, "prefix-3", **CACHED))
    assert after.extra_fields["num_cached_tokens"] == 0
    assert list(after.token_ids) == list(first.token_ids)


def test_freeing_and_making_twice_change_nothing_the_second_time(server: Any) -> None:
    (freed,) = server.call("free_cache_engine")
    (again,) = server.call("free_cache_engine")
    assert freed["changed"] and freed["bytes_before"] > 0 and freed["bytes_after"] == 0
    assert not again["changed"] and "already free" in again["reason"]

    (made,) = server.call("init_cache_engine")
    (again,) = server.call("init_cache_engine")
    assert made["changed"] and made["bytes_after"] == freed["bytes_before"]
    assert not again["changed"] and "already there" in again["reason"]


def test_a_second_init_while_requests_run_disturbs_none_of_them(server: Any) -> None:
    prompt = list(range(10, 60))
    expected = ray.get(server.start(prompt, "alone", max_tokens=100))
    running = server.start(prompt, "interrupted", max_tokens=100)
    time.sleep(0.2)
    (change,) = server.call("init_cache_engine")
    assert not change["changed"]
    answer = ray.get(running, timeout=60)
    assert list(answer.token_ids) == list(expected.token_ids)


def test_waking_the_weights_alone_leaves_the_kv_cache_asleep(server: Any) -> None:
    server.call("sleep")
    server.call("wake_up", ["weights"])
    assert server.call("memory")[0]["kv_bytes"] == 0


def test_release_and_resume_are_wired_to_free_and_init(server: Any) -> None:
    expected = server.answers()
    server.call("release_kv_cache")
    assert server.call("memory")[0]["kv_bytes"] == 0
    server.call("resume_kv_cache")
    assert server.call("memory")[0]["kv_bytes"] > 0
    assert server.answers() == expected


def test_a_request_that_comes_while_asleep_waits_and_is_answered_right(server: Any) -> None:
    prompt = list(range(10, 60))
    expected = ray.get(server.start(prompt, "before-sleep"))
    server.call("sleep")
    waiting = server.start(prompt, "while-asleep")
    assert ray.wait([waiting], timeout=2)[0] == []
    server.call("wake_up", ["kv_cache"])
    answer = ray.get(waiting, timeout=60)
    assert list(answer.token_ids) == list(expected.token_ids)
    assert list(answer.log_probs) == list(expected.log_probs)


def test_sleep_with_requests_in_flight_aborts_them_and_hurts_nobody(server: Any) -> None:
    expected = server.answers()
    running = [server.start(range(5, 25), f"in-flight-{number}", max_tokens=150) for number in range(8)]
    time.sleep(0.3)
    server.call("sleep")
    stopped = ray.get(running, timeout=60)
    assert {output.stop_reason for output in stopped} <= {"aborted", "completed"}
    assert any(output.stop_reason == "aborted" for output in stopped)
    assert server.call("memory")[0]["kv_bytes"] == 0
    server.call("wake_up", ["kv_cache"])
    assert server.answers() == expected


def test_abort_all_requests_then_resume(server: Any) -> None:
    expected = server.answers()
    running = [server.start(range(5, 25), f"abort-{number}", max_tokens=150) for number in range(4)]
    time.sleep(0.3)
    report = server.call("abort_all_requests")
    ray.get(running, timeout=60)
    assert report["aborted_count"] > 0
    server.call("resume_generation")
    assert server.answers() == expected


def test_clear_kv_cache_forgets_cached_prefixes(server: Any) -> None:
    prompt = list(range(5, 85)) + list(range(5, 45))
    ray.get(server.start(prompt, "clear-1", **CACHED))
    server.call("clear_kv_cache")
    assert ray.get(server.start(prompt, "clear-2", **CACHED)).extra_fields["num_cached_tokens"] == 0


def test_a_prompt_longer_than_the_context_is_refused_in_a_sentence(server: Any) -> None:
    with pytest.raises(ValueError, match=r"Prompt length \(200\) leaves no room to generate within .* \(192\)"):
        ray.get(server.start([7] * 200, "too-long"))
    assert server.answers()


def test_each_step_left_an_event(server: Any, events_file: Any) -> None:
    server.call("sleep")
    server.call("wake_up", ["kv_cache"])
    recorded = [event for event in events.read(events_file) if event["process"] == "worker"]
    freed = [event for event in recorded if event["step"] == "free" and event["detail"]["changed"]]
    made = [event for event in recorded if event["step"] == "init" and event["detail"]["changed"]]
    assert freed and made
    assert freed[-1]["bytes_before"] == made[-1]["bytes_after"] > 0
    assert freed[-1]["bytes_after"] == made[-1]["bytes_before"] == 0
    assert freed[-1]["detail"]["rung"] == "reallocate"
    assert 0 < freed[-1]["seconds"] < 60
