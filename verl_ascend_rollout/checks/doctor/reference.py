"""The claims of a QA report on verl's vLLM rollout in eager mode on Ascend NPUs (2025-12-25), on the stack at hand.

That report was written by hand, for verl 0.6 with vLLM 0.11.  Each of its claims is looked up again here: it holds, a
worry of it is settled, or it went stale, and then with what is there now.  `TRAPS` are what reading the sources has
found since: whether this stack has it, and what ascend_safe does about it.  All of these pass: ascend_safe rests on
none of them, but whoever goes by that report should know.
"""

from __future__ import annotations

import ast
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

from verl_ascend_rollout.checks.doctor import source
from verl_ascend_rollout.checks.doctor.source import Defines, Sources, Uses, first
from verl_ascend_rollout.report import Check, Confidence, Evidence, Risk

Question = Callable[[Sources], Check]
Said = Literal["pass", "stale", "skip"]

STALE = "stale:"
"""In the summary of a claim that no longer holds."""

ATTENTION = ("vllm/model_executor/layers/attention/attention.py", "vllm/attention/layer.py")
ROLLOUT_CONFIG = "verl/workers/config/rollout.py"
ROLLOUT_YAML = "verl/trainer/config/rollout/rollout.yaml"
MOE_PATCH = "verl/utils/vllm/patch.py"
ASCEND_WORKERS = ("vllm_ascend/worker/worker.py", "vllm_ascend/worker/worker_v1.py")
KV_CACHE = f"{source.OURS}/worker/kv_cache.py"
BIND = source.Says("vllm/v1/worker/utils.py", "assert len(runner_kv_caches)")


def _answer(
    name: str,
    verdict: Said,
    summary: str,
    *evidence: Evidence | None,
    confidence: Confidence = "read",
    risk: Risk = "low",
) -> Check:
    summary = f"{STALE} {summary}" if verdict == "stale" else summary
    return Check(
        name, "skip" if verdict == "skip" else "pass", summary, tuple(one for one in evidence if one), confidence, risk
    )


def eager_by_default(sources: Sources) -> Check:
    """ "enforce_eager defaults to True" (verl workers/config/rollout.py:143)."""
    name = "reference.eager-by-default"
    found = source.default_of(sources, ROLLOUT_CONFIG, "RolloutConfig.enforce_eager")
    if found is None:
        return _answer(name, "skip", "verl's RolloutConfig is not there to read")
    line, value = found
    evidence = [Evidence(f"{ROLLOUT_CONFIG}:{line}", f"enforce_eager = {value}")]
    yaml = source.line_with(sources, ROLLOUT_YAML, "enforce_eager:")
    if yaml:
        evidence.append(Evidence(f"{ROLLOUT_YAML}:{yaml}", "enforce_eager: False, which a hydra job gets"))
    if value == "True":
        return _answer(name, "pass", "holds for the dataclass; a hydra job gets the YAML's value instead", *evidence)
    return _answer(
        name,
        "stale",
        "False is the default now, in the dataclass too; ascend_safe decides it by SoC and release",
        *evidence,
        risk="medium",
    )


def eager_is_supported(sources: Sources) -> Check:
    """ "vllm-ascend supports eager mode: torchair graphs and eager together raise" (ascend_config.py:277-286)."""
    name = "reference.ascend-eager"
    file = "vllm_ascend/ascend_config.py"
    if not sources.has("vllm_ascend"):
        return _answer(name, "skip", "vllm-ascend is not there to read")
    torchair = Uses(file, "torchair_graph_config").find(sources)
    if torchair:
        guard = Uses(file, "enforce_eager").find(sources)
        return _answer(name, "pass", "holds: torchair graphs and eager mode are told apart", torchair, guard)
    platform = Uses("vllm_ascend/platform.py", "enforce_eager").find(sources)
    summary = "eager mode is supported, but torchair is gone, and the conflict with it"
    return _answer(name, "stale", summary, platform, Evidence(file, "names no torchair_graph_config"))


