"""Whether two platforms say the same: the prompt's tokens, the answer's, and the log-probabilities of both.

Greedy answers of two platforms need not be equal: where two tokens are about as likely, rounding decides, and all that
follows differs.  So the first token that differs is looked at: could it be such a tie, or do the platforms disagree?
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from verl_ascend_rollout.tools import wording
from verl_ascend_rollout.tools.compare.reading import Run
from verl_ascend_rollout.tools.compare.times import different_models
from verl_ascend_rollout.tools.report import WORST_FIRST, Check, Evidence, Verdict
from verl_ascend_rollout.tools.smoke.measured import Output, equal_from_first

TOLERANCES: dict[str, float] = {"float32": 1e-3, "float16": 2 * 2.0**-6, "bfloat16": 2 * 2.0**-3}
"""By dtype, how far two log-probabilities of one token may be apart.

In 16 bits it is two steps between neighbouring numbers at 16 to 32, where large logits lie: bfloat16 has 7 bits after
the point, float16 has 10.  In float32 such a step is nothing, and what differs is the order of long sums."""

ALIKE = 0.99
"""Pearson's correlation below which the log-probabilities differ in more than rounding.

It counts where the tolerance does not: a small model with random weights has log-probabilities that are all about the
same, and a wrong weight moves them by less than a step of bfloat16 at 16."""

UNLIKE = 0.9
"""Correlation below which it is not the same model that answered."""

FAR = 4.0
"""Times the tolerance, from which a difference is a failure and not a doubt."""

ENOUGH = 8
"""Values from which a correlation is given."""


@dataclass(frozen=True)
class Differences:
    """Log-probabilities of the same tokens on two platforms."""

    count: int  # how many
    largest: float  # of the absolute differences, natural logarithm
    mean: float
    pearson: float | None  # their correlation; `None` for fewer than `ENOUGH`, or where one side is constant

    @classmethod
    def of(cls, one: Sequence[float], two: Sequence[float]) -> Differences | None:
        """Of two sequences of the same length; `None` where they are empty."""
        if not one or len(one) != len(two):
            return None
        apart = [abs(a - b) for a, b in zip(one, two, strict=True)]
        pearson = None
        if len(one) >= ENOUGH:
            with contextlib.suppress(statistics.StatisticsError):  # one side is constant
                pearson = statistics.correlation(one, two)
        return cls(len(one), max(apart), statistics.fmean(apart), pearson)

    def told(self) -> str:
        """Return it as part of a sentence."""
        pearson = "too few or too even for a correlation" if self.pearson is None else f"Pearson {self.pearson:.5f}"
        apart = f"{self.largest:.3g} at most and {self.mean:.3g} on average"
        return f"{self.count} log-probabilities differ by {apart}; {pearson}"


@dataclass(frozen=True)
class Divergence:
    """The first token that differs."""

    position: int  # its place in the answer, from 0; so many tokens are equal
    tokens: tuple[int | None, int | None]  # what each chose; `None` for the one that had ended
    logprobs: tuple[float | None, float | None]  # of what each chose; `None` where not recorded

    @property
    def gap(self) -> float | None:
        """How far the two log-probabilities are apart."""
        one, two = self.logprobs
        return None if one is None or two is None else abs(one - two)

    def may_be_a_tie(self, tolerance: float) -> bool | None:
        """Return whether rounding may have decided; `None` where that cannot be told.

        Each side chose the likelier token.  If the two distributions differ by no more than the tolerance, so do their
        largest log-probabilities; and two tokens that are equally likely have at most half of the probability each.
        """
        one, two = self.logprobs
        if one is None or two is None or self.gap is None:
            return None
        return self.gap <= tolerance and min(one, two) <= math.log(0.5) + tolerance


@dataclass(frozen=True)
class Agreement:
    """What two reports' outputs have in common."""

    checks: tuple[Check, ...]  # `outputs.prompt`, `outputs.tokens`, `outputs.logprobs`
    tolerance: float | None = None  # of log-probabilities; `None` where nothing was compared
    equal_tokens: int | None = None  # how many tokens of the answers are equal, from the first
    divergence: Divergence | None = None  # the first that differs; `None` where none does
    # the differences in log-probabilities; of the answer, as far as its tokens are equal
    prompt_logprobs: Differences | None = None
    answer_logprobs: Differences | None = None
    more: tuple[Agreement, ...] = ()  # of the other prompts that both were given

    def facts(self) -> dict[str, Any]:
        """Return the numbers, as JSON values."""
        return {name: value for name, value in asdict(self).items() if name not in ("checks", "more")}


