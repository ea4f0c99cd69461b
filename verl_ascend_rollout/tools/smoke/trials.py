"""The checks that need an engine: each asks it something twice and compares.

What is compared is token by token and log-probability by log-probability.  How much two calls alike differ here, by the
order in which kernels add, is measured first (`Baseline.noise`, 0 on most platforms), and no later check is stricter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from verl_ascend_rollout.tools.report import Check, Evidence
from verl_ascend_rollout.tools.smoke.engine import Engine
from verl_ascend_rollout.tools.smoke.measured import Output, equal_from_first

MIB = 2**20

NEAR = 0.1
"""Log-probabilities of the tokens at the first place where two answers differ: below this it is a near tie."""


@dataclass(frozen=True)
class Setting:
    """What the trials need to know beside the engine."""

    prompts: tuple[Output, ...]  # the user's, the first of which is the one that counts, and others for a batch
    max_tokens: int  # of each answer
    files: Sequence[str]  # with the model's own weights; none where they are not on this machine in safetensors
    why_no_sleep: str  # empty: the engine has sleep mode
    weight_path: str | Sequence[str]  # that the policy chose here; several, if the worker is to choose
    quantization: str  # vLLM's name; empty for none


@dataclass(frozen=True)
class Baseline:
    """What the engine answers as it was started, and how much two calls alike differ."""

    answers: tuple[Output, ...]
    noise: float


class Again(NamedTuple):
    """The answers to the same prompts later on, beside those of the baseline."""

    alike: bool  # the same tokens, and log-probabilities as near as those of two calls alike
    others: bool  # other tokens, or log-probabilities that are further apart
    told: str


Trial = Callable[[Engine, Setting, Baseline], Check]


def baseline(engine: Engine, setting: Setting, first: Output) -> tuple[Baseline, Check, Check]:
    """Ask twice, and in a batch with others; the checks `output.deterministic` and `output.finite`."""
    once = engine.fresh_answers(setting.prompts, setting.max_tokens)
    again = engine.fresh_answers(setting.prompts, setting.max_tokens)
    engine.forget()
    batch = engine.answer(list(setting.prompts), setting.max_tokens)
    twice = [(first, once[0]), *zip(once, again, strict=True)]
    noise = max(difference(*pair) for pair in twice)
    found = Baseline(tuple(once), noise if math.isfinite(noise) else 0.0)
    return found, _deterministic(twice, list(zip(once, batch, strict=True))), _finite([first, *once, *again, *batch])


def _deterministic(twice: Sequence[tuple[Output, Output]], batched: Sequence[tuple[Output, Output]]) -> Check:
    name = "output.deterministic"
    noise, in_batch = (max(difference(*pair) for pair in pairs) for pairs in (twice, batched))
    count, tokens = len(batched), len(batched[0][0].token_ids)
    evidence = _probes(
        f"each prompt twice, by itself: log-probabilities differ by {_shown(noise)} at most",
        f"{count} prompts in one batch: they differ by {_shown(in_batch)} at most from those alone",
    )
    again, other = ([pair for pair in pairs if pair[0].token_ids != pair[1].token_ids] for pairs in (twice, batched))
    if not again and not other:
        told = f"the same {tokens} tokens on each call, alone and in a batch of {count}"
        return Check(name, "pass", told, evidence, risk="high")
    evidence += _probes(*(_where(*pair) for pair in again or other))
    told = f"the same tokens on each call alone; in a batch {len(other)} of {count} answers differ"
    if again:
        told = "the same prompt, greedily, gave other tokens the second time"
        advice = (
            "a kernel that is not deterministic, or memory that is read before it is written: try --eager, and another "
            "attention back end"
        )
    elif all(_gap(*pair) < NEAR for pair in other):
        advice = "kernels add in another order in a batch, which tips a near tie; nothing to do"
        told += ", from a place on where two tokens are as good as equally likely"
        return Check(name, "warn", told, evidence, risk="low", advice=advice)
    else:
        advice = "a request reads what belongs to another: try without prefix caching, and with --eager"
    return Check(name, "fail", told, evidence, risk="high", advice=advice)


def _finite(answers: Sequence[Output]) -> Check:
    name = "output.finite"
    numbers = [number for answer in answers for number in (*answer.logprobs, *answer.prompt_logprobs)]
    bad = [number for number in numbers if not math.isfinite(number) or number > 1e-3]
    if bad:
        told = f"{len(bad)} of {len(numbers)} log-probabilities are no log-probabilities: {_shown(bad[0])}, ..."
        advice = "weights that were not loaded, or a dtype that overflows: try --dtype float32, or --eager"
        return Check(name, "fail", told, _probes("NaN, infinite, or above 0"), risk="high", advice=advice)
    if not numbers:
        return Check(name, "unknown", "the engine gave no log-probabilities", risk="high")
    return Check(name, "pass", f"all {len(numbers)} log-probabilities are finite and not above 0", risk="high")


def kv_cache(engine: Engine, setting: Setting, before: Baseline) -> Check:
    """Give the KV cache back, twice, and take it again, twice, as the rollout does between generation and training."""
    name = "kv-cache.free-init"
    probes = engine.ask("ascend_safe_configure", kv_release="auto", weight_path=setting.weight_path, verify="always")
    methods = sorted({probe["kv_release"] for probe in probes})
    obstacles = sorted({obstacle for probe in probes for obstacle in probe["obstacles"]})
    not_here = _probes(*(f"not here: {obstacle}" for obstacle in obstacles))
    if len(methods) > 1:
        return Check(name, "fail", f"the workers found different ways: {', '.join(methods)}", not_here, risk="high")
    (method,) = methods
    if method == "keep":
        why = "; ".join(obstacles) or "no method works"
        return Check(name, "skip", f"nothing safe gives the KV cache back here: {why}", not_here, risk="medium")
    calls = ("free_cache_engine", "free_cache_engine", "init_cache_engine", "init_cache_engine")
    freed, freed_again, made, made_again = (engine.ask(call) for call in calls)
    after = _ask_again(engine, setting, before)
    gone = sum(change["bytes_before"] - change["bytes_after"] for change in freed)
    back = sum(change["bytes_after"] - change["bytes_before"] for change in made)
    seconds = [max(change["seconds"] for change in changes) for changes in (freed, made)]
    resident = sum(change["rss_before"] - change["rss_after"] for change in freed)
    evidence = _probes(
        f"by {method}: {gone / MIB:.1f} MiB given back in {seconds[0]:.3f} s on {len(freed)} worker(s)",
        f"resident memory of the worker(s) fell by {resident / MIB:.1f} MiB",
        f"{back / MIB:.1f} MiB taken again in {seconds[1]:.3f} s",
        after.told,
    )
    wrong = {
        "it did not free anything": gone <= 0,
        "it took back another amount than it gave": gone != back,
        "a second free did something": any(change["changed"] for change in freed_again),
        "a second init did something": any(change["changed"] for change in made_again),
        "the answers afterwards differ": not after.alike,
    }
    right = (
        f"{gone / MIB:.1f} MiB given back and taken again by {method}; a second time changes nothing; the answers "
        "afterwards are the same"
    )
    return _judged(name, wrong, right, evidence + not_here, before=f"by {method}: ")


def weights(engine: Engine, setting: Setting, before: Baseline) -> Check:
    """Load the model's own weights into the running engine, then others, then its own again."""
    name = "weights.reload"
    if not setting.files:
        why = "the model's weights are not in safetensors files on this machine, from which they would be loaded again"
        return Check(name, "skip", why, risk="medium")
    if setting.quantization:
        why = f"the weights are quantised ({setting.quantization}), and a weight sync sends a trainer's, which are not"
        return Check(name, "skip", why, risk="medium")
    said, answers = [], []
    for changed in (False, True, False):
        said.append(engine.ask("ascend_safe_reload_from_disk", path=list(setting.files), changed=changed))
        answers.append(_ask_again(engine, setting, before))
    own, others, own_again = answers
    seconds = [max(worker["seconds"] for worker in workers) for workers in said]
    evidence = _probes(
        f"{said[0][0]['tensors']} tensors, {said[0][0]['bytes'] / MIB:.1f} MiB a worker, in {seconds[0]:.3f} s",
        f"own weights: {own.told}",
        f"other weights (each tensor turned by one place): {others.told}",
        f"own weights again, in {seconds[2]:.3f} s: {own_again.told}",
    )
    wrong = {
        "after a reload of the model's own weights the answers differ": not own.alike,
        "other weights changed nothing: the engine does not compute with what was loaded": not others.others,
        "after other weights and its own again the answers differ": not own_again.alike,
    }
    # "verl": weights go through the model's own loaders there, and here through the layouts that were recorded.
    path = f"by recorded layouts ({setting.weight_path!r} is the policy's choice): " * (setting.weight_path == "verl")
    right = (
        "the same answers after a full load of the model's own weights, others after other weights, and the same again "
        "after its own"
    )
    return _judged(name, wrong, path + right, evidence, before=path)


