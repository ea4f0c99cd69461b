"""What only an Ascend NPU needs: environment variables, vllm-ascend's own settings, and what cannot work there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from packaging.version import InvalidVersion, Version

from verl_ascend_rollout.decisions import ADDITIONAL_CONFIG, ENVIRONMENT, Decision
from verl_ascend_rollout.platforms.base import PlatformFacts
from verl_ascend_rollout.wishes import ROLLOUT, VLLM_KWARGS, Wishes

ENVIRONMENT_UNTIL = (0, 28)
"""vllm-ascend 0.11 to 0.23 read VLLM_ASCEND_ENABLE_NZ and VLLM_ASCEND_ENABLE_FUSED_MC2; 0.28 has neither (envs.py).
The releases between were not looked at, and are given both the variable and the setting."""

SETTINGS_SINCE = (0, 23)
"""vllm-ascend takes both from `additional_config` too (0.23 ascend_config.py:173, 249; not 0.18)."""


def settings(facts: PlatformFacts, wish: Wishes, sleep_mode: bool, mode: str) -> Iterator[Decision]:
    """Environment variables, and vllm-ascend's `additional_config`.  No other platform needs any.

    Args:
        mode: vLLM's `cudagraph_mode`.
    """
    if facts.name != "npu":
        return
    release = vllm_ascend_release(facts)
    yield from _nz(wish, release)
    yield from _fused_mc2(wish, release)
    if sleep_mode:
        yield Decision(
            ENVIRONMENT + "PYTORCH_NPU_ALLOC_CONF",
            wish.environ.get("PYTORCH_NPU_ALLOC_CONF"),
            "must not have expandable_segments:True, which the allocator of sleep mode refuses: as it is",
            "vllm-ascend 0.11 vllm_ascend/device_allocator/camem.py:148, 0.13:146, 0.18:150, 0.23:153, 0.28:153",
            "read",
            "engine start",
        )
    vllm = release_of(facts.versions.get("vllm"))
    if vllm is not None and vllm < (0, 12):
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
            wish.environ.get(name, "auto"),
            "trainer and engine are two processes on one NPU, and HCCL opens ports in each; verl sets it in the job's "
            "runtime_env where the shell has not",
            f"your environment variable {name}"
            if name in wish.environ
            else "verl 0.9.1 trainer/constants_ppo.py:96-97",
            "read",
            "actor start",
        )
    if "PIECEWISE" in mode and release is not None and release < (0, 23):
        yield Decision(
            ENVIRONMENT + "HCCL_OP_EXPANSION_MODE",
            wish.environ.get("HCCL_OP_EXPANSION_MODE"),
            "AIV leaves more streams to captured graphs, and so more batch sizes; left to you, since it changes every "
            "collective operation",
            "vllm-ascend 0.11 vllm_ascend/utils.py:414, 0.13:479, 0.18:506",
            "read",
            "engine start",
        )
    if mode != "NONE":
        yield Decision(
            ENVIRONMENT + "TASK_QUEUE_ENABLE",
            task_queue(wish),
            "0 or 1, or unset: torch-npu captures no graph with 2; verl sets it for the engine alone from "
            "VLLM_ASCEND_TASK_QUEUE_ENABLE",
            'torch-npu 2.7.1, 2.8.0, 2.9.0, 2.13.0 libtorch_npu.so ("Do not support TASK_QUEUE_ENABLE = 2 during NPU '
            'graph capture"); verl 0.9.1 plugin/platform/platform_npu.py:154',
            "read",
            "engine start",
        )


def _nz(wish: Wishes, release: tuple[int, int] | None) -> Iterator[Decision]:
    if release is None or release < ENVIRONMENT_UNTIL:
        nz = wish.environ.get("VLLM_ASCEND_ENABLE_NZ")
        yield Decision(
            ENVIRONMENT + "VLLM_ASCEND_ENABLE_NZ",
            "0" if nz is None else nz,
            "weights in NZ layout cannot be written by a weight sync, and wake_up raises; vllm-ascend's own default is "
            "1",
            "vllm-ascend 0.11 worker/worker_v1.py:183, 0.13 worker/worker.py:181, 0.18:209, 0.23 ascend_config.py:249; "
            "#4495, #4960"
            if nz is None
            else "your environment variable VLLM_ASCEND_ENABLE_NZ",
            "read",
            "engine start",
        )
    if release is None or release >= SETTINGS_SINCE:
        wished = wish.additional_config.get("weight_nz_mode")
        yield Decision(
            ADDITIONAL_CONFIG + "weight_nz_mode",
            0 if wished is None else wished,
            "the same for NZ, which vllm-ascend takes from its configuration from 0.23 on",
            "vllm-ascend 0.23 worker/worker.py:242, ascend_config.py:249; 0.28 worker/worker.py:273"
            if wished is None
            else f"{VLLM_KWARGS}.additional_config.weight_nz_mode",
            "read",
        )


def _fused_mc2(wish: Wishes, release: tuple[int, int] | None) -> Iterator[Decision]:
    """The fused kernel for experts on several devices.  Models without experts have no use for it."""
    if wish.model.experts == 0 or (release is not None and release < (0, 13)):
        return
    reason = "the fused kernel for experts takes their weights in NZ layout only, which a weight sync cannot write"
    source = "vllm-ascend 0.18 ops/fused_moe/fused_moe.py:90, 0.23:127; 0.28 ops/fused_moe/routed_experts.py:115"
    if release is not None and release < (0, 18):
        reason = "vllm-ascend's own default; the fused kernel is for experts quantized as w8a8_dynamic only"
        source = "vllm-ascend 0.13 vllm_ascend/ascend_forward_context.py:258, envs.py:137"
    if release is None or release < ENVIRONMENT_UNTIL:
        fused = wish.environ.get("VLLM_ASCEND_ENABLE_FUSED_MC2")
        yield Decision(
            ENVIRONMENT + "VLLM_ASCEND_ENABLE_FUSED_MC2",
            "0" if fused is None else fused,
            reason,
            source if fused is None else "your environment variable VLLM_ASCEND_ENABLE_FUSED_MC2",
            "read",
            "engine start",
        )
    if release is None or release >= SETTINGS_SINCE:
        wished = wish.additional_config.get("enable_fused_mc2")
        yield Decision(
            ADDITIONAL_CONFIG + "enable_fused_mc2",
            0 if wished is None else wished,
            reason,
            source if wished is None else f"{VLLM_KWARGS}.additional_config.enable_fused_mc2",
            "read",
        )


def conflicts(facts: PlatformFacts, wish: Wishes, sleep_mode: bool, eager: bool, mode: str) -> Iterator[str]:
    """What the user asks for and cannot work on an NPU, one sentence each."""
    if facts.name != "npu":
        return
    release = vllm_ascend_release(facts)
    yield from _allocator_conflicts(wish, sleep_mode)
    yield from _layout_conflicts(wish, release, sleep_mode)
    vllm = release_of(facts.versions.get("vllm"))
    # vllm-ascend 0.11 platform.py:123.
    if vllm is not None and vllm < (0, 12) and wish.environ.get("VLLM_USE_V1", "1") != "1":
        yield (
            f"VLLM_USE_V1={wish.environ['VLLM_USE_V1']} cannot work: vllm-ascend has V1 only; set it to 1 or unset it"
        )
    # vllm-ascend 0.11 platform.py:251, 0.13:304, 0.18:421, 0.23:647, 0.28:1229.
    if not eager and wish.environ.get("ASCEND_LAUNCH_BLOCKING") == "1":
        yield (
            "ASCEND_LAUNCH_BLOCKING=1 cannot work with enforce_eager=False, since vllm-ascend refuses graphs then: "
            f"unset it, or set {ROLLOUT}.enforce_eager to True or null"
        )
    # torch-npu 2.7.1 to 2.13.0 raise while a graph is captured.
    if mode != "NONE" and task_queue(wish) == "2":
        yield (
            "TASK_QUEUE_ENABLE=2 cannot work with captured graphs, for which torch-npu wants 0 or 1: set "
            f"VLLM_ASCEND_TASK_QUEUE_ENABLE=1 (verl hands it to the engine alone), or {ROLLOUT}.enforce_eager=True"
        )
    if facts.soc == "310P" and wish.expert_parallel:
        refusal = _expert_parallel_refusal_on_310p(release)
        if refusal is not None:
            yield f"expert parallelism cannot work on 310P, where {refusal}: set {ROLLOUT}.expert_parallel_size=1"
    torchair = wish.additional_config.get("torchair_graph_config")
    if isinstance(torchair, Mapping) and torchair.get("enabled"):
        setting = f"{VLLM_KWARGS}.additional_config.torchair_graph_config"
        if release is not None and release >= (0, 13):
            # No file of 0.13, 0.18, 0.23, 0.28 or 0.30 names it.
            yield f"{setting} does nothing: vllm-ascend has no torchair from 0.13 on; leave it out"
        elif eager:
            # vllm-ascend 0.11 ascend_config.py:284.
            yield (
                f"{setting} cannot work in eager mode, which is on here: leave it out, or set "
                f"{ROLLOUT}.enforce_eager=False"
            )


def task_queue(wish: Wishes) -> str | None:
    """What the engine's TASK_QUEUE_ENABLE will be (verl 0.9.1 plugin/platform/platform_npu.py:154-157)."""
    return wish.environ.get("VLLM_ASCEND_TASK_QUEUE_ENABLE") or wish.environ.get("TASK_QUEUE_ENABLE")


