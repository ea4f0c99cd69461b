"""The engine's log-probabilities against those of a reference that computes in float32.

Two right implementations differ by rounding, which grows with the dtype's step; a wrong one (a weight that was not
loaded, or loaded transposed) differs by about as much as log-probabilities vary over the vocabulary.  So a difference
has to be small against both: the dtype's step, and that spread.  The second matters where a model has little to say,
as a random one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from verl_ascend_rollout.tools.report import Check, Evidence
from verl_ascend_rollout.tools.smoke.measured import Output

NAME = "output.reference"

STEP = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23}
"""The distance from 1 to the next number."""

MEAN_STEPS, MOST_STEPS = 8, 64
FLOOR = 1e-4
"""For float32: exponentials and sums of two libraries differ by more than a few of its steps."""

MEAN_SPREAD, MOST_SPREAD = 0.1, 0.75
"""Of the spread: the largest mean, and the largest single difference."""


def tolerances(dtype: str, spread: float) -> tuple[float, float]:
    """Return the largest mean difference, and the largest single one, for a dtype and a spread of log-probabilities."""
    step = STEP.get(dtype, STEP["bfloat16"])
    mean = max(MEAN_STEPS * step, FLOOR)
    most = max(MOST_STEPS * step, 10 * FLOOR)
    return min(mean, MEAN_SPREAD * spread), min(most, MOST_SPREAD * spread)


def judge(outputs: Sequence[Output], references: Sequence[Mapping[str, Any]], dtype: str) -> Check:
    """Compare prompt and answer, token by token."""
    prompt_gaps: list[float] = []
    answer_gaps: list[float] = []
    agreed = near = 0
    for output, reference in zip(outputs, references, strict=True):
        split, expected = len(output.prompt_token_ids) - 1, reference["logprobs"]
        prompt_gaps += [abs(a - b) for a, b in zip(output.prompt_logprobs, expected[:split], strict=True)]
        answer_gaps += [abs(a - b) for a, b in zip(output.logprobs, expected[split:], strict=True)]
        tie = 2 * tolerances(dtype, reference["spread"])[1]
        best = zip(reference["best"][split:], reference["best_logprobs"][split:], strict=True)
        for token, logprob, (chosen, likeliest) in zip(output.token_ids, expected[split:], best, strict=True):
            agreed += token == chosen
            near += token != chosen and likeliest - logprob <= tie
    spread = min(reference["spread"] for reference in references)
    mean_limit, most_limit = tolerances(dtype, spread)
    gaps, answered = prompt_gaps + answer_gaps, sum(len(output.token_ids) for output in outputs)
    mean, most = _mean(gaps), max(gaps)
    told = f"{mean:.4g} in the mean and {most:.4g} at most"
    evidence = (
        Evidence("probe", f"prompt tokens: |difference of log-probabilities| {_gaps(prompt_gaps)}"),
        Evidence("probe", f"answer tokens: {_gaps(answer_gaps)}"),
        Evidence("probe", f"greedy: the reference would choose {agreed} of {answered} tokens too, {near} more nearly"),
        Evidence(
            "tolerance",
            f"{mean_limit:.3g} in the mean and {most_limit:.3g} at most: {MEAN_STEPS} and {MOST_STEPS} steps of "
            f"{dtype}, and no more than {MEAN_SPREAD:g} and {MOST_SPREAD:g} of the standard deviation of "
            f"log-probabilities over the vocabulary, which is {spread:.3g} here",
        ),
    )
    # `<=` is false for a NaN.
    if mean <= mean_limit and most <= most_limit and agreed + near == answered:
        summary = f"log-probabilities differ from Hugging Face's in float32 by {told}, and {agreed} of {answered} "
        return Check(NAME, "pass", f"{summary}greedy tokens agree", evidence, risk="high")
    summary = f"the engine computes another model than Hugging Face's in float32: log-probabilities differ by {told}"
    advice = (
        "if another dtype (--dtype float32) agrees, it is rounding, and the tolerance is too strict for this model; "
        "else weights are wrong: report it with smoke.json"
    )
    return Check(NAME, "fail", summary, evidence, risk="high", advice=advice)


def _gaps(numbers: Sequence[float]) -> str:
    return f"{_mean(numbers):.4g} in the mean, {max(numbers, default=0.0):.4g} at most, of {len(numbers)}"


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0