def sleep(engine: Engine, setting: Setting, before: Baseline) -> Check:
    """Try vLLM's own sleep at level 1 and wake-up, then the rollout's mending of what a wake-up leaves."""
    name = "sleep.wake"
    if setting.why_no_sleep:
        return Check(name, "skip", f"the engine runs without sleep mode: {setting.why_no_sleep}", risk="low")
    awake = engine.ask("ascend_safe_memory")
    started = time.perf_counter()
    engine.llm.sleep(level=1)
    fell = time.perf_counter() - started
    asleep = engine.ask("ascend_safe_memory", kv_asleep=True)
    started = time.perf_counter()
    engine.llm.wake_up()
    rose = time.perf_counter() - started
    turned = sum(len(names) for names in engine.ask("ascend_safe_restore_kernel_format"))
    engine.ask("ascend_safe_memory", kv_asleep=False)
    after = _ask_again(engine, setting, before)
    gone = sum(a["device_used"] - b["device_used"] for a, b in zip(awake, asleep, strict=True))
    evidence = _probes(
        f"asleep in {fell:.3f} s, {gone / MIB:.1f} MiB of the device(s) given back by the driver's count",
        f"awake in {rose:.3f} s; {turned} weights were put back into the kernels' form",
        after.told,
    )
    wrong = {"it gave no memory back": gone <= 0, "the answers afterwards differ": not after.alike}
    right = f"{gone / MIB:.1f} MiB given back at level 1; the answers afterwards are the same"
    return _judged(name, wrong, right, evidence)