def forward_context_in_eager(sources: Sources) -> Check:
    """Unverified then, medium: "static_forward_context is unavailable in eager mode"."""
    name = "reference.forward-context-in-eager"
    for file in ATTENTION:
        tree = sources.tree(file)
        init = source.definition(tree, "Attention.__init__") if tree else None
        for node in ast.walk(init) if init else ():
            if isinstance(node, ast.Assign) and "static_forward_context[" in ast.unparse(node.targets[0]):
                eager = any(word == "enforce_eager" for _, (word, _) in source.words(init)) if init else False
                where = Evidence(f"{file}:{node.lineno}", ast.unparse(node))
                if eager:
                    return _answer(name, "stale", "Attention asks for eager mode where it registers itself", where)
                return _answer(
                    name, "pass", "settled: every attention layer registers itself when it is made, eager or not", where
                )
    return _answer(name, "skip", "vLLM's Attention is not there to read")


def internals_of_kv_cache(sources: Sources) -> Check:
    """ "KV-cache management reaches into vLLM internals" (r1_ascend, vllm_rollout_spmd.py:260-289)."""
    name = "reference.kv-internals"
    if not sources.has("vllm"):
        return _answer(name, "skip", "vLLM is not there to read")
    context = Defines("vllm/config/compilation.py", "CompilationConfig.static_forward_context").find(sources)
    variable = Uses("vllm/envs.py", "VLLM_USE_V1").find(sources)
    rollout = Defines("verl/workers/rollout/vllm_rollout/vllm_rollout_spmd.py", "vLLMRollout").find(sources)
    gone = [
        what
        for what, found in (
            ("static_forward_context", context),
            ("the variable VLLM_USE_V1", variable),
            ("verl's synchronous vLLMRollout, which the recipe subclassed", rollout or not sources.has("verl")),
        )
        if not found
    ]
    evidence = (context, variable, rollout)
    if not gone:
        return _answer(name, "pass", "holds: what the recipe reaches for is there", *evidence, risk="medium")
    return _answer(name, "stale", f"gone is {', '.join(gone)}", *evidence, risk="medium")


def verl_patches_loaders(sources: Sources) -> Check:
    """ "verl patches MoE weight loaders" (utils/vllm/patch.py:125-190)."""
    name = "reference.verl-moe-loaders"
    patch = Defines(MOE_PATCH, "patch_vllm_moe_model_weight_loader").find(sources)
    if not sources.has("verl"):
        return _answer(name, "skip", "verl is not there to read")
    if patch is None:
        return _answer(name, "stale", "the function is gone", Evidence(MOE_PATCH, "not found"), risk="high")
    moved = Defines("vllm/model_executor/layers/fused_moe/routed_experts.py", "RoutedExperts.weight_loader").find(
        sources
    )
    guard = Uses(MOE_PATCH, "weight_loader", "patch_vllm_moe_model_weight_loader", part_of_text=True).find(sources)
    if moved:
        return _answer(
            name,
            "stale",
            "the function is there and does nothing, since this vLLM has the loader on RoutedExperts, and a "
            "module without one is passed over in silence; ascend_safe re-attaches loaders itself on NPU",
            patch,
            guard,
            moved,
            risk="high",
        )
    return _answer(name, "pass", "holds", patch, risk="high")


def ascend_patches_something_else(sources: Sources) -> Check:
    """ "vllm-ascend patches a different thing" (patch/worker/patch_weight_loader.py:41), so the two do not conflict."""
    name = "reference.ascend-linear-patch"
    if not sources.has("vllm_ascend"):
        return _answer(name, "skip", "vllm-ascend is not there to read")
    file = "vllm_ascend/patch/worker/patch_weight_loader.py"
    found = Uses(file, "UnquantizedLinearMethod").find(sources)
    if found:
        return _answer(name, "pass", "holds: it replaces UnquantizedLinearMethod.create_weights", found)
    later = "vllm_ascend/patch/worker/patch_process_weights_after_loading.py"
    newer = Uses(later, "process_weights_after_loading").find(sources)
    summary = "the patch is gone" + (
        "; this release replaces vLLM's process_weights_after_loading instead, so that it is imported late here"
        if newer
        else ""
    )
    return _answer(name, "stale", summary, Evidence(file, "is not in this release"), newer)


def patches_do_not_conflict(sources: Sources) -> Check:
    """ "The two patches do not conflict": different targets.  verl's NPU wrapper, which goes by shapes, came later."""
    name = "reference.patches-do-not-conflict"
    if not (sources.has("vllm_ascend") and sources.has("verl")):
        return _answer(name, "skip", "it takes verl and vllm-ascend")
    file = "verl/utils/vllm/npu_vllm_patch.py"
    wrapper = first(
        (Defines(file, "vllm_v013_weight_loader_method_wrapper"), Uses(file, "_verl_npu_weight_loader_patched")),
        sources,
    )
    if wrapper is None:
        return _answer(
            name,
            "pass",
            "holds: verl sets loaders on MoE parameters, vllm-ascend creates linear weights",
            Defines(MOE_PATCH, "patch_vllm_moe_model_weight_loader").find(sources),
            confidence="inferred",
        )
    return _answer(
        name,
        "stale",
        "verl wraps the experts' loader on NPU and tells the layout by its shape, which is silently wrong where "
        "hidden == 2 * intermediate / tp; ascend_safe goes by a record instead",
        wrapper,
        risk="high",
    )


