"""What our code relies on in vLLM, verl and vllm-ascend, as data: which name, why, and who of us uses it.

Each claim is looked up in the source of the stack, without importing it, so that a name that moved is known before a
job starts.  The places of a claim are alternatives: the first is where the newest release that was read has it.
Releases that were read: vLLM 0.11.0 to 0.28.0, verl 0.7.1 to 0.9.1, vllm-ascend 0.11.0 to 0.23.0.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from verl_ascend_rollout.checks.doctor.source import OURS, Assigns, Defines, Place, Sources, Uses, first, our_source
from verl_ascend_rollout.platforms.base import PlatformName
from verl_ascend_rollout.report import Check, Evidence, Risk, timed


@dataclass(frozen=True)
class Claim:
    """Something that has to be there.

    Attributes:
        name: `vllm.static-forward-context`: the package, and what is looked for.
        places: where it may be; one is enough.
        why: what we do with it.
        used_by: the module of ours that does; its path below `verl_ascend_rollout`.
        lost: what happens without it, as the end of a sentence.
        risk: of going on without it.
        only: the platforms on which we use it; empty for all.
        optional: we ask for it before we use it, and have another way: without it there is a warning at most.
    """

    name: str
    places: tuple[Place, ...]
    why: str
    used_by: str
    lost: str
    risk: Risk = "high"
    only: tuple[PlatformName, ...] = ()
    optional: bool = False

    @property
    def package(self) -> str:
        """The top-level package that it is about."""
        return self.places[0].file.partition("/")[0]


WORKER = "vllm/v1/worker/gpu_worker.py"
WORKER_BASE = "vllm/v1/worker/worker_base.py"
RUNNER = "vllm/v1/worker/gpu_model_runner.py"
CPU_RUNNER = "vllm/v1/worker/cpu_model_runner.py"
ATTENTION = "vllm/model_executor/layers/attention/attention.py"
OLD_ATTENTION = "vllm/attention/layer.py"
MOE = "vllm/model_executor/layers/fused_moe"

NO_DIRECT = "the KV cache of an engine without sleep mode is not freed"
NO_SYNC = "the second weight sync fails or is wrong"

VLLM: tuple[Claim, ...] = (
    Claim(
        "vllm.model-runner",
        (Assigns(WORKER_BASE, "WorkerBase", "model_runner"), Assigns(WORKER, "Worker", "model_runner")),
        "the worker's model runner has the KV cache and the model",
        "worker/lifecycle.py",
        "neither the KV cache nor the weights can be reached",
    ),
    Claim(
        "vllm.kv-caches",
        (Assigns(RUNNER, "GPUModelRunner", "kv_caches"),),
        "the list of KV tensors, emptied in place",
        "worker/kv_cache.py",
        NO_DIRECT,
    ),
    Claim(
        "vllm.kv-cache-config",
        (Assigns(RUNNER, "GPUModelRunner", "kv_cache_config"),),
        "the shapes from which the KV tensors are made again",
        "worker/kv_cache.py",
        NO_DIRECT,
    ),
    Claim(
        "vllm.initialize-kv-cache-tensors",
        (Defines(RUNNER, "GPUModelRunner.initialize_kv_cache_tensors", ("kv_cache_config",)),),
        "makes and binds the KV tensors again",
        "worker/kv_cache.py",
        NO_DIRECT,
    ),
    Claim(
        "vllm.kernel-block-sizes",
        (
            Assigns(RUNNER, "GPUModelRunner", "_kernel_block_sizes"),
            # 0.11: initialize_kv_cache_tensors takes one argument and needs none.
            Uses(RUNNER, "initialize_kv_cache_tensors", "GPUModelRunner.initialize_kv_cache"),
        ),
        "the second argument of initialize_kv_cache_tensors, from 0.13 on",
        "worker/kv_cache.py",
        NO_DIRECT,
    ),
    Claim(
        "vllm.static-forward-context",
        (Defines("vllm/config/compilation.py", "CompilationConfig.static_forward_context"),),
        "names every layer that has a KV cache",
        "worker/kv_aliases.py",
        NO_DIRECT,
    ),
    Claim(
        "vllm.layer-kv-cache",
        (Assigns(ATTENTION, "Attention", "kv_cache"), Assigns(OLD_ATTENTION, "Attention", "kv_cache")),
        "the alias of a KV tensor in each attention layer",
        "worker/kv_aliases.py",
        "a forgotten alias keeps the KV memory, or is read instead of the new cache",
    ),
    Claim(
        "vllm.layer-impl",
        (Assigns(ATTENTION, "Attention", "impl"), Assigns(OLD_ATTENTION, "Attention", "impl")),
        "where vllm-ascend keeps further aliases of the KV tensors",
        "worker/kv_aliases.py",
        "a forgotten alias keeps the KV memory, or is read instead of the new cache",
    ),
    Claim(
        "vllm.kv-zero-meta",
        (Defines(RUNNER, "GPUModelRunner._init_kv_zero_meta"),),
        "the block zeroer has the addresses of the KV tensors",
        "worker/kv_cache.py",
        "there is no block zeroer to refresh in this release",
        "low",
        optional=True,
    ),
    Claim(
        "vllm.sleep",
        (Defines(WORKER, "Worker.sleep", ("level",)),),
        "sleep mode, the second rung of the KV-cache ladder",
        "worker/kv_cache.py",
        "nothing is freed where sleep mode is on",
        only=("cuda",),
    ),
    Claim(
        "vllm.wake-up-by-tags",
        (Defines(WORKER, "Worker.wake_up", ("tags",)),),
        "weights come back before the KV cache",
        "worker/kv_cache.py",
        "weights and KV cache can only be woken together",
        only=("cuda",),
    ),
    Claim(
        "vllm.enforce-eager",
        (Defines("vllm/config/model.py", "ModelConfig.enforce_eager"),),
        "whether captured graphs may hold KV addresses",
        "worker/kv_cache.py",
        NO_DIRECT,
    ),
    Claim(
        "vllm.enable-sleep-mode",
        (Defines("vllm/config/model.py", "ModelConfig.enable_sleep_mode"),),
        "whether the engine runs with sleep mode",
        "worker/kv_cache.py",
        "the sleep rung is never chosen",
    ),
    Claim(
        "vllm.worker-extension",
        (Defines("vllm/config/parallel.py", "ParallelConfig.worker_extension_cls"),),
        "how our code comes into vLLM's worker process",
        "server/http_server.py",
        "nothing of ours runs in the worker",
    ),
    Claim(
        "vllm.set-current-config",
        (
            Defines("vllm/config/vllm.py", "set_current_vllm_config"),
            Defines("vllm/config/__init__.py", "set_current_vllm_config"),
        ),
        "weights and KV tensors are made under the engine's configuration",
        "worker/lifecycle.py",
        NO_SYNC,
    ),
    Claim(
        "vllm.initialize-model",
        (Uses("vllm/model_executor/model_loader/base_loader.py", "initialize_model"),),
        "where every model is made: the layout of each weight is recorded from there",
        "worker/weights/layout.py",
        "the layouts are not known, and " + NO_SYNC,
        only=("npu", "cpu"),
    ),
    Claim(
        "vllm.moe-weight-loader",
        (
            Defines(f"{MOE}/routed_experts.py", "RoutedExperts.weight_loader"),
            Defines(f"{MOE}/layer.py", "FusedMoE.weight_loader"),
        ),
        "loads one expert's shard; on FusedMoE until 0.23, on RoutedExperts from 0.24",
        "worker/weights/moe.py",
        "expert weights cannot be loaded a second time",
    ),
    Claim(
        "vllm.moe-process-weights",
        (
            Defines(
                f"{MOE}/unquantized_fused_moe_method.py", "UnquantizedFusedMoEMethod.process_weights_after_loading"
            ),
            Defines(f"{MOE}/layer.py", "UnquantizedFusedMoEMethod.process_weights_after_loading"),
        ),
        "turns expert weights into the kernel's layout",
        "worker/weights/layout.py",
        NO_SYNC,
    ),
    Claim(
        "vllm.linear-process-weights",
        (Uses("vllm/model_executor/layers/linear.py", "process_weights_after_loading"),),
        "turns linear weights into the kernel's layout",
        "worker/weights/layout.py",
        NO_SYNC,
        only=("npu", "cpu"),
    ),
    Claim(
        "vllm.qwen2-moe",
        (Uses("vllm/model_executor/models/qwen2_moe.py", "load_weights", "Qwen2MoeForCausalLM"),),
        "the model of the recipes",
        "worker/weights/by_loader.py",
        "the recipes' model cannot be loaded",
        "medium",
    ),
    Claim(
        "vllm.moe-kernel",
        (Uses(f"{MOE}/unquantized_fused_moe_method.py", "moe_kernel", "UnquantizedFusedMoEMethod"),),
        "experts are packed anew only once their method has no kernel",
        "worker/weights/staging.py",
        NO_SYNC,
        only=("cpu",),
    ),
    Claim(
        "vllm.general-plugins",
        (Uses("vllm/plugins/__init__.py", "vllm.general_plugins"),),
        "the entry points that vLLM loads in each of its processes",
        "plugin.py",
        "weight layouts are not recorded, and " + NO_SYNC,
    ),
)

SERVER = "verl/workers/rollout/vllm_rollout/vllm_async_server.py"
EXTENSION = "verl/workers/rollout/vllm_rollout/utils.py"
ADAPTER = "verl/workers/rollout/vllm_rollout/vllm_rollout.py"
BUCKETS = "verl/workers/rollout/vllm_rollout/bucketed_weight_transfer.py"
PLATFORM = "verl/plugin/platform/platform_manager.py"

NO_START = "the rollout server does not start"


def _server(method: str, why: str, *parameters: str, lost: str = NO_START) -> Claim:
    name = f"verl.server.{method.strip('_').replace('_', '-')}"
    return Claim(name, (Defines(SERVER, f"vLLMHttpServer.{method}", parameters),), why, "server/http_server.py", lost)


VERL: tuple[Claim, ...] = (
    Claim(
        "verl.plugins",
        (Uses("verl/__init__.py", "verl.plugins"),),
        "verl loads our plug-in by its entry point, from 0.9.0 on",
        "plugin.py",
        "the rollout is not registered in verl's processes",
    ),
    Claim(
        "verl.rollout-registry",
        (Defines("verl/workers/rollout/base.py", "_ROLLOUT_REGISTRY"),),
        "names the trainer worker's class",
        "plugin.py",
        "the rollout is unknown to the trainer worker",
    ),
    Claim(
        "verl.replica-registry",
        (Defines("verl/workers/rollout/replica.py", "RolloutReplicaRegistry.register", ("name", "loader")),),
        "names the replica that the task runner starts",
        "plugin.py",
        "the rollout is unknown to the task runner",
    ),
    _server("_init_config", "our defaults are filled in"),
    _server("_init_model_config", "LoRA is known before the policy decides"),
    _server("_preprocess_engine_kwargs", "the policy's decisions become engine arguments", "engine_kwargs"),
    _server(
        "_resolve_sleep_level", "the policy decides the sleep level", lost="level 2 may be used where it loses weights"
    ),
    _server("_get_worker_extension_cls", "our worker extension is named"),
    _server("run_server", "workers are configured when the engine is up", "args"),
    _server("sleep", "memory is given back for training"),
    _server("wake_up", "memory is taken again, by tag", "tags"),
    _server("release_kv_cache", "the KV cache alone is freed", lost="a disaggregated trainer cannot free the KV cache"),
    _server(
        "resume_kv_cache", "the KV cache alone is restored", lost="a disaggregated trainer cannot restore the KV cache"
    ),
    _server("abort_all_requests", "a sync in doubt refuses to generate"),
    _server("generate", "a sync in doubt refuses to generate"),
    _server("collective_rpc", "calls our methods on every worker", "method"),
    Claim(
        "verl.replica.name-prefix",
        (Defines(SERVER, "vLLMReplica._get_server_name_prefix"),),
        "the actor's name begins with the rollout's",
        "server/replica.py",
        "the trainer looks for a server that does not exist",
    ),
    Claim(
        "verl.adapter.name-prefix",
        (Defines(ADAPTER, "ServerAdapter._get_server_name_prefix"),),
        "the adapter finds its server by that name",
        "trainer/adapter.py",
        "the trainer looks for a server that does not exist",
    ),
    Claim(
        "verl.adapter.update-weights",
        (Defines(ADAPTER, "ServerAdapter.update_weights", ("weights", "wire_format")),),
        "weights go out through our transport",
        "trainer/adapter.py",
        "a weight sync fails",
    ),
    Claim(
        "verl.extension.update-weights",
        (
            Defines(
                EXTENSION,
                "vLLMColocateWorkerExtension.update_weights_from_ipc",
                ("peft_config", "base_sync_done", "use_shm"),
            ),
        ),
        "weights come in through our bracket",
        "worker/extension.py",
        NO_SYNC,
    ),
    Claim(
        "verl.extension.zmq-handle",
        (Defines(EXTENSION, "vLLMColocateWorkerExtension._get_zmq_handle"),),
        "where verl's own transport meets",
        "worker/extension.py",
        "a weight sync by verl's transport fails",
    ),
    Claim(
        "verl.extension.mtp-drafter",
        (Defines(EXTENSION, "vLLMColocateWorkerExtension._use_mtp_drafter_weight_sync"),),
        "a drafter's weights are refused instead of left stale",
        "worker/extension.py",
        "a weight sync fails",
        only=("npu", "cpu"),
    ),
    Claim(
        "verl.bucketed-receiver",
        (Defines(BUCKETS, "BucketedWeightReceiver.receive_weights", ("on_bucket_received",)),),
        "receives weights by verl's own transport",
        "worker/extension.py",
        "a weight sync by verl's transport fails",
    ),
    Claim(
        "verl.bucketed-sender",
        (Defines(BUCKETS, "BucketedWeightSender.async_send_weights", ("weights",)),),
        "sends weights by verl's own transport, watching the receiver",
        "trainer/weight_sender.py",
        "a weight sync by verl's transport fails",
    ),
    Claim(
        "verl.async-iterator",
        (Defines("verl/workers/rollout/utils.py", "ensure_async_iterator"),),
        "weights come as an iterator of either kind",
        "trainer/weight_sender.py",
        "a weight sync fails",
    ),
    Claim(
        "verl.platforms",
        (
            Defines("verl/plugin/platform/platform_manager.py", "PlatformRegistry.register"),
            Defines(PLATFORM, "PlatformRegistry"),
        ),
        "the platform `cpu` is registered, and `npu` and `cuda` as names",
        "trainer/cpu_platform.py",
        "verl does not run on a CPU, and refuses VERL_PLATFORM=npu",
        only=("cpu", "npu"),
    ),
)

ASCEND_WORKER = "vllm_ascend/worker/worker.py"
OLD_ASCEND_WORKER = "vllm_ascend/worker/worker_v1.py"
ASCEND_RUNNER = "vllm_ascend/worker/model_runner_v1.py"

ASCEND: tuple[Claim, ...] = (
    Claim(
        "vllm-ascend.sleep",
        (
            Defines(ASCEND_WORKER, "NPUWorker.sleep", ("level",)),
            Defines(OLD_ASCEND_WORKER, "NPUWorker.sleep", ("level",)),
        ),
        "sleep mode, the second rung of the KV-cache ladder",
        "worker/kv_cache.py",
        "nothing is freed where sleep mode is on",
    ),
    Claim(
        "vllm-ascend.wake-up-by-tags",
        (
            Defines(ASCEND_WORKER, "NPUWorker.wake_up", ("tags",)),
            Defines(OLD_ASCEND_WORKER, "NPUWorker.wake_up", ("tags",)),
        ),
        "weights come back before the KV cache",
        "worker/kv_cache.py",
        "weights and KV cache can only be woken together",
    ),
    Claim(
        "vllm-ascend.initialize-kv-cache-tensors",
        (Defines(ASCEND_RUNNER, "NPUModelRunner.initialize_kv_cache_tensors", ("kv_cache_config",)),),
        "makes and binds the KV tensors again",
        "worker/kv_cache.py",
        NO_DIRECT,
    ),
    Claim(
        "vllm-ascend.kv-cache-config",
        (Assigns(ASCEND_RUNNER, "NPUModelRunner", "kv_cache_config"),),
        "the shapes from which the KV tensors are made again",
        "worker/kv_cache.py",
        NO_DIRECT,
    ),
    Claim(
        "vllm-ascend.key-cache-alias",
        (Uses("vllm_ascend/attention/attention_v1.py", "key_cache"),),
        "a view of the KV tensor that attention keeps, and that a free has to drop",
        "worker/kv_aliases.py",
        "if the alias has another name now, a free keeps the memory",
    ),
    Claim(
        "vllm-ascend.moe-process-weights",
        (
            Defines(
                "vllm_ascend/ops/fused_moe/fused_moe.py",
                "AscendUnquantizedFusedMoEMethod.process_weights_after_loading",
            ),
            Defines(
                "vllm_ascend/ops/fused_moe/routed_experts.py",
                "AscendUnquantizedFusedMoEMethod.process_weights_after_loading",
            ),
            Defines(
                "vllm_ascend/ops/common_fused_moe.py", "AscendUnquantizedFusedMoEMethod.process_weights_after_loading"
            ),
        ),
        "transposes expert weights into the kernel's layout",
        "worker/weights/layout.py",
        NO_SYNC,
    ),
    Claim(
        "vllm-ascend.nz-variable",
        (
            Uses("vllm_ascend/envs.py", "VLLM_ASCEND_ENABLE_NZ"),
            Uses("vllm_ascend/ascend_config.py", "weight_nz_mode"),
        ),
        "keeps weights out of NZ layout, which a weight sync cannot write",
        "policy_npu.py",
        "weights may be in NZ layout, and wake_up refuses them",
    ),
    Claim(
        "vllm-ascend.camem",
        (Defines("vllm_ascend/device_allocator/camem.py", "CaMemAllocator"),),
        "the allocator of sleep mode",
        "policy.py",
        "there is no sleep mode",
    ),
)


def compat_claims() -> tuple[Claim, ...]:
    """The places in verl where `ascend_safe` is answered for as `vllm`; see `compat.PATCHES`."""
    from verl_ascend_rollout.compat import PATCHES

    return tuple(
        Claim(
            f"verl.name.{patch.attribute.rpartition('.')[0] or patch.attribute}",
            tuple(
                Defines(file, patch.attribute, patch.parameters)
                for file in (f"{patch.module.replace('.', '/')}.py", f"{patch.module.replace('.', '/')}/__init__.py")
            ),
            "verl compares the rollout's name with `vllm` here, and is answered for ours",
            "compat.py",
            "verl may treat ascend_safe differently from vllm, so it refuses to start",
        )
        for patch in PATCHES
    )


def all_claims() -> tuple[Claim, ...]:
    """Every claim; the ones of `compat` only where its dependencies can be imported."""
    try:
        return (*VLLM, *ASCEND, *VERL, *compat_claims())
    except ImportError:
        return (*VLLM, *ASCEND, *VERL)


def check_claims(sources: Sources, platform: PlatformName, claims: tuple[Claim, ...]) -> Iterator[Check]:
    """One check a claim."""
    ours = our_source()
    for claim in claims:
        started = time.perf_counter()
        check = _check(sources, ours, platform, claim)
        yield timed(check, time.perf_counter() - started)


def _check(sources: Sources, our: Sources, platform: PlatformName, claim: Claim) -> Check:
    def answer(verdict: str, summary: str, *evidence: Evidence, advice: str = "") -> Check:
        return Check(claim.name, verdict, summary, evidence, "read", claim.risk, advice)  # type: ignore[arg-type]

    if not sources.has(claim.package):
        return answer("skip", f"{claim.package} is not there to read")
    found = first(claim.places, sources)
    file = f"{OURS}/{claim.used_by}"
    use = first(tuple(Uses(file, _word(place)) for place in claim.places), our)
    ours = Evidence(use.where if use else file, f"uses it: {claim.why}")
    if found is not None:
        return answer("pass", claim.why, found, ours)
    looked = "; ".join(dict.fromkeys(_wanted(place) for place in claim.places))
    if claim.only and platform not in claim.only:
        return answer("skip", f"not there ({looked}), and used on {' and '.join(claim.only)} only", ours)
    missing = Evidence(f"{claim.places[0].file}", f"not found: {looked}")
    if claim.optional:
        return answer("pass", f"{claim.lost}; it is asked for before it is used", missing, ours)
    return answer(
        "fail",
        f"not there: {looked}; {claim.lost}",
        missing,
        ours,
        advice="use a release that docs/stacks.md lists with this claim, or a newer verl-ascend-rollout",
    )


def _wanted(place: Place) -> str:
    if isinstance(place, Defines):
        takes = f" with {' and '.join(place.parameters)}" if place.parameters else ""
        return f"{place.name}{takes} in {place.file}"
    if isinstance(place, Assigns):
        return f"{place.owner}.{place.attribute} in {place.file}"
    return f"{_word(place)} in {place.file}"


def _word(place: Place) -> str:
    """The word by which our own source names it."""
    if isinstance(place, Defines):
        return place.name.rpartition(".")[2]
    if isinstance(place, Assigns):
        return place.attribute
    return place.word if isinstance(place, Uses) else place.text
