"""The checks that need an engine: each asks it something twice and compares.

What is compared is token by token and log-probability by log-probability.  How much two calls alike differ here, by the
order in which kernels add, is measured first (`Baseline.noise`, 0 on most platforms), and no later check is stricter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from verl_ascend_rollout.checks.smoke.engine import Answer, Engine, Prompt
from verl_ascend_rollout.report import Check, Evidence

PROBE = "probe"
MIB = 2**20

NEAR = 0.1
"""Log-probabilities of the tokens at the first place where two answers differ: below this it is a near tie."""


@dataclass(frozen=True)
class Setting:
    """What the trials need to know beside the engine.

    Attributes:
        prompts: the user's, the first of which is the one that counts, and others for a batch.
        max_tokens: of each answer.
        files: with the model's own weights; none where they are not on this machine in safetensors.
        why_no_files: then why.
        sleep_mode: whether the engine has it.
        why_no_sleep: then why not.
        weight_path: that the policy chose here.
        quantization: vLLM's name; empty for none.
    """

    prompts: tuple[Prompt, ...]
    max_tokens: int
    files: tuple[str, ...]
    why_no_files: str
    sleep_mode: bool
    why_no_sleep: str
    weight_path: str
    quantization: str


@dataclass(frozen=True)
class Baseline:
    """What the engine answers as it was started, and how much two calls alike differ."""

    answers: tuple[Answer, ...]
    noise: float


Trial = Callable[[Engine, Setting, Baseline], Check]


def baseline(engine: Engine, setting: Setting, first: Answer) -> tuple[Baseline, Check, Check]:
    """Ask twice, and in a batch with others; the checks `output.deterministic` and `output.finite`."""
    started = time.perf_counter()
    once = engine.fresh_answers(setting.prompts, setting.max_tokens)
    again = engine.fresh_answers(setting.prompts, setting.max_tokens)
    engine.forget()
    batch = engine.answer(list(setting.prompts), setting.max_tokens)
    noise = max((difference(a, b) for a, b in zip(once, again, strict=True)), default=0.0)
    noise = max(noise, difference(first, once[0]))
    found = Baseline(tuple(once), noise if math.isfinite(noise) else 0.0)
    seconds = time.perf_counter() - started
    return found, _deterministic(once, again, batch, first, noise, seconds), _finite([first, *once, *again, *batch])


def _deterministic(
    once: Sequence[Answer],
    again: Sequence[Answer],
    batch: Sequence[Answer],
    first: Answer,
    noise: float,
    seconds: float,
) -> Check:
    name = "output.deterministic"
    in_batch = max(difference(a, b) for a, b in zip(once, batch, strict=True))
    evidence = (
        Evidence(PROBE, f"each prompt twice, by itself: log-probabilities differ by {_shown(noise)} at most"),
        Evidence(
            PROBE, f"{len(batch)} prompts in one batch: they differ by {_shown(in_batch)} at most from those alone"
        ),
    )
    tokens = len(once[0].tokens)
    if first.tokens != once[0].tokens or any(a.tokens != b.tokens for a, b in zip(once, again, strict=True)):
        return Check(
            name,
            "fail",
            "the same prompt, greedily, gave other tokens the second time",
            (*evidence, *_where(first, once[0]), *(e for a, b in zip(once, again, strict=True) for e in _where(a, b))),
            risk="high",
            advice="a kernel that is not deterministic, or memory that is read before it is written: try --eager, and "
            "another attention back end",
            seconds=seconds,
        )
    other = [pair for pair in zip(once, batch, strict=True) if pair[0].tokens != pair[1].tokens]
    if not other:
        return Check(
            name,
            "pass",
            f"the same {tokens} tokens on each call, alone and in a batch of {len(batch)}",
            evidence,
            risk="high",
            seconds=seconds,
        )
    gaps = [_gap(*pair) for pair in other]
    near = all(gap < NEAR for gap in gaps)
    return Check(
        name,
        "warn" if near else "fail",
        f"the same tokens on each call alone; in a batch {len(other)} of {len(batch)} answers differ"
        + (", from a place on where two tokens are as good as equally likely" if near else ""),
        (*evidence, *(found for pair in other for found in _where(*pair))),
        risk="low" if near else "high",
        advice="kernels add in another order in a batch, which tips a near tie; nothing to do"
        if near
        else "a request reads what belongs to another: try without prefix caching, and with --eager",
        seconds=seconds,
    )


def _finite(answers: Sequence[Answer]) -> Check:
    name = "output.finite"
    numbers = [number for answer in answers for number in (*answer.logprobs, *answer.prompt_logprobs)]
    bad = [number for number in numbers if not math.isfinite(number) or number > 1e-3]
    if bad:
        return Check(
            name,
            "fail",
            f"{len(bad)} of {len(numbers)} log-probabilities are no log-probabilities: {_shown(bad[0])}, ...",
            (Evidence(PROBE, "NaN, infinite, or above 0"),),
            risk="high",
            advice="weights that were not loaded, or a dtype that overflows: try --dtype float32, or --eager",
        )
    if not numbers:
        return Check(name, "unknown", "the engine gave no log-probabilities", risk="high")
    return Check(name, "pass", f"all {len(numbers)} log-probabilities are finite and not above 0", risk="high")


# --------------------------------------------------------------------------------------------------------------------
# the KV cache


def kv_cache(engine: Engine, setting: Setting, before: Baseline) -> Check:
    """Give the KV cache back, twice, and take it again, twice, as the rollout does between generation and training."""
    name = "kv-cache.free-init"
    probes = engine.ask("ascend_safe_configure", kv_rung="auto", weight_path=setting.weight_path, verify="always")
    rungs = {probe["rung"] for probe in probes}
    obstacles = sorted({obstacle for probe in probes for obstacle in probe["obstacles"]})
    not_here = tuple(Evidence(PROBE, f"not here: {obstacle}") for obstacle in obstacles)
    if len(rungs) > 1:
        return Check(
            name, "fail", f"the workers found different rungs: {', '.join(sorted(rungs))}", not_here, risk="high"
        )
    (rung,) = rungs
    if rung == "keep":
        why = "; ".join(obstacles) or "no rung works"
        return Check(name, "skip", f"nothing safe gives the KV cache back here: {why}", not_here, risk="medium")
    freed = engine.ask("free_cache_engine")
    freed_again = engine.ask("free_cache_engine")
    made = engine.ask("init_cache_engine")
    made_again = engine.ask("init_cache_engine")
    engine.forget()
    after = engine.fresh_answers(setting.prompts, setting.max_tokens)
    gone = sum(change["bytes_before"] - change["bytes_after"] for change in freed)
    back = sum(change["bytes_after"] - change["bytes_before"] for change in made)
    seconds = [max(change["seconds"] for change in changes) for changes in (freed, made)]
    resident = sum(change["rss_before"] - change["rss_after"] for change in freed)
    evidence = (
        Evidence(
            PROBE, f"rung {rung}: {gone / MIB:.1f} MiB given back in {seconds[0]:.3f} s on {len(freed)} worker(s)"
        ),
        Evidence(PROBE, f"resident memory of the worker(s) fell by {resident / MIB:.1f} MiB"),
        Evidence(PROBE, f"{back / MIB:.1f} MiB taken again in {seconds[1]:.3f} s"),
        _answers_evidence(before, after),
        *not_here,
    )
    wrong = [
        sentence
        for sentence, so in (
            ("it did not free anything", gone <= 0),
            ("it took back another amount than it gave", gone != back),
            ("a second free did something", any(change["changed"] for change in freed_again)),
            ("a second init did something", any(change["changed"] for change in made_again)),
            ("the answers afterwards differ", not _alike(before, after)),
        )
        if so
    ]
    if wrong:
        return Check(name, "fail", f"by rung {rung}: {'; '.join(wrong)}", evidence, risk="high", advice=_REPORT)
    return Check(
        name,
        "pass",
        f"{gone / MIB:.1f} MiB given back and taken again by rung {rung}; a second time changes nothing; the answers "
        "afterwards are the same",
        evidence,
        risk="high",
    )


# --------------------------------------------------------------------------------------------------------------------
# weights


def weights(engine: Engine, setting: Setting, before: Baseline) -> Check:
    """Load the model's own weights into the running engine, then others, then its own again."""
    name = "weights.reload"
    if not setting.files:
        return Check(name, "skip", setting.why_no_files, risk="medium")
    if setting.quantization:
        return Check(
            name,
            "skip",
            f"the weights are quantised ({setting.quantization}), and a weight sync sends a trainer's, which are not",
            risk="medium",
        )
    said, answers = [], []
    for changed in (False, True, False):
        done = engine.ask("ascend_safe_smoke_reload", files=list(setting.files), changed=changed)
        said.append(done)
        engine.forget()
        answers.append(engine.fresh_answers(setting.prompts, setting.max_tokens))
    own, others, own_again = answers
    seconds = [max(worker["seconds"] for worker in workers) for workers in said]
    changed_by = max(difference(a, b) for a, b in zip(before.answers, others, strict=True))
    different = [a.tokens for a in before.answers] != [a.tokens for a in others] or changed_by > max(before.noise, 1e-6)
    evidence = (
        Evidence(
            PROBE,
            f"{said[0][0]['tensors']} tensors, {said[0][0]['bytes'] / MIB:.1f} MiB a worker, in {seconds[0]:.3f} s",
        ),
        Evidence(PROBE, f"own weights: {_answers_evidence(before, own).what}"),
        Evidence(
            PROBE,
            f"other weights (each tensor turned by one place): {_answers_evidence(before, others).what}",
        ),
        Evidence(PROBE, f"own weights again, in {seconds[2]:.3f} s: {_answers_evidence(before, own_again).what}"),
    )
    wrong = [
        sentence
        for sentence, so in (
            ("after a reload of the model's own weights the answers differ", not _alike(before, own)),
            ("other weights changed nothing: the engine does not compute with what was loaded", not different),
            ("after other weights and its own again the answers differ", not _alike(before, own_again)),
        )
        if so
    ]
    path = (
        ""
        if setting.weight_path == "by_layout"
        else (f" (by recorded layouts; the rollout's policy chooses {setting.weight_path!r} on this platform)")
    )
    if wrong:
        return Check(name, "fail", "; ".join(wrong) + path, evidence, risk="high", advice=_REPORT)
    return Check(
        name,
        "pass",
        f"the same answers after a full load of the model's own weights, others after other weights, and the same "
        f"again after its own{path}",
        evidence,
        risk="high",
    )


