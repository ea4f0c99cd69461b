"""Routing replay (R3): the trainer routes each token to the experts to which the rollout has routed it.

Where it works, what it costs, and what contradicts it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from verl_ascend_rollout.options import ROLLOUT
from verl_ascend_rollout.platforms.base import PlatformFacts
from verl_ascend_rollout.policy import releases
from verl_ascend_rollout.policy.decision import Decision
from verl_ascend_rollout.policy.job_config import setting
from verl_ascend_rollout.policy.request import EngineRequest

ACTOR = "actor_rollout_ref.actor"
FIELD = f"{ROLLOUT}.enable_rollout_routing_replay"

MODELS = ("qwen2_moe", "qwen3_moe")
"""The `model_type`s whose routers replay with FSDP (`integration.routing_replay`)."""

OWN = ("megatron", "veomni")
"""Strategies with a replay of verl's own, switched on by `router_replay.mode`."""

BYTES_OF_AN_EXPERT = 2
"""Of an expert's number in the trainer's batches: int16 (verl 0.9.1, experimental/agent_loop/agent_loop.py:131)."""

FEW_EXPERTS = 256
"""Up to which vLLM keeps one byte for each (vLLM 0.28, routed_experts_capturer.py), and two above."""


def decision(request: EngineRequest) -> Iterator[Decision]:
    """Yield what it costs, where it is asked for."""
    if not request.routing_replay:
        return
    layers, top_k, experts = request.model.layers, request.model.top_k, request.model.experts
    cost = "every token's experts go along, in every layer"
    if layers and top_k and experts:
        kept = 1 if experts <= FEW_EXPERTS else 2
        cost = (
            f"every token's experts go along, {layers} layers x {top_k}: {layers * top_k * BYTES_OF_AN_EXPERT} bytes a "
            f"token in the trainer's batches, and {layers * top_k * kept} bytes of the engine's host memory for each "
            "token that its KV cache can hold"
        )
    yield Decision(
        "enable_return_routed_experts",
        True,
        f"you set {FIELD}, and verl tells vLLM; {cost}",
        "verl 0.9.1 vllm_async_server.py:437-451; vllm 0.28 fused_moe/routed_experts_capturer.py",
        "read",
    )


def conflicts(config: Any, facts: PlatformFacts, request: EngineRequest) -> Iterator[str]:
    """Yield what contradicts it, one sentence each."""
    strategy = setting(config, f"{ACTOR}.strategy")
    mode = setting(config, f"{ACTOR}.{strategy}.router_replay.mode") if strategy in OWN else None
    if not request.routing_replay:
        if mode == "R3":
            yield (
                f"{ACTOR}.{strategy}.router_replay.mode=R3 replays what the rollout has recorded, and {FIELD} is off: "
                "set it to True"
            )
        return
    model = request.model
    if model.experts == 0:
        yield f"{FIELD}=True cannot work: the model has no experts; set it to False"
        return
    yield from _engine(facts, request)
    if strategy in ("fsdp", "fsdp2"):
        yield from _with_fsdp(config, request)
    elif strategy == "torchtitan":
        # verl 0.9.1 workers/engine_workers.py:496-505.
        yield (
            f"{FIELD}=True does nothing with {ACTOR}.strategy={strategy}, whose trainer does not replay what is "
            "recorded and sent: set it to False, or train with fsdp2, megatron or veomni"
        )
    elif mode is not None and mode != "R3":
        yield (
            f"{FIELD}=True does nothing with {ACTOR}.{strategy}.router_replay.mode={mode}: set that to R3, or this to "
            "False"
        )


def _engine(facts: PlatformFacts, request: EngineRequest) -> Iterator[str]:
    release = releases.vllm_release(facts)
    # verl 0.9.1 says why (vllm_async_server.py:437); 0.7.1 and 0.8.0 hand the setting to any vLLM.
    if not releases.ROUTING_RECORD.may_be_in(release):
        yield (
            f"{FIELD}=True cannot work with vLLM {facts.versions['vllm']}, which records no routing or can end while "
            "it does: set it to False, or install vLLM 0.22 or newer"
        )
    elif facts.name == "cpu" and not releases.ROUTING_RECORD_ON_CPU.may_be_in(release):
        yield (
            f"{FIELD}=True cannot work on a CPU with vLLM {facts.versions['vllm']}, whose kernel for experts records "
            "no routing: set it to False, or install vLLM 0.28 or newer"
        )
    # vllm 0.28 vllm/config/vllm.py:1071-1100.
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size", "pipeline_parallel_size"):
        if (request.engine_kwargs.get(name) or 1) > 1:
            yield (
                f"{FIELD}=True cannot work with {ROLLOUT}.engine_kwargs.vllm.{name}={request.engine_kwargs[name]}, "
                "which vLLM refuses together: set one of them back"
            )


def _with_fsdp(config: Any, request: EngineRequest) -> Iterator[str]:
    model = request.model
    if model.model_type is not None and model.model_type not in MODELS:
        yield (
            f"{FIELD}=True cannot work with {ACTOR}.strategy=fsdp and a model of the type {model.model_type}: the "
            f"routers that replay there are those of {' and '.join(MODELS)}; set it to False, or train with megatron"
        )
    if model.top_k == 1:
        yield (
            f"{FIELD}=True cannot work with one expert a token, where a token that was not recorded looks like one of "
            "expert 0: set it to False"
        )
    mode = setting(config, f"{ACTOR}.fsdp_config.router_replay.mode")
    if mode == "R2":
        yield (
            f"{ACTOR}.fsdp_config.router_replay.mode=R2 does nothing with FSDP, and {FIELD}=True is R3: set it to "
            "disabled"
        )