NAMES = ("outputs.prompt", "outputs.tokens", "outputs.logprobs")


def agreement(base: Run, other: Run) -> Agreement:
    """Compare what two runs said; of several prompts, each check is of the one with the worst answer."""
    first = _of_prompt(base, other, base.smoke.output, other.smoke.output)
    answers = {output.prompt: output for output in other.smoke.more_outputs}
    asked = [output for output in base.smoke.more_outputs if output.prompt in answers]
    if not asked:
        return first
    more = tuple(_of_prompt(base, other, output, answers[output.prompt]) for output in asked)
    alike = zip(first.checks, *(found.checks for found in more), strict=True)
    worst = (min(checks, key=lambda check: WORST_FIRST.index(check.verdict)) for checks in alike)
    told = tuple(replace(check, summary=f"{check.summary} (the worst of {len(more) + 1} prompts)") for check in worst)
    return replace(first, checks=told, more=more)


def _of_prompt(base: Run, other: Run, one: Output | None, two: Output | None) -> Agreement:
    pair = f"{other.label} and {base.label}"
    # An unrecorded hash or dtype is no reason why the two should not agree.
    unlike = [why for why in different_models(base, other) if "not recorded" not in why and not why.startswith("dtype")]
    if one is None or two is None:
        unknown = [run.label for run, output in ((base, one), (other, two)) if output is None]
        return _skipped(f"{pair}: there is no output in the report of {wording.listed(unknown)}")
    if unlike:
        return _skipped(f"{pair}: {'; '.join(unlike)}")
    if one.prompt != two.prompt:
        return _skipped(f"{pair} were asked different prompts")
    if one.chat_template != two.chat_template:
        return _skipped(f"{pair}: only one of them put the prompt through the chat template")
    asked = _prompt(pair, one, two)
    if asked.verdict == "warn":
        return _skipped(f"{pair} were asked with different tokens", asked)
    return _answers(pair, base, other, one, two, asked)


def _skipped(why: str, *before: Check) -> Agreement:
    return Agreement((*before, *(Check(name, "skip", why) for name in NAMES[len(before) :])))


def _prompt(pair: str, one: Output, two: Output) -> Check:
    ids = one.prompt_token_ids, two.prompt_token_ids
    if not ids[0] or not ids[1]:
        return Check(NAMES[0], "unknown", f"{pair}: the prompt's tokens are not recorded in both")
    if ids[0] == ids[1]:
        return Check(NAMES[0], "pass", f"{pair} were asked with the same {wording.many(len(ids[0]), 'token')}")
    told = (
        f"{pair} tokenized one prompt differently, from token {equal_from_first(*ids)} on "
        f"({len(ids[1])} and {len(ids[0])} tokens): their outputs cannot be compared"
    )
    advice = "compare the tokenizer's files and the versions of transformers and tokenizers on both machines"
    return Check(NAMES[0], "warn", told, risk="medium", advice=advice)


def _answers(pair: str, base: Run, other: Run, one: Output, two: Output, asked: Check) -> Agreement:
    tolerance, reason = _tolerance(base, other)
    equal = equal_from_first(one.token_ids, two.token_ids)
    divergence = _divergence(one, two, equal)
    prompt = Differences.of(one.prompt_logprobs, two.prompt_logprobs)
    said = [output.logprobs[:equal] if one.logprobs and two.logprobs else () for output in (one, two)]
    asked_with = [output.prompt_logprobs if prompt else () for output in (one, two)]
    answer = Differences.of(*said)
    both = Differences.of(*((*before, *after) for before, after in zip(asked_with, said, strict=True)))
    checks = (
        asked,
        _tokens(pair, one, two, equal, divergence, tolerance),
        _logprobs(pair, {"prompt": prompt, "answer": answer}, both, tolerance, reason),
    )
    # What may be two models agrees or not; only that it is one model makes a disagreement a failure.
    doubts = "; ".join(why for why in different_models(base, other) if "not recorded" in why)
    doubted = tuple(
        replace(check, verdict="unknown", summary=f"{check.summary}; but {doubts}", confidence="inferred")
        if doubts and check.verdict in ("fail", "warn")
        else check
        for check in checks
    )
    return Agreement(doubted, tolerance, equal, divergence, prompt, answer)