# --------------------------------------------------------------------------------------------------------------------
# sleep


def sleep(engine: Engine, setting: Setting, before: Baseline) -> Check:
    """vLLM's own sleep at level 1 and wake-up, then the rollout's settling of what a wake-up leaves."""
    name = "sleep.wake"
    if not setting.sleep_mode:
        return Check(name, "skip", f"the engine runs without sleep mode: {setting.why_no_sleep}", risk="low")
    awake = engine.ask("ascend_safe_memory")
    started = time.perf_counter()
    engine.llm.sleep(level=1)
    fell = time.perf_counter() - started
    asleep = engine.ask("ascend_safe_memory", kv_asleep=True)
    started = time.perf_counter()
    engine.llm.wake_up()
    rose = time.perf_counter() - started
    settled = engine.ask("ascend_safe_settle")
    engine.ask("ascend_safe_memory", kv_asleep=False)
    engine.forget()
    after = engine.fresh_answers(setting.prompts, setting.max_tokens)
    gone = sum(a["device_used"] - b["device_used"] for a, b in zip(awake, asleep, strict=True))
    turned = sum(len(names) for names in settled)
    evidence = (
        Evidence(
            PROBE, f"asleep in {fell:.3f} s, {gone / MIB:.1f} MiB of the device(s) given back by the driver's count"
        ),
        Evidence(PROBE, f"awake in {rose:.3f} s; {turned} weights were put back into the kernels' form"),
        _answers_evidence(before, after),
    )
    wrong = [
        sentence
        for sentence, so in (
            ("it gave no memory back", gone <= 0),
            ("the answers afterwards differ", not _alike(before, after)),
        )
        if so
    ]
    if wrong:
        return Check(name, "fail", "; ".join(wrong), evidence, risk="high", advice=_REPORT)
    return Check(
        name,
        "pass",
        f"{gone / MIB:.1f} MiB given back at level 1; the answers afterwards are the same",
        evidence,
        risk="high",
    )


