"""What only an Ascend NPU needs: environment variables, vllm-ascend's own settings, and what cannot work there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from verl_ascend_rollout.options import ROLLOUT
from verl_ascend_rollout.platforms.base import PlatformFacts
from verl_ascend_rollout.policy import releases
from verl_ascend_rollout.policy.decision import ADDITIONAL_CONFIG, ENVIRONMENT, Decision
from verl_ascend_rollout.policy.releases import Release, vllm_ascend_release, vllm_release
from verl_ascend_rollout.policy.request import VLLM_KWARGS, EngineRequest

NZ_VARIABLE = "VLLM_ASCEND_ENABLE_NZ"
ALLOCATOR_VARIABLE = "PYTORCH_NPU_ALLOC_CONF"


def nz_is_on(environ: Mapping[str, str]) -> bool:
    """Return whether the environment puts weights into NZ layout, which no weight sync can write (we default to 0)."""
    return environ.get(NZ_VARIABLE, "0") != "0"


def expandable_segments(environ: Mapping[str, str]) -> bool:
    """Return whether the environment turns on what the allocator of sleep mode refuses in every release."""
    return bool(re.search(r"expandable_segments\s*:\s*true", environ.get(ALLOCATOR_VARIABLE, ""), re.IGNORECASE))


def settings(facts: PlatformFacts, request: EngineRequest, sleep_mode: bool, mode: str) -> Iterator[Decision]:
    """Yield environment variables, and vllm-ascend's `additional_config`.  No other platform needs any.

    Args:
        mode: vLLM's `cudagraph_mode`.
    """
    if facts.name != "npu":
        return
    release = vllm_ascend_release(facts)
    yield from _nz(request, release)
    yield from _fused_mc2(request, release)
    if sleep_mode:
        yield Decision(
            ENVIRONMENT + ALLOCATOR_VARIABLE,
            request.environ.get(ALLOCATOR_VARIABLE),
            "must not have expandable_segments:True, which the allocator of sleep mode refuses: as it is",
            "vllm-ascend 0.11 vllm_ascend/device_allocator/camem.py:148, 0.13:146, 0.18:150, 0.23:153, 0.28:153",
            "read",
            "engine start",
        )
    if releases.V0_ENGINE.is_in(vllm_release(facts)):
        yield Decision(
            ENVIRONMENT + "VLLM_USE_V1",
            "1",
            "vllm-ascend has no other engine",
            "vllm-ascend 0.11 vllm_ascend/platform.py:123",
            "read",
            "engine start",
        )
    for name in ("HCCL_HOST_SOCKET_PORT_RANGE", "HCCL_NPU_SOCKET_PORT_RANGE"):
        yield Decision(
            ENVIRONMENT + name,
            request.environ.get(name, "auto"),
            "trainer and engine are two processes on one NPU, and HCCL opens ports in each; verl sets it in the job's "
            "runtime_env where the shell has not",
            f"your environment variable {name}"
            if name in request.environ
            else "verl 0.9.1 trainer/constants_ppo.py:96-97",
            "read",
            "actor start",
        )
    if "PIECEWISE" in mode and releases.THINS_SIZES.is_in(release):
        yield Decision(
            ENVIRONMENT + "HCCL_OP_EXPANSION_MODE",
            request.environ.get("HCCL_OP_EXPANSION_MODE"),
            "AIV leaves more streams to captured graphs, and so more batch sizes; left to you, since it changes every "
            "collective operation",
            "vllm-ascend 0.11 vllm_ascend/utils.py:414, 0.13:479, 0.18:506",
            "read",
            "engine start",
        )
    if mode != "NONE":
        yield Decision(
            ENVIRONMENT + "TASK_QUEUE_ENABLE",
            task_queue(request),
            "0 or 1, or unset: torch-npu captures no graph with 2; verl sets it for the engine alone from "
            "VLLM_ASCEND_TASK_QUEUE_ENABLE",
            'torch-npu 2.7.1, 2.8.0, 2.9.0, 2.13.0 libtorch_npu.so ("Do not support TASK_QUEUE_ENABLE = 2 during NPU '
            'graph capture"); verl 0.9.1 plugin/platform/platform_npu.py:154',
            "read",
            "engine start",
        )


def _nz(request: EngineRequest, release: Release | None) -> Iterator[Decision]:
    in_environment = (
        "weights in NZ layout cannot be written by a weight sync, and wake_up raises; vllm-ascend's own default is 1",
        "vllm-ascend 0.11 worker/worker_v1.py:183, 0.13 worker/worker.py:181, 0.18:209, 0.23 ascend_config.py:249; "
        "#4495, #4960",
    )
    in_settings = (
        "the same for NZ, which vllm-ascend takes from its configuration from 0.20 on",
        "vllm-ascend 0.20.2 worker/worker.py:215, ascend_config.py:218; 0.23 worker/worker.py:242, "
        "ascend_config.py:249; 0.28 worker/worker.py:273",
    )
    yield from _off(request, release, NZ_VARIABLE, "weight_nz_mode", in_environment, in_settings)


def _fused_mc2(request: EngineRequest, release: Release | None) -> Iterator[Decision]:
    """Yield the fused kernel for experts on several devices.  Models without experts have no use for it."""
    if request.model.experts == 0 or not releases.FUSED_MC2.may_be_in(release):
        return
    why = (
        "the fused kernel for experts takes their weights in NZ layout only, which a weight sync cannot write",
        "vllm-ascend 0.18 ops/fused_moe/fused_moe.py:90, 0.23:127; 0.28 ops/fused_moe/routed_experts.py:115",
    )
    if not releases.FUSED_MC2_IN_NZ.may_be_in(release):
        why = (
            "vllm-ascend's own default; the fused kernel is for experts quantized as w8a8_dynamic only",
            "vllm-ascend 0.13 vllm_ascend/ascend_forward_context.py:258, envs.py:137",
        )
    yield from _off(request, release, "VLLM_ASCEND_ENABLE_FUSED_MC2", "enable_fused_mc2", why, why)


def _off(
    request: EngineRequest,
    release: Release | None,
    variable: str,
    field: str,
    in_environment: tuple[str, str],
    in_settings: tuple[str, str],
) -> Iterator[Decision]:
    """Yield 0 for what vllm-ascend takes from a variable, or from a field of its settings, each where the release may
    read it, with its reason and source; what the user set there stays."""
    if releases.ENVIRONMENT.may_be_in(release):
        reason, source = in_environment
        set_to = request.environ.get(variable)
        source = source if set_to is None else f"your environment variable {variable}"
        value = "0" if set_to is None else set_to
        yield Decision(ENVIRONMENT + variable, value, reason, source, "read", "engine start")
    if releases.SETTINGS.may_be_in(release):
        reason, source = in_settings
        wished = request.additional_config.get(field)
        source = source if wished is None else f"{VLLM_KWARGS}.additional_config.{field}"
        yield Decision(ADDITIONAL_CONFIG + field, 0 if wished is None else wished, reason, source, "read")


def conflicts(facts: PlatformFacts, request: EngineRequest, sleep_mode: bool, eager: bool, mode: str) -> Iterator[str]:
    """Yield what the user asks for and cannot work on an NPU, one sentence each."""
    if facts.name != "npu":
        return
    release = vllm_ascend_release(facts)
    yield from _allocator_conflicts(request, sleep_mode)
    yield from _layout_conflicts(request, release, sleep_mode)
    # vllm-ascend 0.11 platform.py:123.
    if releases.V0_ENGINE.is_in(vllm_release(facts)) and request.environ.get("VLLM_USE_V1", "1") != "1":
        yield (
            f"VLLM_USE_V1={request.environ['VLLM_USE_V1']} cannot work: vllm-ascend has V1 only; set it to 1 or "
            "unset it"
        )
    # vllm-ascend 0.11 platform.py:251, 0.13:304, 0.18:421, 0.23:647, 0.28:1229.
    if not eager and request.environ.get("ASCEND_LAUNCH_BLOCKING") == "1":
        yield (
            "ASCEND_LAUNCH_BLOCKING=1 cannot work with enforce_eager=False, since vllm-ascend refuses graphs then: "
            f"unset it, or set {ROLLOUT}.enforce_eager to True or null"
        )
    # torch-npu 2.7.1 to 2.13.0 raise while a graph is captured.
    if mode != "NONE" and task_queue(request) == "2":
        yield (
            "TASK_QUEUE_ENABLE=2 cannot work with captured graphs, for which torch-npu wants 0 or 1: set "
            f"VLLM_ASCEND_TASK_QUEUE_ENABLE=1 (verl hands it to the engine alone), or {ROLLOUT}.enforce_eager=True"
        )
    if facts.soc == "310P" and request.expert_parallel and not releases.EXPERTS_SPREAD_ON_310P.is_in(release):
        refusals = (how for ability, how in releases.EXPERTS_REFUSED_ON_310P if ability.is_in(release))
        refusal = next(refusals, "vllm-ascend raises ValueError")
        yield f"expert parallelism cannot work on 310P, where {refusal}: set {ROLLOUT}.expert_parallel_size=1"
    torchair = request.additional_config.get("torchair_graph_config")
    if isinstance(torchair, Mapping) and torchair.get("enabled"):
        setting = f"{VLLM_KWARGS}.additional_config.torchair_graph_config"
        if not releases.TORCHAIR.may_be_in(release):
            yield f"{setting} does nothing: vllm-ascend has no torchair from 0.13 on; leave it out"
        elif eager:
            # vllm-ascend 0.11 ascend_config.py:284.
            yield (
                f"{setting} cannot work in eager mode, which is on here: leave it out, or set "
                f"{ROLLOUT}.enforce_eager=False"
            )


def task_queue(request: EngineRequest) -> str | None:
    """Return what the engine's TASK_QUEUE_ENABLE will be (verl 0.9.1 plugin/platform/platform_npu.py:154-157)."""
    return request.environ.get("VLLM_ASCEND_TASK_QUEUE_ENABLE") or request.environ.get("TASK_QUEUE_ENABLE")