def kv_init_conflicts(sources: Sources) -> Check:
    """Unverified then, high: "KV init conflicts with vllm-ascend"."""
    name = "reference.kv-init-conflict"
    bind = BIND.find(sources)
    if bind is None:
        return _answer(name, "skip", "vLLM's bind_kv_cache is not there to read")
    alias = Uses("vllm_ascend/attention/attention_v1.py", "key_cache").find(sources)
    return _answer(
        name,
        "pass",
        "settled, and true: a second initialize_kv_cache is refused by an assertion"
        + (", and vllm-ascend's attention goes on with the cache that it kept" if alias else "")
        + "; ascend_safe makes the tensors only, and drops every alias first",
        bind,
        alias,
        Defines(KV_CACHE, "_drop_tensors").find(source.our_source()),
        risk="high",
    )


def free_breaks_on_npu(sources: Sources) -> Check:
    """Unverified then, medium: "free_cache_engine breaks on NPU"."""
    name = "reference.free-cache-engine-on-npu"
    if not sources.has("vllm_ascend"):
        return _answer(name, "skip", "vllm-ascend is not there to read")
    refuses = first(
        tuple(Uses(f, "FRACTAL_NZ", "NPUWorker.wake_up", part_of_text=True) for f in ASCEND_WORKERS), sources
    )
    default = nz_default(sources)
    if refuses and default is not None and default[1] != "0":
        return _answer(
            name,
            "pass",
            "settled, and true by default: NZ layout is on unless VLLM_ASCEND_ENABLE_NZ=0, and wake_up then raises "
            "after sleep has worked; ascend_safe sets it to 0 before the worker starts",
            refuses,
            Evidence(f"vllm_ascend/envs.py:{default[0]}", f"the default is {default[1]}"),
            risk="high",
        )
    return _answer(name, "pass", "settled: this release does not refuse by default", refuses, risk="medium")


def empty_cache_on_npu(sources: Sources) -> Check:
    """Missing then: "aggressive_empty_cache() against NPU memory"."""
    name = "reference.aggressive-empty-cache"
    file = "verl/utils/memory_utils.py"
    found = Defines(file, "aggressive_empty_cache").find(sources)
    if found is None:
        return _answer(name, "skip", "verl's memory_utils is not there to read")
    device = Uses(file, "get_torch_device", "aggressive_empty_cache").find(sources)
    if device:
        summary = "settled: it asks verl's device module, so it empties the NPU's cache as well"
        return _answer(name, "pass", summary, found, device, confidence="inferred")
    return _answer(name, "stale", "it does not ask verl's device module: it may empty nothing on an NPU", found)


def guard_before_free(_: Sources) -> Check:
    """Recommended then: "a check with hasattr before the free"."""
    return _answer(
        "reference.guard-before-free",
        "pass",
        "done: the direct rung is only used where every attribute is there, and says what is missing",
        Defines(KV_CACHE, "_missing_for_direct").find(source.our_source()),
    )


REFERENCE: tuple[Question, ...] = (
    eager_by_default,
    eager_is_supported,
    internals_of_kv_cache,
    verl_patches_loaders,
    ascend_patches_something_else,
    patches_do_not_conflict,
    forward_context_in_eager,
    kv_init_conflicts,
    free_breaks_on_npu,
    empty_cache_on_npu,
    guard_before_free,
)
"""In the order of the report: six claims, three that it left unverified, one missing, one recommended."""


def nz_default(sources: Sources) -> tuple[int, str] | None:
    """Line and default of VLLM_ASCEND_ENABLE_NZ."""
    found = source.dictionary_value(sources, "vllm_ascend/envs.py", "VLLM_ASCEND_ENABLE_NZ")
    if found is None:
        return None
    for node in ast.walk(found[1]):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("getenv") and len(node.args) > 1:
            return found[0], ast.unparse(node.args[1]).strip("'\"")
    return None


