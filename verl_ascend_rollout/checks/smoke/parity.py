"""The engine's log-probabilities against those of a reference that computes in float32.

Two right implementations differ by rounding, which grows with the dtype's step; a wrong one (a weight that was not
loaded, or loaded transposed) differs by about as much as log-probabilities vary over the vocabulary.  So a difference
has to be small against both: the dtype's step, and that spread.  The second matters where a model has little to say,
as a random one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from verl_ascend_rollout.checks.smoke.measured import Output
from verl_ascend_rollout.report import Check, Evidence

NAME = "output.reference"

STEP = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23}
"""The distance from 1 to the next number."""

MEAN_STEPS, MOST_STEPS = 8, 64
FLOOR = 1e-4
"""For float32: exponentials and sums of two libraries differ by more than a few of its steps."""

MEAN_SPREAD, MOST_SPREAD = 0.1, 0.75
"""Of the spread: the largest mean, and the largest single difference."""


def tolerances(dtype: str, spread: float) -> tuple[float, float]:
    """The largest mean difference, and the largest single one, for a dtype and a spread of log-probabilities."""
    step = STEP.get(dtype, STEP["bfloat16"])
    mean = max(MEAN_STEPS * step, FLOOR)
    most = max(MOST_STEPS * step, 10 * FLOOR)
    return min(mean, MEAN_SPREAD * spread), min(most, MOST_SPREAD * spread)


def judge(outputs: Sequence[Output], references: Sequence[Mapping[str, Any]], dtype: str) -> Check:
    """Compare prompt and answer, token by token."""
    prompt_gaps: list[float] = []
    answer_gaps: list[float] = []
    agreed = near = answered = 0
    for output, reference in zip(outputs, references, strict=True):
        split = len(output.prompt_token_ids) - 1
        expected = reference["logprobs"]
        prompt_gaps += [abs(a - b) for a, b in zip(output.prompt_logprobs, expected[:split], strict=True)]
        answer_gaps += [abs(a - b) for a, b in zip(output.logprobs, expected[split:], strict=True)]
        places = zip(
            output.token_ids,
            reference["best"][split:],
            expected[split:],
            reference["best_logprobs"][split:],
            strict=True,
        )
        for token, best, logprob, best_logprob in places:
            answered += 1
            agreed += token == best
            near += token != best and best_logprob - logprob <= 2 * tolerances(dtype, reference["spread"])[1]
    spread = min(reference["spread"] for reference in references)
    mean_limit, most_limit = tolerances(dtype, spread)
    gaps = prompt_gaps + answer_gaps
    mean, most = sum(gaps) / len(gaps), max(gaps)
    evidence = (
        Evidence(
            "probe",
            f"{len(prompt_gaps)} prompt tokens: |difference of log-probabilities| {_mean(prompt_gaps):.4g} in the "
            f"mean, {max(prompt_gaps, default=0.0):.4g} at most",
        ),
        Evidence(
            "probe",
            f"{len(answer_gaps)} answer tokens: {_mean(answer_gaps):.4g} in the mean, "
            f"{max(answer_gaps, default=0.0):.4g} at most",
        ),
        Evidence("probe", f"greedy: the reference would choose {agreed} of {answered} tokens too, {near} more nearly"),
        Evidence(
            "tolerance",
            f"{mean_limit:.3g} in the mean and {most_limit:.3g} at most: {MEAN_STEPS} and {MOST_STEPS} steps of "
            f"{dtype}, and no more than {MEAN_SPREAD:g} and {MOST_SPREAD:g} of the standard deviation of "
            f"log-probabilities over the vocabulary, which is {spread:.3g} here",
        ),
    )
    wrong = agreed + near < answered
    # `not <=` so that a NaN is wrong.
    if not mean <= mean_limit or not most <= most_limit or wrong:
        return Check(
            NAME,
            "fail",
            f"the engine computes another model than Hugging Face's in float32: log-probabilities differ by {mean:.4g} "
            f"in the mean and {most:.4g} at most",
            evidence,
            risk="high",
            advice="if another dtype (--dtype float32) agrees, it is rounding, and the tolerance is too strict for "
            "this model; else weights are wrong: report it with smoke.json",
        )
    return Check(
        NAME,
        "pass",
        f"log-probabilities differ from Hugging Face's in float32 by {mean:.4g} in the mean and {most:.4g} at most, "
        f"and {agreed} of {answered} greedy tokens agree",
        evidence,
        risk="high",
    )


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0