def _allocator_conflicts(wish: Wishes, sleep_mode: bool) -> Iterator[str]:
    allocator = wish.environ.get("PYTORCH_NPU_ALLOC_CONF", "")
    if not sleep_mode or not re.search(r"expandable_segments\s*:\s*true", allocator, re.IGNORECASE):
        return
    # CaMemAllocator asserts it in every release; rl_config takes it out itself (vllm-ascend 0.28 ascend_config.py:287).
    rl_config = wish.additional_config.get("rl_config")
    if isinstance(rl_config, Mapping) and rl_config.get("enabled"):
        return
    yield (
        f"PYTORCH_NPU_ALLOC_CONF={allocator} cannot work in sleep mode, whose allocator refuses expandable segments: "
        f"take expandable_segments:True out of it, or set {ROLLOUT}.enable_sleep_mode=False"
    )


def _layout_conflicts(wish: Wishes, release: tuple[int, int] | None, sleep_mode: bool) -> Iterator[str]:
    """Settings that put weights into NZ layout."""
    additional = wish.additional_config
    reads_environment = release is None or release < ENVIRONMENT_UNTIL
    reads_settings = release is None or release >= SETTINGS_SINCE
    nz = wish.environ.get("VLLM_ASCEND_ENABLE_NZ", "0")
    # wake_up raises ValueError "FRACTAL_NZ mode is enabled" (vllm-ascend 0.11 worker_v1.py:183 to 0.18 worker.py:209).
    if sleep_mode and reads_environment and nz != "0":
        yield (
            f"VLLM_ASCEND_ENABLE_NZ={nz} cannot work in sleep mode, where wake_up refuses weights in NZ layout: set it "
            f"to 0 or unset it, or set {ROLLOUT}.enable_sleep_mode=False"
        )
    # vllm-ascend 0.23 worker.py:242 and 0.28 worker.py:273 ask this setting in place of the variable.
    if sleep_mode and reads_settings and additional.get("weight_nz_mode"):
        yield (
            f"{VLLM_KWARGS}.additional_config.weight_nz_mode={additional['weight_nz_mode']} cannot work in sleep mode, "
            f"where wake_up refuses weights in NZ layout: set it to 0, or set {ROLLOUT}.enable_sleep_mode=False"
        )
    # 0.13 asks the variable for quantized experts only (ascend_forward_context.py:258); bf16 weights stay as they are.
    if wish.model.experts == 0 or (release is not None and release < (0, 18)):
        return
    fused = wish.environ.get("VLLM_ASCEND_ENABLE_FUSED_MC2", "0")
    why = "cannot work with weight syncs, since it casts the experts to NZ layout"
    if reads_environment and fused != "0":
        yield f"VLLM_ASCEND_ENABLE_FUSED_MC2={fused} {why}: set it to 0 or unset it"
    if reads_settings and additional.get("enable_fused_mc2"):
        setting = f"{VLLM_KWARGS}.additional_config.enable_fused_mc2"
        yield f"{setting}={additional['enable_fused_mc2']} {why}: set it to 0"


