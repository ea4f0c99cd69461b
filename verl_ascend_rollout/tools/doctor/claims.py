"""What our code relies on in vLLM, vllm-ascend and verl, as data: which name, why, and who of us uses it.

Each claim is looked up in the source of the stack, without importing it, so that a name that moved is known before a
job starts.  The places of a claim are alternatives: the first is where the newest release that was read has it.
What we rely on in verl is in `integration/contract.py`.  Releases that were read: vLLM 0.11.0 to 0.28.0, vllm-ascend
0.11.0 to 0.23.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from verl_ascend_rollout.integration.contract import CONTRACT, Generation
from verl_ascend_rollout.integration.probe import files, probe
from verl_ascend_rollout.platforms.base import PlatformName
from verl_ascend_rollout.tools.doctor.source import OURS, Defines, Place, Sources, Uses, first
from verl_ascend_rollout.tools.report import Check, Evidence, Risk, Verdict


@dataclass(frozen=True)
class Claim:
    """Something that has to be there."""

    name: str  # `vllm.static-forward-context`: the package, and what is looked for
    used_by: str  # the module of ours that uses it; its path below `verl_ascend_rollout`
    why: str  # what we do with it
    lost: str  # what happens without it, as the end of a sentence
    places: tuple[Place, ...]  # where it may be; one is enough
    risk: Risk = "high"  # of going on without it; `low`: we ask for it first, and have another way
    only: tuple[PlatformName, ...] = ()  # the platforms on which we use it; empty for all
    generations: tuple[Generation, ...] = ()  # those of verl that need it; empty for all
    words: tuple[str, ...] = ()  # by which our own source may name it

    @property
    def package(self) -> str:
        """The top-level package that it is about."""
        return self.places[0].file.partition("/")[0]


def _claim(name: str, used_by: str, why: str, lost: str, *places: Place, **rest: Any) -> Claim:
    return Claim(name, used_by, why, lost, places, words=tuple(one.name.rpartition(".")[2] for one in places), **rest)


KV = "worker/kv_cache.py"
REFERENCES = "worker/kv_references.py"
LAYOUT = "worker/weights/layout.py"

WORKER = "vllm/v1/worker/gpu_worker.py"
RUNNER = "vllm/v1/worker/gpu_model_runner.py"
ATTENTION = "vllm/model_executor/layers/attention/attention.py"
OLD_ATTENTION = "vllm/attention/layer.py"
MOE = "vllm/model_executor/layers/fused_moe"
UNQUANTIZED = f"{MOE}/unquantized_fused_moe_method.py"
ASCEND_RUNNER = "vllm_ascend/worker/model_runner_v1.py"
ASCEND_WORKERS = ("vllm_ascend/worker/worker.py", "vllm_ascend/worker/worker_v1.py")
ASCEND_MOE = (
    "vllm_ascend/ops/fused_moe/fused_moe.py",
    "vllm_ascend/ops/fused_moe/routed_experts.py",
    "vllm_ascend/ops/common_fused_moe.py",
)

NO_DIRECT = "the KV cache of an engine without sleep mode is not freed"
NO_SYNC = "the second weight sync fails or is wrong"
NO_ALIAS = "a forgotten alias keeps the KV memory, or is read instead of the new cache"
NO_SLEEP = "nothing is freed where sleep mode is on"
NO_TAGS = "weights and KV cache can only be woken together"
SLEEP = "sleep mode, the second way to give the KV cache back"
TAGS = "weights come back before the KV cache"
SHAPES = "the shapes from which the KV tensors are made again"
AGAIN = "makes and binds the KV tensors again"

# One claim after the other: a table, which the formatter would give a line for each word.
# fmt: off
VLLM: tuple[Claim, ...] = (
    _claim("vllm.model-runner", "worker/lifecycle.py", "the worker's model runner has the KV cache and the model",
        "neither the KV cache nor the weights can be reached",
        Defines("vllm/v1/worker/worker_base.py", "WorkerBase.model_runner"), Defines(WORKER, "Worker.model_runner")),
    _claim("vllm.kv-caches", KV, "the list of KV tensors, emptied in place", NO_DIRECT,
        Defines(RUNNER, "GPUModelRunner.kv_caches")),
    _claim("vllm.kv-cache-config", KV, SHAPES, NO_DIRECT, Defines(RUNNER, "GPUModelRunner.kv_cache_config")),
    _claim("vllm.initialize-kv-cache-tensors", KV, AGAIN, NO_DIRECT,
        Defines(RUNNER, "GPUModelRunner.initialize_kv_cache_tensors", ("kv_cache_config",))),
    # 0.11: initialize_kv_cache_tensors takes one argument and needs none.
    _claim("vllm.kernel-block-sizes", KV, "the second argument of initialize_kv_cache_tensors, from 0.13 on", NO_DIRECT,
        Defines(RUNNER, "GPUModelRunner._kernel_block_sizes"),
        Defines(RUNNER, "GPUModelRunner._prepare_kernel_block_sizes", ("kv_cache_config",)),
        Uses(RUNNER, "initialize_kv_cache_tensors", "GPUModelRunner.initialize_kv_cache")),
    _claim("vllm.static-forward-context", REFERENCES, "names every layer that has a KV cache", NO_DIRECT,
        Defines("vllm/config/compilation.py", "CompilationConfig.static_forward_context")),
    _claim("vllm.layer-kv-cache", REFERENCES, "the alias of a KV tensor in each attention layer", NO_ALIAS,
        Defines(ATTENTION, "Attention.kv_cache"), Defines(OLD_ATTENTION, "Attention.kv_cache")),
    _claim("vllm.layer-impl", REFERENCES, "where vllm-ascend keeps further aliases of the KV tensors", NO_ALIAS,
        Defines(ATTENTION, "Attention.impl"), Defines(OLD_ATTENTION, "Attention.impl")),
    _claim("vllm.kv-zero-meta", KV, "the block zeroer has the addresses of the KV tensors",
        "there is no block zeroer to refresh in this release",
        Defines(RUNNER, "GPUModelRunner._init_kv_zero_meta"), risk="low"),
    _claim("vllm.sleep", KV, SLEEP, NO_SLEEP, Defines(WORKER, "Worker.sleep", ("level",)), only=("cuda",)),
    _claim("vllm.wake-up-by-tags", KV, TAGS, NO_TAGS, Defines(WORKER, "Worker.wake_up", ("tags",)), only=("cuda",)),
    _claim("vllm.enforce-eager", KV, "whether captured graphs may hold KV addresses", NO_DIRECT,
        Defines("vllm/config/model.py", "ModelConfig.enforce_eager")),
    _claim("vllm.enable-sleep-mode", KV, "whether the engine runs with sleep mode", "`sleep` is never chosen",
        Defines("vllm/config/model.py", "ModelConfig.enable_sleep_mode")),
    _claim("vllm.worker-extension", "integration/server.py", "how our code comes into vLLM's worker process",
        "nothing of ours runs in the worker",
        Defines("vllm/config/parallel.py", "ParallelConfig.worker_extension_cls")),
    _claim("vllm.set-current-config", "worker/lifecycle.py",
        "weights and KV tensors are made under the engine's configuration", NO_SYNC,
        Defines("vllm/config/vllm.py", "set_current_vllm_config"),
        Defines("vllm/config/__init__.py", "set_current_vllm_config")),
    _claim("vllm.initialize-model", "integration/patches/vllm.py",
        "where every model is made: the layout of each weight is recorded from there",
        f"the layouts are not known, and {NO_SYNC}",
        Uses("vllm/model_executor/model_loader/base_loader.py", "initialize_model"), only=("npu", "cpu")),
    _claim("vllm.moe-weight-loader", "worker/weights/expert_format.py",
        "loads one expert's shard; on FusedMoE until 0.23, on RoutedExperts from 0.24",
        "expert weights cannot be loaded a second time",
        Defines(f"{MOE}/routed_experts.py", "RoutedExperts.weight_loader"),
        Defines(f"{MOE}/layer.py", "FusedMoE.weight_loader")),
    _claim("vllm.moe-process-weights", LAYOUT, "turns expert weights into the kernel's layout", NO_SYNC,
        *(Defines(file, "UnquantizedFusedMoEMethod.process_weights_after_loading")
          for file in (UNQUANTIZED, f"{MOE}/layer.py"))),
    _claim("vllm.linear-process-weights", LAYOUT, "turns linear weights into the kernel's layout", NO_SYNC,
        Uses("vllm/model_executor/layers/linear.py", "process_weights_after_loading"), only=("npu", "cpu")),
    _claim("vllm.qwen2-moe", "worker/weights/load.py", "the model of the recipes",
        "the recipes' model cannot be loaded",
        Uses("vllm/model_executor/models/qwen2_moe.py", "load_weights", "Qwen2MoeForCausalLM"), risk="medium"),
    _claim("vllm.moe-kernel", "worker/weights/staging.py",
        "experts are packed anew only once their method has no kernel", NO_SYNC,
        Uses(UNQUANTIZED, "moe_kernel", "UnquantizedFusedMoEMethod"), only=("cpu",)),
    _claim("vllm.general-plugins", "plugin.py", "the entry points that vLLM loads in each of its processes",
        f"weight layouts are not recorded, and {NO_SYNC}", Uses("vllm/plugins/__init__.py", "vllm.general_plugins")),
)

ASCEND: tuple[Claim, ...] = (
    _claim("vllm-ascend.sleep", KV, SLEEP, NO_SLEEP,
        *(Defines(file, "NPUWorker.sleep", ("level",)) for file in ASCEND_WORKERS)),
    _claim("vllm-ascend.wake-up-by-tags", KV, TAGS, NO_TAGS,
        *(Defines(file, "NPUWorker.wake_up", ("tags",)) for file in ASCEND_WORKERS)),
    _claim("vllm-ascend.initialize-kv-cache-tensors", KV, AGAIN, NO_DIRECT,
        Defines(ASCEND_RUNNER, "NPUModelRunner.initialize_kv_cache_tensors", ("kv_cache_config",))),
    _claim("vllm-ascend.kv-cache-config", KV, SHAPES, NO_DIRECT,
        Defines(ASCEND_RUNNER, "NPUModelRunner.kv_cache_config")),
    _claim("vllm-ascend.key-cache-alias", REFERENCES,
        "a view of the KV tensor that attention keeps, and that a free has to drop",
        "if the alias has another name now, a free keeps the memory",
        Uses("vllm_ascend/attention/attention_v1.py", "key_cache")),
    _claim("vllm-ascend.moe-process-weights", LAYOUT, "transposes expert weights into the kernel's layout", NO_SYNC,
        *(Defines(file, "AscendUnquantizedFusedMoEMethod.process_weights_after_loading") for file in ASCEND_MOE)),
    _claim("vllm-ascend.nz-variable", "policy/npu.py",
        "keeps weights out of NZ layout, which a weight sync cannot write",
        "weights may be in NZ layout, and wake_up refuses them",
        Uses("vllm_ascend/envs.py", "VLLM_ASCEND_ENABLE_NZ"), Uses("vllm_ascend/ascend_config.py", "weight_nz_mode")),
    _claim("vllm-ascend.camem", "policy/kv_release.py", "the allocator of sleep mode", "there is no sleep mode",
        Defines("vllm_ascend/device_allocator/camem.py", "CaMemAllocator")),
)
# fmt: on

# The top package is no module.
VERL: tuple[Claim, ...] = tuple(
    Claim(
        f"verl.{symbol.key}",
        symbol.used_by,
        symbol.why,
        symbol.lost,
        (Defines(files(symbol.module)["." not in symbol.module], symbol.name, symbol.parameters, symbol.expression),),
        "high" if symbol.required else "low",
        symbol.only,
        symbol.generations,
        symbol.words,
    )
    for symbol in CONTRACT
)

ALL = (*VLLM, *ASCEND, *VERL)
"""Every claim."""


def check_claims(sources: Sources, platform: PlatformName) -> Iterator[Check]:
    """One check a claim."""
    generation = probe(sources.tree).generation if sources.has("verl") else None
    for claim in ALL:
        if claim.generations and generation not in claim.generations:
            yield Check(claim.name, "skip", f"not needed: this verl is of the generation {generation!r}")
        else:
            yield _check(sources, platform, claim)


def _check(sources: Sources, platform: PlatformName, claim: Claim) -> Check:
    def answer(verdict: Verdict, summary: str, *evidence: Evidence, advice: str = "") -> Check:
        return Check(claim.name, verdict, summary, evidence, "read", claim.risk, advice)

    if not sources.has(claim.package):
        return answer("skip", f"{claim.package} is not there to read")
    file = f"{OURS}/{claim.used_by}"
    use = first((Uses(file, word) for word in claim.words), sources)
    ours = Evidence(use.where if use else file, f"uses it: {claim.why}")
    found = first(claim.places, sources)
    if found is not None:
        return answer("pass", claim.why, found, ours)
    looked = "; ".join(dict.fromkeys(f"{place} in {place.file}" for place in claim.places))
    if claim.only and platform not in claim.only:
        return answer("skip", f"not there ({looked}), and used on {' and '.join(claim.only)} only", ours)
    missing = Evidence(claim.places[0].file, f"not found: {looked}")
    if claim.risk == "low":
        return answer("pass", f"{claim.lost}; it is asked for before it is used", missing, ours)
    advice = "use a release that docs/stacks.md lists with this claim, or a newer verl-ascend-rollout"
    return answer("fail", f"not there: {looked}; {claim.lost}", missing, ours, advice=advice)