def _tolerance(base: Run, other: Run) -> tuple[float, str]:
    dtypes = [(run.get("model.dtype") or "").rpartition(".")[2] for run in (base, other)]
    if not set(dtypes) <= set(TOLERANCES):
        return TOLERANCES["bfloat16"], "for bfloat16, as the dtype of one of them is not recorded or not known here"
    coarser = max(dtypes, key=lambda dtype: TOLERANCES[dtype])
    return TOLERANCES[coarser], f"for {coarser}" + (", the coarser of the two" if dtypes[0] != dtypes[1] else "")


def _divergence(one: Output, two: Output, equal: int) -> Divergence | None:
    if equal == len(one.token_ids) == len(two.token_ids):
        return None
    shorter = one if len(one.token_ids) < len(two.token_ids) else two
    if equal == len(shorter.token_ids) and shorter.finish_reason == "length":
        return None  # it was cut off there, and agrees as far as it goes

    def there(values: Sequence[Any]) -> Any:
        return values[equal] if equal < len(values) else None

    logprobs = there(one.logprobs), there(two.logprobs)
    return Divergence(equal, (there(one.token_ids), there(two.token_ids)), logprobs)


def _tokens(pair: str, one: Output, two: Output, equal: int, divergence: Divergence | None, tolerance: float) -> Check:
    name, counts = NAMES[1], (len(one.token_ids), len(two.token_ids))
    if 0 in counts:
        return Check(name, "unknown", f"{pair}: the answer's tokens are not recorded in both")
    if divergence is None:
        cut = f", where the shorter one was cut off ({counts[1]} and {counts[0]} tokens)"
        cut = "" if counts[0] == counts[1] else cut
        return Check(name, "pass", f"{pair} answered with the same {wording.many(equal, 'token')}{cut}")
    evidence = Evidence(
        "facts.output.token_ids",
        f"{wording.many(equal, 'token')} of {counts[1]} and {counts[0]} are equal; then "
        f"{_chosen(divergence.tokens[1], divergence.logprobs[1])} and "
        f"{_chosen(divergence.tokens[0], divergence.logprobs[0])}",
    )
    place = f"{pair} agree in {wording.many(equal, 'token')} and then differ"
    tie = divergence.may_be_a_tie(tolerance)
    if tie:
        summary = (
            f"{place}; their log-probabilities there are {divergence.gap:.3g} apart, within {tolerance:.3g}: it may be "
            "a near-tie that rounding decided"
        )
        return Check(name, "warn", summary, (evidence,), confidence="inferred", risk="low")
    if tie is None:
        summary = f"{place}; whether rounding decided cannot be told without both log-probabilities there"
        return Check(name, "warn", summary, (evidence,), risk="medium")
    why = (
        f"the log-probabilities there are {divergence.gap:.3g} apart, more than {tolerance:.3g}"
        if divergence.gap is not None and divergence.gap > tolerance
        else "each was more than half sure of its token, which one model cannot be of both"
    )
    advice = "one of them computes something else: look at the checks of both reports against a reference"
    return Check(name, "fail", f"{place}, and it is no near-tie: {why}", (evidence,), risk="high", advice=advice)


def _chosen(token: int | None, logprob: float | None) -> str:
    if token is None:
        return "the end"
    return f"token {token}" + ("" if logprob is None else f" (log-probability {logprob:.4f})")


def _logprobs(
    pair: str, found: Mapping[str, Differences | None], both: Differences | None, tolerance: float, reason: str
) -> Check:
    """Judge by the correlation of prompt and answer together: greedy tokens alone are all likely, and so differ in
    little."""
    name = NAMES[2]
    if both is None:
        return Check(name, "unknown", f"{pair}: log-probabilities of the same tokens are not recorded in both")
    evidence = tuple(Evidence(f"facts.output, {what}", apart.told()) for what, apart in found.items() if apart)
    correlation = 1.0 if both.pearson is None else both.pearson
    verdict: Verdict = "pass"
    if both.largest > FAR * tolerance or correlation < UNLIKE:
        verdict = "fail"
    elif both.largest > tolerance or correlation < ALIKE:
        verdict = "warn"
    summary = f"{pair}: {both.count:,} log-probabilities of the same tokens differ by {both.largest:.3g} at most"
    if both.pearson is not None:
        summary += f", Pearson {both.pearson:.5f}"
    summary += f"; tolerance {tolerance:.3g} ({reason}) and {ALIKE}"
    if verdict == "pass":
        return Check(name, verdict, summary, evidence)
    advice = "look at the checks of both reports against a reference: which of the two is off?"
    return Check(name, verdict, summary, evidence, risk="high" if verdict == "fail" else "medium", advice=advice)
