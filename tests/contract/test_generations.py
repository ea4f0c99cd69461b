"""Each way of being plugged into verl, with the classes of a release that has it: no request reaches an engine that is
asleep, none waits for ever, and after an abort and its end the engine runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import generation_cases
import pytest
from fresh_process import FreshProcesses

SERVERS = {
    "0.7.1": "AscendSafePlainHttpServer",
    "0.8.0": "AscendSafeGatedHttpServer",
    "0.9.0": "AscendSafeGatedHttpServer",
    "0.9.1": "AscendSafeHttpServer",
}
"""Our class of server by the release of verl."""

STACKS = [("0.7.1", "0.11"), ("0.7.1", "0.13"), ("0.8.0", ""), ("0.9.0", ""), ("0.9.1", "")]
"""verl, and vLLM where its engine is another than today's (`generation_cases.ENGINES`)."""

BARRIER = 3.0
"""Seconds; verl's own are sixty, and were waited for: 60.0 s without our part, 0.001 s with it."""


@pytest.fixture(scope="session")
def checkpoint(load_recipe: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("checkpoint") / "model"
    load_recipe("make_tiny").make_model(folder, 0)
    return folder


@pytest.mark.parametrize(("version", "vllm"), STACKS)
def test_the_orders_that_trainers_use(
    version: str, vllm: str, verl_wheel: Callable[[str], str], checkpoint: Path, fresh_process: FreshProcesses
) -> None:
    answer = fresh_process(generation_cases.orders, str(checkpoint), vllm, path=verl_wheel(version))
    assert answer.status == 0, answer.stderr
    runs = {"paused": False, "reached asleep": []}
    assert answer.value == {
        "verl": version,
        "class": SERVERS[version],
        "abort, resume, sleep, wake up": {
            "between": ["aborted", "waits"],
            "in the engine": 0,
            "level": [1],
            "requests": ["aborted", "completed", "completed"],
            **runs,
        },
        "a request while asleep": {"asleep": ["waits"], "half": ["waits"], "requests": ["completed"], **runs},
        "abort, sleep, sync, wake up, resume": {
            # verl 0.9.1 ends an abort itself, by resume_generation; those before leave that to vLLM's wake-up.
            "before": ["waits" if version == "0.9.1" else "completed"],
            "requests": ["completed"],
            **runs,
        },
        "a trainer apart": {"before": ["waits"], "requests": ["completed"], **runs},
        "an abort that fails": answer.value["an abort that fails"],
    }
    assert "no answer from the core" in answer.value["an abort that fails"]


def test_control_the_class_for_verls_gate_is_wrong_where_verl_has_none(
    verl_wheel: Callable[[str], str], checkpoint: Path, fresh_process: FreshProcesses
) -> None:
    answer = fresh_process(generation_cases.without_gate, str(checkpoint), path=verl_wheel("0.9.0"))
    assert answer.value == {"reached asleep": 1, "paused": True}, answer.stderr


def test_control_verls_own_adapter_puts_the_engine_to_sleep_past_its_server(
    verl_wheel: Callable[[str], str], checkpoint: Path, fresh_process: FreshProcesses
) -> None:
    answer = fresh_process(generation_cases.verls_own, str(checkpoint), path=verl_wheel("0.7.1"))
    assert answer.value == {"reached asleep": 1}, answer.stderr


@pytest.mark.parametrize("stock", [False, True])
def test_an_abort_while_the_engine_sleeps_does_not_wait_for_tokens_and_control_verls_does(
    stock: bool, verl_wheel: Callable[[str], str], checkpoint: Path, fresh_process: FreshProcesses
) -> None:
    answer = fresh_process(
        generation_cases.abort_while_asleep, str(checkpoint), stock, BARRIER, path=verl_wheel("0.9.1")
    )
    assert answer.status == 0, answer.stderr
    assert (answer.value >= BARRIER) is stock


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("version", "vllm"), STACKS)
def test_any_order_with_requests_in_flight(
    version: str,
    vllm: str,
    seed: int,
    verl_wheel: Callable[[str], str],
    checkpoint: Path,
    fresh_process: FreshProcesses,
) -> None:
    answer = fresh_process(generation_cases.storm, str(checkpoint), seed, vllm, path=verl_wheel(version))
    assert answer.status == 0, answer.stderr
    found = answer.value
    assert set(found.pop("ends")) == {"aborted", "completed"}, "a request waits, or none ended in one of the two ways"
    assert found == {"last": ["completed"] * 4, "paused": False, "asleep": [], "reached asleep": 0}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("version", SERVERS)
def test_engines_that_die_at_any_moment_and_are_made_again_answer_with_the_last_weights(
    version: str, seed: int, verl_wheel: Callable[[str], str], checkpoint: Path, fresh_process: FreshProcesses
) -> None:
    answer = fresh_process(generation_cases.deaths, str(checkpoint), seed, 8, 100, path=verl_wheel(version))
    assert answer.status == 0, answer.stderr
    engines = answer.value.pop("engines")
    assert answer.value == {"wrong": [], "answered": 12 * 5, "error": "", "reached asleep": 0}
    assert engines >= 4


def test_the_limit_on_restarts_ends_it_with_a_sentence(
    verl_wheel: Callable[[str], str], checkpoint: Path, fresh_process: FreshProcesses
) -> None:
    answer = fresh_process(generation_cases.deaths, str(checkpoint), 0, 50, 2, path=verl_wheel("0.9.1"))
    assert answer.status == 0, answer.stderr
    assert answer.value["engines"] == 3
    assert "died while it" in answer.value["error"]
    assert "2 times was as often as" in answer.value["error"] and "max_engine_restarts allows" in answer.value["error"]


def test_an_engine_that_does_not_start_is_said_with_its_cause(checkpoint: Path, fresh_process: FreshProcesses) -> None:
    dies, refuses, ours = fresh_process(generation_cases.not_started, str(checkpoint)).value
    sentence = "EngineStartError: The rollout engine of replica 0 did not start: "
    assert dies.startswith(f"{sentence}ValueError: no room for one request; what vLLM logged is in /")
    assert refuses.startswith(f"{sentence}NotImplementedError: not on this")
    assert ours == "UnsafeError: as it is"