def _trap(name: str, needs: str, there: str, not_there: str, risk: Risk, *places: source.Place) -> Question:
    def question(sources: Sources) -> Check:
        full = f"trap.{name}"
        if not sources.has(needs):
            return _answer(full, "skip", f"{needs} is not there to read")
        found = first(places, sources)
        return (
            _answer(full, "pass", f"yes: {there}", found, risk=risk)
            if found
            else _answer(full, "pass", f"no: {not_there}")
        )

    question.__doc__ = f"Whether this stack has the trap {name}."
    return question


TRAPS: tuple[Question, ...] = (
    _trap(
        "wake-up-transposes",
        "vllm_ascend",
        "NPUWorker.wake_up leaves experts in checkpoint form, in parameters without a loader (vllm-ascend#5915); "
        "ascend_safe settles them",
        "wake_up leaves the experts alone",
        "high",
        *(Uses(file, "transpose", "NPUWorker.wake_up") for file in ASCEND_WORKERS),
    ),
    _trap(
        "nz-refused-at-wake-up",
        "vllm_ascend",
        "weights in NZ layout are refused when the engine wakes up, after it slept; ascend_safe sets "
        "VLLM_ASCEND_ENABLE_NZ=0",
        "wake_up does not look for NZ layout",
        "high",
        *(Uses(file, "FRACTAL_NZ", "NPUWorker.wake_up", part_of_text=True) for file in ASCEND_WORKERS),
    ),
    _trap(
        "expandable-segments-refused",
        "vllm_ascend",
        "the allocator of sleep mode asserts that expandable_segments is off; ascend_safe checks it first",
        "the allocator does not look at PYTORCH_NPU_ALLOC_CONF",
        "medium",
        Uses("vllm_ascend/device_allocator/camem.py", "expandable_segments", part_of_text=True),
    ),
    _trap(
        "attention-keeps-kv-views",
        "vllm_ascend",
        "attention keeps views of the KV tensors (`impl.key_cache`): a free that forgets them frees nothing; "
        "ascend_safe drops them",
        "attention keeps no view",
        "high",
        Uses("vllm_ascend/attention/attention_v1.py", "key_cache"),
    ),
    _trap(
        "checks-the-soc",
        "vllm_ascend",
        "the worker refuses a chip that the wheel was not built for",
        "the wheel's SoC is not checked at start-up",
        "medium",
        Defines("vllm_ascend/utils.py", "check_ascend_device_type"),
        Defines("vllm_ascend/device/device_config.py", "check_ascend_device_type"),
    ),
    _trap(
        "second-bind-refused",
        "vllm",
        "binding KV tensors again is refused unless the runner's list was emptied; ascend_safe empties it in place",
        "nothing refuses it",
        "medium",
        BIND,
    ),
    _trap(
        "plug-in-failures-are-debug",
        "verl",
        "a plug-in that fails to load is a DEBUG line of verl's; ascend_safe says it as an ERROR itself",
        "verl loads no plug-ins by entry point",
        "high",
        Uses("verl/__init__.py", "debug"),
    ),
    _trap(
        "platform-npu-unknown",
        "verl",
        "verl's name for the platform is `huawei`, while its README says VERL_PLATFORM=npu; ascend_safe registers both",
        "verl has no platforms to name",
        "medium",
        Uses("verl/plugin/platform/platform_npu.py", "huawei"),
    ),
    _trap(
        "server-name-prefix",
        "verl",
        "the replica says `vllm_` whatever the rollout is called, and the adapter looks for the rollout's name; "
        "ascend_safe answers for both",
        "both have the prefix written out",
        "high",
        Defines("verl/workers/rollout/vllm_rollout/vllm_async_server.py", "vLLMReplica._get_server_name_prefix"),
    ),
    _trap(
        "batched-tokens-frozen",
        "verl",
        "verl assigns max_num_batched_tokens to a frozen config without chunked prefill; ascend_safe does it first",
        "it is not assigned",
        "medium",
        Uses(
            "verl/workers/rollout/vllm_rollout/vllm_async_server.py",
            "max_num_batched_tokens",
            "vLLMHttpServer._validate_configs",
        ),
    ),
)


def check_reference(sources: Sources) -> Iterator[Check]:
    """The QA report's claims, then the traps."""
    for question in (*REFERENCE, *TRAPS):
        started = time.perf_counter()
        check = question(sources)
        yield replace(check, seconds=time.perf_counter() - started)
