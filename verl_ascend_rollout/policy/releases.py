"""What a release of vLLM or vllm-ascend can do: one table, from the sources named; no decision is made here.

A checkout without tags has a version that says nothing.  Whoever asks says what that means: `may_be_in` counts it as a
release that has the ability, `is_in` as one that has not.
"""

from __future__ import annotations

from dataclasses import dataclass

from packaging.version import InvalidVersion, Version

from verl_ascend_rollout.platforms.base import PlatformFacts

Release = tuple[int, int]


@dataclass(frozen=True)
class Ability:
    """From which release on something is there, and from which on no more; `None`: always, and to this day."""

    since: Release | None = None
    until: Release | None = None

    def is_in(self, release: Release | None) -> bool:
        """Return whether a release is known and has it."""
        if release is None or (self.since is not None and release < self.since):
            return False
        return self.until is None or release < self.until

    def may_be_in(self, release: Release | None) -> bool:
        """Return whether a release has it, or is not known."""
        return release is None or self.is_in(release)


# --- vLLM -------------------------------------------------------------------------------------------------------------

V0_ENGINE = Ability(until=(0, 12))
"""VLLM_USE_V1 chooses the engine."""

PREPACKED_EXPERTS = Ability(until=(0, 13))
"""On a CPU intel_extension_for_pytorch runs the experts (0.11, layers/fused_moe/cpu_fused_moe.py:118)."""

LAYERWISE_RELOAD = Ability(since=(0, 24))
"""vLLM's model_executor/model_loader/reload: in 0.23 a loader that writes twice ends a layer before it is whole."""

ROUTING_RECORD = Ability(since=(0, 22))
"""Routed experts are recorded as verl takes them (verl 0.9.1, vllm_async_server.py:437)."""

ROUTING_RECORD_ON_CPU = Ability(since=(0, 28))
"""The CPU's kernel for experts can be made to record them (`integration.patches.vllm`); 0.23 and 0.24 have another."""

KV_ONLY = Ability(since=(0, 31))
"""The worker's `discard` of one tag of memory (vllm#44890).  vllm-ascend 0.11 to 0.30 has none of its own."""

KV_BYTES_ON_CPU = Ability(since=(0, 28))
"""kv_cache_memory_bytes counts on a CPU (v1/worker/cpu_worker.py:208); 0.11 and 0.13 do not look at it.  Those between
were not looked up: VLLM_CPU_KVCACHE_SPACE works in all."""

# --- vllm-ascend ------------------------------------------------------------------------------------------------------

ENVIRONMENT = Ability(until=(0, 28))
"""VLLM_ASCEND_ENABLE_NZ and VLLM_ASCEND_ENABLE_FUSED_MC2 are read (0.11 to 0.23; 0.28 has neither, envs.py).  0.20 to
0.23 read both the variable and the setting, which goes first."""

SETTINGS = Ability(since=(0, 20))
"""Both, and enable_flashcomm1, are read from `additional_config` (0.20.2 ascend_config.py:152, 218, 0.23:173, 249; not
0.18)."""

FLASHCOMM = Ability(until=(0, 20))
"""VLLM_ASCEND_ENABLE_FLASHCOMM, the older name of VLLM_ASCEND_ENABLE_FLASHCOMM1, is read."""

FUSED_MC2 = Ability(since=(0, 13))
"""There is a fused kernel for experts; 0.13 has it for quantized ones only (ascend_forward_context.py:258)."""

FUSED_MC2_IN_NZ = Ability(since=(0, 18))
"""It takes bf16 experts too, and casts them to NZ layout (0.18 ops/fused_moe/fused_moe.py:90)."""

FULL_GRAPHS = Ability(since=(0, 18))
"""FULL_DECODE_ONLY is usable: before, full graphs are called experimental and verl's own scripts run eager."""

FULL_MODE = Ability(since=(0, 13))
"""The mode FULL is known: 0.11 captures nothing with it (platform.py:243-248)."""

THINS_SIZES = Ability(until=(0, 21))
"""update_aclgraph_sizes is in 0.11 to 0.20.2rc1 and not in 0.21.0rc1 (utils.py), and so is the rewriting of
FULL_AND_PIECEWISE to PIECEWISE (0.20.2rc1 platform.py:379)."""

OWN_LIMIT = Ability(since=(0, 18))
"""Its list of sizes ends at max_num_seqs, before at twice that (0.18 platform.py:157-209; #7572)."""

TORCHAIR = Ability(until=(0, 13))
"""There is torchair: no file of 0.13, 0.18, 0.23, 0.28 or 0.30 names it."""

FEW_EXPERTS_FOR_MC2 = Ability(since=(0, 18))
"""On A2, MC2 is for at most 24 experts on each device (ascend_forward_context.py)."""

ALLGATHER_ON_A5 = Ability(since=(0, 23))
"""On A5, ALLGATHER is one of the ways for large batches (ascend_forward_context.py)."""

KV_BYTES_ON_NPU = Ability(since=(0, 20))
"""kv_cache_memory_bytes counts (0.20.2rc1 worker/worker.py:341, 0.22.1rc1:477, 0.23:540); 0.13 and 0.18 do not look at
it (worker.py:269, 327)."""

EXPERTS_SPREAD_ON_310P = Ability(since=(0, 18), until=(0, 21))
"""Expert parallelism works on 310P (0.18 _310p/fused_moe/fused_moe.py:135)."""

EXPERTS_REFUSED_ON_310P = (
    # In the model runner V2 (0.28 _310p/worker/v2/model_runner.py:192).
    (Ability(since=(0, 28)), "vllm-ascend's model runner V2 raises NotImplementedError"),
    # 0.24.0rc1 and 0.25.1rc1 _310p/fused_moe: neither the refusal nor a word of it in the release notes.
    (Ability(since=(0, 24)), "vllm-ascend refused it up to 0.23 and does not say that it works since"),
    # 0.21.0rc1 and 0.22.1rc1 _310p/fused_moe/fused_moe.py:157, 0.23:218.
    (Ability(since=(0, 21)), "vllm-ascend raises RuntimeError"),
)
"""How it is refused there, the first that fits; else by ValueError (0.11 worker/model_runner_v1.py:1904, 0.13
ascend_forward_context.py:278)."""

ADAPTERS_ON_EXPERTS = Ability(since=(0, 23))
"""There is a kernel for LoRA on experts: 0.23 has lora/fused_moe.py, 0.22.1rc1 has not."""


def vllm_release(facts: PlatformFacts) -> Release | None:
    """Return vLLM's version as (major, minor)."""
    return release_of(facts.versions.get("vllm"))


def vllm_ascend_release(facts: PlatformFacts) -> Release | None:
    """Return vllm-ascend's version, or the version of vLLM that it goes with; `None` off NPU."""
    if facts.name != "npu":
        return None
    return release_of(facts.versions.get("vllm-ascend") or facts.versions.get("vllm"))


def release_of(version: str | None) -> Release | None:
    """Return (major, minor), or `None` for no version and for one that says nothing.

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
