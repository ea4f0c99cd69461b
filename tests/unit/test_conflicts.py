"""What contradicts itself in a job's configuration, on configurations and platforms that are made up."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from verl_ascend_rollout.platforms.base import PlatformFacts
from verl_ascend_rollout.platforms.detect import planned
from verl_ascend_rollout.policy import conflicts, engine_args, routing_replay
from verl_ascend_rollout.policy.conflicts import Pool
from verl_ascend_rollout.policy.decision import Decisions
from verl_ascend_rollout.policy.job_config import trains_adapters
from verl_ascend_rollout.policy.request import EngineRequest, ModelFacts
from verl_ascend_rollout.tools import cli

MOE = ModelFacts(model_type="qwen3_moe", layers=48, experts=128, top_k=8, head_size=128)
DENSE = ModelFacts(model_type="qwen3", layers=36, experts=0, head_size=128)
CPU = planned("cpu")
CUDA = planned("cuda", versions={"vllm": "0.28.0"})
NPU = planned("npu", "A3", {"vllm": "0.23.0", "vllm-ascend": "0.23.0"})

ROLLOUT = "actor_rollout_ref.rollout"
ACTOR = "actor_rollout_ref.actor"


def job(**changes: Any) -> DictConfig:
    """A good job for 16 devices: 128 prompts of 8 responses, 64 of them a step; names with `__` for dots."""
    config = OmegaConf.create(
        {
            "data": {"train_batch_size": 128},
            "actor_rollout_ref": {
                "model": {"path": "model", "lora_rank": 0, "lora": {"rank": 0, "merge": False}},
                "actor": {
                    "strategy": "fsdp2",
                    "use_dynamic_bsz": False,
                    "use_kl_loss": True,
                    "ppo_mini_batch_size": 64,
                    "ppo_micro_batch_size_per_gpu": 4,
                    "megatron": {"router_replay": {"mode": "disabled"}},
                },
                "ref": {"log_prob_micro_batch_size_per_gpu": 8},
                "rollout": {
                    "n": 8,
                    "tensor_model_parallel_size": 2,
                    "data_parallel_size": 1,
                    "gpu_memory_utilization": 0.5,
                    "load_format": "dummy",
                    "log_prob_micro_batch_size_per_gpu": 8,
                    "enable_rollout_routing_replay": False,
                    "engine_kwargs": {"vllm": {}},
                },
            },
            "trainer": {"n_gpus_per_node": 8, "nnodes": 2},
        }
    )
    for name, value in changes.items():
        OmegaConf.update(config, name.replace("__", "."), value, force_add=True)
    return config


def found(config: DictConfig, facts: PlatformFacts = NPU, model: ModelFacts = MOE) -> list[str]:
    request = EngineRequest.from_rollout(config.actor_rollout_ref.rollout, lora=trains_adapters(config), model=model)
    sentences = list(conflicts.find(config, facts, request, engine_args.decide(facts, request)))
    for sentence in sentences:
        assert "\n" not in sentence
        assert ": " in sentence, f"what to do is missing: {sentence}"
    return sentences


LORA = {"actor_rollout_ref__model__lora_rank": 8}
SAFETENSORS = {"actor_rollout_ref__rollout__load_format": "safetensors"}
R3 = {"actor_rollout_ref__rollout__enable_rollout_routing_replay": True}
MEGATRON = {"actor_rollout_ref__actor__strategy": "megatron"}
REPLAYS = {"actor_rollout_ref__actor__megatron__router_replay__mode": "R3"}
ULYSSES = {"actor_rollout_ref__actor__fsdp_config__ulysses_sequence_parallel_size": 2}
ATTENTION = "actor_rollout_ref__model__override_config__attn_implementation"
TP, DP = "actor_rollout_ref__rollout__tensor_model_parallel_size", "actor_rollout_ref__rollout__data_parallel_size"
OWN = {"rollout__nnodes": 1, "rollout__n_gpus_per_node": 8}


@pytest.mark.parametrize(
    ("changes", "facts", "model"),
    [
        ({}, NPU, MOE),
        ({}, CPU, DENSE),
        ({**LORA, **SAFETENSORS}, NPU, MOE),
        ({**LORA, **SAFETENSORS}, CPU, DENSE),
        # Merged adapters are whole weights.
        ({**LORA, "actor_rollout_ref__model__lora__merge": True}, CPU, MOE),
        # verl's own sequence loads what ours does not.
        (LORA, CUDA, DENSE),
        ({"actor_rollout_ref__rollout__quantization": "fp8"}, CUDA, MOE),
        ({**R3, **MEGATRON, **REPLAYS}, NPU, MOE),
        (R3, NPU, MOE),
        (R3, CUDA, dataclasses.replace(MOE, model_type="qwen2_moe", top_k=4)),
        (R3, planned("cpu", versions={"vllm": "0.28.0"}), MOE),
        # A hub name that is not on this machine.
        (R3, NPU, ModelFacts()),
        # verl's default attention is flash attention.
        ({**R3, **ULYSSES}, NPU, MOE),
        ({**ULYSSES, ATTENTION: "flash_attention_3"}, CUDA, DENSE),
        ({**MEGATRON, **ULYSSES, ATTENTION: "sdpa"}, CUDA, DENSE),
        ({TP: 4, DP: 4}, NPU, MOE),
        ({TP: 8, **OWN, "trainer__n_gpus_per_node": 3, "actor_rollout_ref__actor__use_dynamic_bsz": True}, NPU, MOE),
        ({"actor_rollout_ref__rollout__gpu_memory_utilization": 1.0}, NPU, MOE),
        # A rank's share is not a whole number of samples anyway: verl says so first.
        ({"trainer__n_gpus_per_node": 7, TP: 1}, NPU, MOE),
        # No whole batch is computed at once.
        ({"actor_rollout_ref__rollout__log_prob_micro_batch_size_per_gpu": 7, "async_training__x": 1}, NPU, MOE),
        (
            {"actor_rollout_ref__rollout__log_prob_micro_batch_size_per_gpu": 7, "data__train_batch_size": 100},
            NPU,
            MOE,
        ),
    ],
)
def test_what_works_is_left_alone(changes: dict[str, Any], facts: PlatformFacts, model: ModelFacts) -> None:
    assert found(job(**changes), facts, model) == []


def test_what_a_replay_costs_is_among_the_decisions() -> None:
    qwen = ModelFacts(model_type="qwen2_moe", layers=24, experts=60, top_k=4)
    on = engine_args.decide(NPU, EngineRequest(routing_replay=True, model=qwen))["enable_return_routed_experts"]
    assert "24 layers x 4: 192 bytes a token in the trainer's batches, and 96 bytes of the engine's host" in on.reason
    wide = dataclasses.replace(qwen, experts=512)
    (wider,) = routing_replay.decision(EngineRequest(routing_replay=True, model=wide))
    assert "192 bytes a token in the trainer's batches, and 192 bytes of the engine's host" in wider.reason
    assert not any("routed" in one.name for one in engine_args.decide(NPU, EngineRequest(model=qwen)))


@pytest.mark.parametrize(
    ("changes", "facts", "model", "says"),
    [
        (LORA, NPU, MOE, [f"(LoRA) cannot work with {ROLLOUT}.load_format=dummy", f"set {ROLLOUT}.load_format=safet"]),
        ({"actor_rollout_ref__model__lora__rank": 4}, NPU, DENSE, ["training adapters (LoRA) cannot work with"]),
        ({**LORA, **SAFETENSORS}, CPU, MOE, ["(LoRA) of a model with experts cannot work on a CPU"]),
        ({"actor_rollout_ref__rollout__quantization": "fp8"}, NPU, MOE, [f"({ROLLOUT}.quantization=fp8) cannot be"]),
        (
            {"actor_rollout_ref__rollout__engine_kwargs__vllm__quantization": "ascend"},
            NPU,
            MOE,
            ["engine_kwargs.vllm.quantization=ascend) cannot be synced with weight_path by_layout"],
        ),
        (
            {},
            NPU,
            ModelFacts(experts=128, quantization="fp8"),
            ["quantized weights (quantization_config of the model: fp8)"],
        ),
        (
            {"actor_rollout_ref__rollout__mtp": {"enable": True, "enable_rollout": True}},
            NPU,
            MOE,
            ["MTP layers cannot work with weight_path by_layout", "mtp.enable_rollout=False"],
        ),
        (
            {**R3, "actor_rollout_ref__actor__strategy": "torchtitan"},
            NPU,
            MOE,
            [f"routing_replay=True does nothing with {ACTOR}.strategy=torchtitan", "or train with fsdp2"],
        ),
        (
            R3,
            NPU,
            dataclasses.replace(MOE, model_type="deepseek_v3"),
            ["a model of the type deepseek_v3: the routers that replay there are those of qwen2_moe and qwen3_moe"],
        ),
        (R3, NPU, dataclasses.replace(MOE, top_k=1), ["cannot work with one expert a token"]),
        (
            {**R3, "actor_rollout_ref__actor__fsdp_config__router_replay__mode": "R2"},
            NPU,
            MOE,
            ["fsdp_config.router_replay.mode=R2 does nothing with FSDP"],
        ),
        ({**R3, **MEGATRON}, NPU, MOE, [f"does nothing with {ACTOR}.megatron.router_replay.mode=disabled: set"]),
        (
            {**MEGATRON, **REPLAYS},
            NPU,
            MOE,
            [f"router_replay.mode=R3 replays what the rollout has recorded, and {ROLLOUT}"],
        ),
        ({**R3, **MEGATRON, **REPLAYS}, NPU, DENSE, ["=True cannot work: the model has no experts"]),
        (
            R3,
            planned("cpu", versions={"vllm": "0.24.0"}),
            MOE,
            ["cannot work on a CPU with vLLM 0.24.0, whose kernel for experts records no routing"],
        ),
        (
            {**R3, **MEGATRON, **REPLAYS},
            planned("npu", "A3", {"vllm": "0.18.0", "vllm-ascend": "0.18.0"}),
            MOE,
            ["cannot work with vLLM 0.18.0, which records no routing or can end while it does: set it to False"],
        ),
        (
            {
                **R3,
                **MEGATRON,
                **REPLAYS,
                "actor_rollout_ref__rollout__engine_kwargs__vllm__decode_context_parallel_size": 2,
            },
            NPU,
            MOE,
            ["engine_kwargs.vllm.decode_context_parallel_size=2, which vLLM refuses together"],
        ),
        *(
            # verl 0.7.1 and 0.8.0 go with these.
            (R3, planned("npu", "A2", {"vllm": f"{vllm}.0"}), MOE, [f"cannot work with vLLM {vllm}.0, which"])
            for vllm in ("0.11", "0.13", "0.18")
        ),
        *(
            (
                {**ULYSSES, ATTENTION: attention},
                CUDA,
                DENSE,
                [
                    f"ulysses_sequence_parallel_size=2 cannot work with attn_implementation={attention}",
                    "set it to flash_attention_2, or the size to 1",
                ],
            )
            for attention in ("sdpa", "eager")
        ),
        # 32 on 16: no engine at all, and verl says nothing.
        ({TP: 32}, NPU, MOE, ["an engine of 32 devices", "does not divide the 16 devices of trainer", "would use 0"]),
        ({TP: 4, DP: 8}, NPU, MOE, ["tensor_model_parallel_size=4 x actor_rollout_ref.rollout.data_parallel_size=8"]),
        ({TP: 3}, NPU, MOE, ["an engine of 3 devices", "would use 15"]),
        ({TP: 16, **OWN}, NPU, MOE, ["does not divide the 8 devices of rollout.n_gpus_per_node=8 x rollout.nnodes=1"]),
        ({TP: 12, "trainer__nnodes": 3}, NPU, MOE, ["does not fill whole nodes of 8"]),
        (
            {"actor_rollout_ref__rollout__gpu_memory_utilization": 50},
            NPU,
            MOE,
            [f"{ROLLOUT}.gpu_memory_utilization=50 cannot work: it is a share"],
        ),
        (
            {"actor_rollout_ref__rollout__gpu_memory_utilization": 0},
            NPU,
            MOE,
            ["gpu_memory_utilization=0 cannot work"],
        ),
        (
            {"actor_rollout_ref__actor__ppo_micro_batch_size_per_gpu": 64},
            NPU,
            MOE,
            [f"{ACTOR}.ppo_micro_batch_size_per_gpu=64 does not divide the 32 samples of each of 16 ranks"],
        ),
        (
            {"actor_rollout_ref__rollout__log_prob_micro_batch_size_per_gpu": 48},
            NPU,
            MOE,
            [f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=48 does not divide the 64 samples of each of 16 ranks"],
        ),
        (
            {"actor_rollout_ref__ref__log_prob_micro_batch_size_per_gpu": 48},
            NPU,
            MOE,
            ["actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=48 does not divide the 64 samples"],
        ),
    ],
)
def test_each_contradiction_is_one_sentence(
    changes: dict[str, Any], facts: PlatformFacts, model: ModelFacts, says: list[str]
) -> None:
    (sentence,) = found(job(**changes), facts, model)
    for part in says:
        assert part in sentence


@pytest.mark.parametrize(("path", "refused"), [(("by_layout", "verl"), 0), (("by_layout", "layerwise"), 1)])
def test_what_verls_own_sequence_may_load_is_not_refused(path: tuple[str, ...], refused: int) -> None:
    """Where the engine takes the first path that works for the model."""
    decided = engine_args.decide(CUDA)
    given = Decisions(
        tuple(dataclasses.replace(one, value=path) if one.name == "weight_path" else one for one in decided)
    )
    config = job(actor_rollout_ref__rollout__quantization="fp8")
    found = list(conflicts.find(config, CUDA, EngineRequest.from_rollout(config.actor_rollout_ref.rollout), given))
    assert len(found) == refused
    assert all("weight_path by_layout or layerwise" in sentence for sentence in found)


def test_a_megatron_trainer_divides_its_batch_over_fewer_ranks() -> None:
    megatron = {f"actor_rollout_ref__actor__megatron__{name}_model_parallel_size": 2 for name in ("tensor", "pipeline")}
    changes = {**MEGATRON, **megatron, "actor_rollout_ref__actor__ppo_micro_batch_size_per_gpu": 64}
    assert found(job(**changes)) == []
    changes["actor_rollout_ref__actor__ppo_micro_batch_size_per_gpu"] = 48
    (sentence,) = found(job(**changes))
    assert "does not divide the 128 samples of each of 4 ranks" in sentence


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [("trainer", 8, 2)]),
        # Each engine is placed for itself: four of two devices.
        (OWN, [("trainer", 8, 2), ("rollout", 2, 4)]),
        ({**OWN, TP: 16, "rollout__nnodes": 2}, [("trainer", 8, 2), ("rollout", 8, 2)]),
        ({**OWN, "rollout__nnodes": 0}, [("trainer", 8, 2)]),
        (
            {
                "trainer__v1__trainer_mode": "separate_async",
                "actor_rollout_ref__rollout__nnodes": 1,
                "actor_rollout_ref__rollout__n_gpus_per_node": 4,
            },
            [("trainer", 8, 2), ("actor_rollout_ref.rollout", 2, 2)],
        ),
        (
            {
                "reward__reward_model": {"enable_resource_pool": True, "n_gpus_per_node": 4, "nnodes": 1},
                "distillation": {"enabled": True, "n_gpus_per_node": 2, "nnodes": 3},
            },
            [("trainer", 8, 2), ("reward.reward_model", 4, 1), ("distillation", 2, 3)],
        ),
        (
            {"reward__reward_model": {"enable_resource_pool": False, "n_gpus_per_node": 4, "nnodes": 1}},
            [("trainer", 8, 2)],
        ),
    ],
)
def test_the_devices_that_verl_asks_ray_for(changes: dict[str, Any], expected: list[tuple[str, int, int]]) -> None:
    pools = conflicts.pools(job(**changes))
    assert [(pool.what.split(".n_gpus_per_node")[0], pool.size, pool.count) for pool in pools] == expected
    assert all(isinstance(pool, Pool) for pool in pools)


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("trainer.n_gpus_per_node", -8, "trainer.n_gpus_per_node=-8 cannot work: set it to a whole number from 1 to"),
        ("trainer.nnodes", 0, "trainer.nnodes=0 cannot work"),
        ("actor_rollout_ref.rollout.nnodes", -1, "from 0 to 2147483647"),
        ("actor_rollout_ref.rollout.n", 2**31, "rollout.n=2147483648 cannot work"),
        ("data.train_batch_size", -1, "data.train_batch_size=-1 cannot work"),
    ],
)
def test_a_size_that_nothing_can_have_is_refused(name: str, size: int, said: str) -> None:
    (sentence,) = found(job(**{name.replace(".", "__"): size}))
    assert said in sentence


def test_sizes_that_verl_takes_for_none_are_taken() -> None:
    assert found(job(actor_rollout_ref__rollout__nnodes=0, data__train_batch_size=0)) == []


def test_an_engine_that_prefills_and_decodes_apart_is_larger() -> None:
    apart = {"enabled": True, "prefill_replicas": 1, "decode_replicas": 2, "decode_tensor_model_parallel_size": 4}
    assert conflicts.engine_size(job(actor_rollout_ref__rollout__disaggregation=apart)) == 2 + 2 * 4


def test_adapters_on_experts_before_there_was_a_kernel_are_a_warning() -> None:
    old = planned("npu", "A3", {"vllm": "0.18.0", "vllm-ascend": "0.18.0"})
    (warning,) = conflicts.find_warnings(job(), old, EngineRequest(lora=True, model=MOE))
    assert warning.startswith("vllm-ascend 0.18 has no kernel for adapters (LoRA) on experts, which come with 0.23: ")
    assert list(conflicts.find_warnings(job(), NPU, EngineRequest(lora=True, model=MOE))) == []
    assert list(conflicts.find_warnings(job(), old, EngineRequest(lora=True, model=DENSE))) == []


# `ascend-safe explain` says the same


def explain(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = cli.main(["explain", *arguments])
    captured = capsys.readouterr()
    return status, captured.err


NPU_ARGUMENTS = ("--platform", "npu", "--soc", "A3", "--vllm-ascend", "0.23.0")


def test_explain_refuses_what_the_first_sync_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = job(**LORA, actor_rollout_ref__rollout__quantization="fp8")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "num_experts": 8}), encoding="utf-8")
    config.actor_rollout_ref.model.path = str(tmp_path)
    OmegaConf.save(config, tmp_path / "config.yaml")
    status, said = explain(*NPU_ARGUMENTS, "--config", str(tmp_path / "config.yaml"), capsys=capsys)
    assert status == 1
    assert "training adapters (LoRA) cannot work with" in said
    assert "quantized weights" in said
    status, said = explain(*NPU_ARGUMENTS, "--lora", capsys=capsys)
    assert (status, "set actor_rollout_ref.rollout.load_format=safetensors" in said) == (1, True)
    assert explain(*NPU_ARGUMENTS, "--lora", "--load-format", "safetensors", capsys=capsys) == (0, "")
    assert explain("--platform", "cuda", "--lora", capsys=capsys) == (0, "")