TRIALS: dict[str, Trial] = {"kv-cache.free-init": kv_cache, "weights.reload": weights, "sleep.wake": sleep}
"""In the order in which they are run: each leaves the engine as it was."""

_REPORT = "do not train with this stack; report it with smoke.json and engine.log"


# --------------------------------------------------------------------------------------------------------------------


def difference(one: Answer, other: Answer) -> float:
    """The largest difference of log-probabilities, up to the first token that differs; infinite where one is NaN."""
    worst = 0.0
    for token, twin, a, b in zip(one.tokens, other.tokens, one.logprobs, other.logprobs, strict=False):
        if token != twin:
            break
        gap = abs(a - b)
        worst = max(worst, gap if math.isfinite(gap) else math.inf)
    return worst


def _alike(before: Baseline, after: Sequence[Answer]) -> bool:
    return all(
        a.tokens == b.tokens and difference(a, b) <= before.noise for a, b in zip(before.answers, after, strict=True)
    )


def _answers_evidence(before: Baseline, after: Sequence[Answer]) -> Evidence:
    pairs = list(zip(before.answers, after, strict=True))
    same = sum(a.tokens == b.tokens for a, b in pairs)
    worst = max((difference(a, b) for a, b in pairs), default=0.0)
    return Evidence(
        PROBE,
        f"{same} of {len(pairs)} answers have the same tokens, log-probabilities differ by {_shown(worst)} "
        f"(two calls alike: {_shown(before.noise)})",
    )


def _where(one: Answer, other: Answer) -> Iterator[Evidence]:
    for place, (token, twin) in enumerate(zip(one.tokens, other.tokens, strict=False)):
        if token != twin:
            yield Evidence(
                PROBE,
                f"token {place} is {token} ({_shown(one.logprobs[place])}) and then {twin} "
                f"({_shown(other.logprobs[place])})",
            )
            return
    if len(one.tokens) != len(other.tokens):
        yield Evidence(PROBE, f"{len(one.tokens)} tokens, and then {len(other.tokens)}")


def _gap(one: Answer, other: Answer) -> float:
    """How far apart the log-probabilities are at the first place where the tokens differ."""
    for token, twin, a, b in zip(one.tokens, other.tokens, one.logprobs, other.logprobs, strict=False):
        if token != twin:
            gap = abs(a - b)
            return gap if math.isfinite(gap) else math.inf
    return math.inf


def _shown(number: Any) -> str:
    return "0" if number == 0 else f"{number:.3g}"