TRIALS: dict[str, Trial] = {"kv-cache.free-init": kv_cache, "weights.reload": weights, "sleep.wake": sleep}
"""In the order in which they are run: each leaves the engine as it was."""


def _judged(name: str, wrong: dict[str, bool], right: str, evidence: tuple[Evidence, ...], before: str = "") -> Check:
    """Return the check of a trial: failed by what of `wrong` is so, else passed."""
    if sentences := [sentence for sentence, so in wrong.items() if so]:
        advice = "do not train with this stack; report it with smoke.json and engine.log"
        return Check(name, "fail", before + "; ".join(sentences), evidence, risk="high", advice=advice)
    return Check(name, "pass", right, evidence, risk="high")


def _probes(*sentences: str) -> tuple[Evidence, ...]:
    return tuple(Evidence("probe", sentence) for sentence in sentences)


def _ask_again(engine: Engine, setting: Setting, before: Baseline) -> Again:
    engine.forget()
    after = engine.fresh_answers(setting.prompts, setting.max_tokens)
    pairs = list(zip(before.answers, after, strict=True))
    same = sum(a.token_ids == b.token_ids for a, b in pairs)
    worst = max(difference(a, b) for a, b in pairs)
    told = (
        f"{same} of {len(pairs)} answers have the same tokens, log-probabilities differ by {_shown(worst)} "
        f"(two calls alike: {_shown(before.noise)})"
    )
    alike = same == len(pairs)
    return Again(alike and worst <= before.noise, not alike or worst > max(before.noise, 1e-6), told)


def difference(one: Output, other: Output) -> float:
    """Return the largest difference of log-probabilities, up to the first token that differs; infinite where one is
    NaN."""
    same = equal_from_first(one.token_ids, other.token_ids)
    return max(map(_apart, one.logprobs[:same], other.logprobs[:same]), default=0.0)


def _gap(one: Output, other: Output) -> float:
    """Return how far apart the log-probabilities are at the first place where the tokens differ."""
    place = equal_from_first(one.token_ids, other.token_ids)
    return max(map(_apart, one.logprobs[place : place + 1], other.logprobs[place : place + 1]), default=math.inf)


def _apart(one: float, other: float) -> float:
    return abs(one - other) if math.isfinite(one - other) else math.inf


def _where(one: Output, other: Output) -> str:
    place = equal_from_first(one.token_ids, other.token_ids)
    if place == min(len(one.token_ids), len(other.token_ids)):
        return f"{len(one.token_ids)} tokens, and then {len(other.token_ids)}"
    told = (f"{output.token_ids[place]} ({_shown(output.logprobs[place])})" for output in (one, other))
    return f"token {place} is {' and then '.join(told)}"


def _shown(number: float) -> str:
    return "0" if number == 0 else f"{number:.3g}"
