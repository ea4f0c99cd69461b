"""The claims of a QA report on verl's vLLM rollout in eager mode on Ascend NPUs (2025-12-25), on the stack at hand.

That report was written by hand, for verl 0.6 with vLLM 0.11.  Each of its claims is looked up again here: it holds, a
worry of it is settled, or it went stale, and then with what is there now.  `TRAPS` are what reading the sources has
found since: whether this stack has it, and what ascend_safe does about it.  All of these pass: ascend_safe rests on
none of them, but whoever goes by that report should know.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from verl_ascend_rollout.policy.decision import Confidence
from verl_ascend_rollout.tools.doctor.claims import ASCEND_WORKERS, ATTENTION, KV, MOE, OLD_ATTENTION
from verl_ascend_rollout.tools.doctor.source import OURS, Defines, Sources, Uses, first
from verl_ascend_rollout.tools.report import Check, Evidence, Risk

STALE = "stale:"
"""In the summary of a claim that no longer holds."""


@dataclass(frozen=True)
class Says:
    """A line of a file that has a piece of text in it, for what is no name: `assert len(runner_kv_caches)`."""

    file: str
    name: str

    def __str__(self) -> str:
        return self.name

    def find(self, sources: Sources) -> Evidence | None:
        """Return the first such line."""
        lines = enumerate((sources.read(self.file) or "").splitlines(), 1)
        return next(
            (Evidence(f"{self.file}:{number}", line.strip()) for number, line in lines if self.name in line), None
        )


Place = Defines | Uses | Says


@dataclass(frozen=True)
class Answer:
    """What is said of a claim, where certain places are in the source.

    Attributes:
        summary: one sentence.
        found: of each group of alternatives one place has to be there.
        also: further evidence, where it is there.
        gone: further evidence, whether it is there or not; the summary may have those that are not, as `{gone}`.
    """

    summary: str
    found: tuple[tuple[Place, ...], ...] = ()
    also: tuple[Place, ...] = ()
    gone: tuple[Place, ...] = ()
    risk: Risk = "low"
    confidence: Confidence = "read"


@dataclass(frozen=True)
class Question:
    """A claim: the first of its answers that fits is given.

    Attributes:
        name: of the check.
        said: what the report says, and where it saw that; of a trap, nothing.
        packages: what has to be there to read.
        answers: in this order.
    """

    name: str
    said: str
    packages: tuple[str, ...]
    answers: tuple[Answer, ...]

    def ask(self, sources: Sources) -> Check:
        """Look it up."""
        missing = [package for package in self.packages if not sources.has(package)]
        for answer in () if missing else self.answers:
            found = [first(places, sources) for places in answer.found]
            if None in found:
                continue
            gone = [place for place in answer.gone if first([place], sources) is None]
            found += [first([place], sources) for place in (*answer.also, *answer.gone)]
            found += [Evidence(place.file, f"has no {place}") for place in gone]
            summary = answer.summary.replace("{gone}", " and ".join(map(str, gone)))
            evidence = tuple(one for one in found if one is not None)
            return Check(self.name, "pass", summary, evidence, answer.confidence, answer.risk)
        what = " and ".join(missing) or "what it is about"
        return Check(self.name, "skip", f"{what} is not there to read", (), "read", "low")


def _claim(name: str, said: str, packages: tuple[str, ...], *answers: Answer) -> Question:
    return Question(f"reference.{name}", said, packages, answers)


def _trap(name: str, package: str, there: str, not_there: str, risk: Risk, *places: Place) -> Question:
    yes = Answer(f"yes: {there}", (places,), risk=risk)
    return Question(f"trap.{name}", "", (package,), (yes, Answer(f"no: {not_there}")))


BIND = Says("vllm/v1/worker/utils.py", "assert len(runner_kv_caches)")
EAGER = Defines("verl/workers/config/rollout.py", "RolloutConfig.enforce_eager")
YAML = Says("verl/trainer/config/rollout/rollout.yaml", "enforce_eager:")
TORCHAIR = Uses("vllm_ascend/ascend_config.py", "torchair_graph_config")
RECIPE = (
    Defines("vllm/config/compilation.py", "CompilationConfig.static_forward_context"),
    Uses("vllm/envs.py", "VLLM_USE_V1"),
    Defines("verl/workers/rollout/vllm_rollout/vllm_rollout_spmd.py", "vLLMRollout"),
)
MOE_PATCH = Defines("verl/utils/vllm/patch.py", "patch_vllm_moe_model_weight_loader")
LINEAR_PATCH = Uses("vllm_ascend/patch/worker/patch_weight_loader.py", "UnquantizedLinearMethod")
LATER_PATCH = Uses("vllm_ascend/patch/worker/patch_process_weights_after_loading.py", "process_weights_after_loading")
NPU_PATCH = "verl/utils/vllm/npu_vllm_patch.py"
KEY_CACHE = Uses("vllm_ascend/attention/attention_v1.py", "key_cache")
REFUSES_NZ = tuple(Uses(file, "FRACTAL_NZ", "NPUWorker.wake_up", part_of_text=True) for file in ASCEND_WORKERS)
NZ_BY_DEFAULT = tuple(
    Defines("vllm_ascend/envs.py", f'os.getenv("VLLM_ASCEND_ENABLE_NZ", {value})', expression=True)
    for value in ("1", "'1'")
)
EMPTY_CACHE = Defines("verl/utils/memory_utils.py", "aggressive_empty_cache")
SERVER = "verl/workers/rollout/vllm_rollout/vllm_async_server.py"
DROPS = Defines(f"{OURS}/{KV}", "_drop_tensors")
REGISTERS = "static_forward_context[prefix] = self"
BOUND = "settled, and true: a second initialize_kv_cache is refused by an assertion"
MAKES = "; ascend_safe makes the tensors only, and drops every alias first"

# A table, which the formatter would give a line for each word.
# fmt: off
REFERENCE: tuple[Question, ...] = (
    _claim("eager-by-default", "enforce_eager defaults to True (verl workers/config/rollout.py:143)", ("verl",),
        Answer("holds for the dataclass; a hydra job gets the YAML's value instead",
            ((Defines(EAGER.file, EAGER.name, value="True"),),), (YAML,)),
        Answer(f"{STALE} False is the default now, in the dataclass too; ascend_safe decides it by SoC and release",
            ((EAGER,),), (YAML,), risk="medium")),
    _claim("ascend-eager", "vllm-ascend supports eager mode: torchair graphs and eager together raise "
        "(ascend_config.py:277-286)", ("vllm_ascend",),
        Answer("holds: torchair graphs and eager mode are told apart", ((TORCHAIR,),),
            (Uses(TORCHAIR.file, "enforce_eager"),)),
        Answer(f"{STALE} eager mode is supported, but torchair is gone, and the conflict with it",
            also=(Uses("vllm_ascend/platform.py", "enforce_eager"),), gone=(TORCHAIR,))),
    _claim("kv-internals", "KV-cache management reaches into vLLM internals (r1_ascend, vllm_rollout_spmd.py:260-289)",
        ("vllm",),
        Answer("holds: what the recipe reaches for is there", tuple((place,) for place in RECIPE), risk="medium"),
        Answer(f"{STALE} what the recipe reaches for is not all there: gone is {{gone}}", gone=RECIPE, risk="medium")),
    _claim("verl-moe-loaders", "verl patches MoE weight loaders (utils/vllm/patch.py:125-190)", ("verl",),
        Answer(f"{STALE} the function is there and does nothing, since this vLLM has the loader on RoutedExperts, and "
            "a module without one is passed over in silence; ascend_safe re-attaches loaders itself on NPU",
            ((MOE_PATCH,), (Defines(f"{MOE}/routed_experts.py", "RoutedExperts.weight_loader"),)),
            (Uses(MOE_PATCH.file, "weight_loader", MOE_PATCH.name, part_of_text=True),), risk="high"),
        Answer("holds", ((MOE_PATCH,),), risk="high"),
        Answer(f"{STALE} the function is gone", gone=(MOE_PATCH,), risk="high")),
    _claim("ascend-linear-patch", "vllm-ascend patches a different thing (patch/worker/patch_weight_loader.py:41), so "
        "the two do not conflict", ("vllm_ascend",),
        Answer("holds: it replaces UnquantizedLinearMethod.create_weights", ((LINEAR_PATCH,),)),
        Answer(f"{STALE} the patch is gone; this release replaces vLLM's process_weights_after_loading instead, so "
            "that it is imported late here", ((LATER_PATCH,),), gone=(LINEAR_PATCH,)),
        Answer(f"{STALE} the patch is gone", gone=(LINEAR_PATCH,))),
    _claim("patches-do-not-conflict", "the two have different targets (verl's NPU wrapper, by shapes, came later)",
        ("vllm_ascend", "verl"),
        Answer(f"{STALE} verl wraps the experts' loader on NPU and tells the layout by its shape, which is silently "
            "wrong where hidden == 2 * intermediate / tp; ascend_safe goes by a record instead",
            ((Defines(NPU_PATCH, "vllm_v013_weight_loader_method_wrapper"),
              Uses(NPU_PATCH, "_verl_npu_weight_loader_patched")),), risk="high"),
        Answer("holds: verl sets loaders on MoE parameters, vllm-ascend creates linear weights", also=(MOE_PATCH,),
            confidence="inferred")),
    _claim("forward-context-in-eager", "unverified, medium: static_forward_context is unavailable in eager mode",
        ("vllm",),
        *(Answer(f"{STALE} Attention asks for eager mode where it registers itself",
            ((Says(file, REGISTERS),), (Uses(file, "enforce_eager", "Attention.__init__"),)))
          for file in (ATTENTION, OLD_ATTENTION)),
        Answer("settled: every attention layer registers itself when it is made, eager or not",
            (tuple(Says(file, REGISTERS) for file in (ATTENTION, OLD_ATTENTION)),))),
    _claim("kv-init-conflict", "unverified, high: KV init conflicts with vllm-ascend", ("vllm",),
        Answer(f"{BOUND}, and vllm-ascend's attention goes on with the cache that it kept{MAKES}",
            ((BIND,), (KEY_CACHE,), (DROPS,)), risk="high"),
        Answer(f"{BOUND}{MAKES}", ((BIND,), (DROPS,)), risk="high")),
    _claim("free-cache-engine-on-npu", "unverified, medium: free_cache_engine breaks on NPU", ("vllm_ascend",),
        Answer("settled, and true by default: NZ layout is on unless VLLM_ASCEND_ENABLE_NZ=0, and wake_up then raises "
            "after sleep has worked; ascend_safe sets it to 0 before the worker starts",
            (REFUSES_NZ, NZ_BY_DEFAULT), risk="high"),
        Answer("settled: this release does not refuse by default", also=REFUSES_NZ, risk="medium")),
    _claim("aggressive-empty-cache", "missing: aggressive_empty_cache() against NPU memory", ("verl",),
        Answer("settled: it asks verl's device module, so it empties the NPU's cache as well",
            ((EMPTY_CACHE,), (Uses(EMPTY_CACHE.file, "get_torch_device", EMPTY_CACHE.name),)), confidence="inferred"),
        Answer(f"{STALE} it does not ask verl's device module: it may empty nothing on an NPU", ((EMPTY_CACHE,),))),
    _claim("guard-before-free", "recommended: a check with hasattr before the free", (),
        Answer("done: the KV cache is only dropped where every attribute is there, and says what is missing",
            ((Defines(DROPS.file, "_missing_for_reallocate"),),))),
)
"""In the order of the report: six claims, three that it left unverified, one missing, one recommended."""

TRAPS: tuple[Question, ...] = (
    _trap("wake-up-transposes", "vllm_ascend",
        "NPUWorker.wake_up leaves experts in checkpoint form, in parameters without a loader (vllm-ascend#5915); "
        "ascend_safe settles them",
        "wake_up leaves the experts alone", "high",
        *(Uses(file, "transpose", "NPUWorker.wake_up") for file in ASCEND_WORKERS)),
    _trap("nz-refused-at-wake-up", "vllm_ascend",
        "weights in NZ layout are refused when the engine wakes up, after it slept; ascend_safe sets "
        "VLLM_ASCEND_ENABLE_NZ=0",
        "wake_up does not look for NZ layout", "high",
        *REFUSES_NZ),
    _trap("expandable-segments-refused", "vllm_ascend",
        "the allocator of sleep mode asserts that expandable_segments is off; ascend_safe checks it first",
        "the allocator does not look at PYTORCH_NPU_ALLOC_CONF", "medium",
        Uses("vllm_ascend/device_allocator/camem.py", "expandable_segments", part_of_text=True)),
    _trap("attention-keeps-kv-views", "vllm_ascend",
        "attention keeps views of the KV tensors (`impl.key_cache`): a free that forgets them frees nothing; "
        "ascend_safe drops them",
        "attention keeps no view", "high",
        KEY_CACHE),
    _trap("checks-the-soc", "vllm_ascend",
        "the worker refuses a chip that the wheel was not built for",
        "the wheel's SoC is not checked at start-up", "medium",
        Defines("vllm_ascend/utils.py", "check_ascend_device_type"),
        Defines("vllm_ascend/device/device_config.py", "check_ascend_device_type")),
    _trap("second-bind-refused", "vllm",
        "binding KV tensors again is refused unless the runner's list was emptied; ascend_safe empties it in place",
        "nothing refuses it", "medium",
        BIND),
    _trap("plug-in-failures-are-debug", "verl",
        "a plug-in that fails to load is a DEBUG line of verl's; ascend_safe says it as an ERROR itself",
        "verl loads no plug-ins by entry point", "high",
        Uses("verl/__init__.py", "debug")),
    _trap("platform-npu-unknown", "verl",
        "verl's name for the platform is `huawei`, while its README says VERL_PLATFORM=npu; ascend_safe registers both",
        "verl has no platforms to name", "medium",
        Uses("verl/plugin/platform/platform_npu.py", "huawei")),
    _trap("server-name-prefix", "verl",
        "the replica says `vllm_` whatever the rollout is called, and the adapter looks for the rollout's name; "
        "ascend_safe answers for both",
        "both have the prefix written out", "high",
        Defines(SERVER, "vLLMReplica._get_server_name_prefix")),
    _trap("batched-tokens-frozen", "verl",
        "verl assigns max_num_batched_tokens to a frozen config without chunked prefill; ascend_safe does it first",
        "it is not assigned", "medium",
        Uses(SERVER, "max_num_batched_tokens", "vLLMHttpServer._validate_configs")),
)
# fmt: on


def check_reference(sources: Sources) -> Iterator[Check]:
    """Yield the QA report's claims, then the traps."""
    for question in (*REFERENCE, *TRAPS):
        yield question.ask(sources)