def _expert_parallel_refusal_on_310p(release: tuple[int, int] | None) -> str | None:
    """How vllm-ascend refuses it there; `None` for 0.18 to 0.22, which spread the experts (0.18
    _310p/fused_moe/fused_moe.py:135)."""
    if release is not None and (0, 18) <= release < (0, 23):
        return None
    if release is not None and release >= (0, 28):
        # In the model runner V2 (0.28 _310p/worker/v2/model_runner.py:192); V1 says nothing and has no expert maps.
        return "vllm-ascend's model runner V2 raises NotImplementedError"
    if release is not None and release >= (0, 23):
        return "vllm-ascend raises RuntimeError"  # 0.23 _310p/fused_moe/fused_moe.py:218
    # 0.11 worker/model_runner_v1.py:1904, 0.13 ascend_forward_context.py:278.
    return "vllm-ascend raises ValueError"


def expert_communication(facts: PlatformFacts) -> tuple[str, str]:
    """How vllm-ascend moves tokens between experts on several devices, and its source."""
    release = vllm_ascend_release(facts)
    source = (
        "vllm-ascend 0.11 worker/model_runner_v1.py:1886-1904, 0.13 ascend_forward_context.py:242-278, 0.18:237-281, "
        "0.23:240-359, 0.28:292-408"
    )
    if facts.soc == "A2":
        few = ", and at most 24 experts on each" if release is None or release >= (0, 18) else ""
        return f"A2: MC2 for small batches from 16 devices on{few}, else ALLGATHER", source
    if facts.soc == "A3":
        return "A3: MC2 for small batches, ALLTOALL for others", source
    if facts.soc == "A5":
        gather = "ALLGATHER or " if release is None or release >= (0, 23) else ""
        return f"A5: MC2 for small batches on several devices, else {gather}ALLTOALL", source
    if facts.soc == "310P":
        return "310P: ALLGATHER", source
    return "MC2, ALLGATHER or ALLTOALL, as the chip has it", source


def vllm_ascend_release(facts: PlatformFacts) -> tuple[int, int] | None:
    """vllm-ascend's version, or the version of vLLM that it goes with, as (major, minor)."""
    return release_of(facts.versions.get("vllm-ascend") or facts.versions.get("vllm"))


def release_of(version: str | None) -> tuple[int, int] | None:
    """(major, minor), or `None` for no version and for one that says nothing.

    A checkout without tags calls itself 0.0.0 or 0.1.dev1 (setuptools_scm), which is no old release.
    """
    if version is None:
        return None
    try:
        parsed = Version(version)
    except InvalidVersion:
        return None
    release = (parsed.major, parsed.minor)
    return None if release < (0, 5) else release