def _allocator_conflicts(request: EngineRequest, sleep_mode: bool) -> Iterator[str]:
    if not sleep_mode or not expandable_segments(request.environ):
        return
    # rl_config takes it out itself (vllm-ascend 0.28 ascend_config.py:287).
    rl_config = request.additional_config.get("rl_config")
    if isinstance(rl_config, Mapping) and rl_config.get("enabled"):
        return
    yield (
        f"{ALLOCATOR_VARIABLE}={request.environ[ALLOCATOR_VARIABLE]} cannot work in sleep mode, whose allocator "
        "refuses expandable segments: take expandable_segments:True out of it, or set "
        f"{ROLLOUT}.enable_sleep_mode=False"
    )


def _layout_conflicts(request: EngineRequest, release: Release | None, sleep_mode: bool) -> Iterator[str]:
    """Yield settings that put weights into NZ layout."""
    additional = request.additional_config
    reads_environment = releases.ENVIRONMENT.may_be_in(release)
    reads_settings = releases.SETTINGS.may_be_in(release)
    # wake_up raises ValueError "FRACTAL_NZ mode is enabled" (vllm-ascend 0.11 worker_v1.py:183 to 0.18 worker.py:209).
    if sleep_mode and reads_environment and nz_is_on(request.environ):
        yield (
            f"{NZ_VARIABLE}={request.environ[NZ_VARIABLE]} cannot work in sleep mode, where wake_up refuses weights "
            f"in NZ layout: set it to 0 or unset it, or set {ROLLOUT}.enable_sleep_mode=False"
        )
    # vllm-ascend 0.20.2 worker.py:215, 0.23:242 and 0.28 worker.py:273 ask this setting in place of the variable.
    if sleep_mode and reads_settings and additional.get("weight_nz_mode"):
        yield (
            f"{VLLM_KWARGS}.additional_config.weight_nz_mode={additional['weight_nz_mode']} cannot work in sleep mode, "
            f"where wake_up refuses weights in NZ layout: set it to 0, or set {ROLLOUT}.enable_sleep_mode=False"
        )
    if request.model.experts == 0 or not releases.FUSED_MC2_IN_NZ.may_be_in(release):
        return
    fused = request.environ.get("VLLM_ASCEND_ENABLE_FUSED_MC2", "0")
    why = "cannot work with weight syncs, since it casts the experts to NZ layout"
    if reads_environment and fused != "0":
        yield f"VLLM_ASCEND_ENABLE_FUSED_MC2={fused} {why}: set it to 0 or unset it"
    if reads_settings and additional.get("enable_fused_mc2"):
        setting = f"{VLLM_KWARGS}.additional_config.enable_fused_mc2"
        yield f"{setting}={additional['enable_fused_mc2']} {why}: set it to 0"


def expert_communication(facts: PlatformFacts) -> tuple[str, str]:
    """Return how vllm-ascend moves tokens between experts on several devices, and its source."""
    release = vllm_ascend_release(facts)
    source = (
        "vllm-ascend 0.11 worker/model_runner_v1.py:1886-1904, 0.13 ascend_forward_context.py:242-278, 0.18:237-281, "
        "0.23:240-359, 0.28:292-408"
    )
    if facts.soc == "A2":
        few = ", and at most 24 experts on each" if releases.FEW_EXPERTS_FOR_MC2.may_be_in(release) else ""
        return f"A2: MC2 for small batches from 16 devices on{few}, else ALLGATHER", source
    if facts.soc == "A3":
        return "A3: MC2 for small batches, ALLTOALL for others", source
    if facts.soc == "A5":
        gather = "ALLGATHER or " if releases.ALLGATHER_ON_A5.may_be_in(release) else ""
        return f"A5: MC2 for small batches on several devices, else {gather}ALLTOALL", source
    if facts.soc == "310P":
        return "310P: ALLGATHER", source
    return "MC2, ALLGATHER or ALLTOALL, as the chip has it", source
