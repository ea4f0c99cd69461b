"""The side-by-side report of two or more smoke reports: all its numbers, its checks and its sections."""

from __future__ import annotations

import dataclasses
from typing import Any

from verl_ascend_rollout.checks.compare import wording
from verl_ascend_rollout.checks.compare.pairs import SideBySide
from verl_ascend_rollout.checks.compare.sections import sections_of
from verl_ascend_rollout.checks.compare.verdicts import checks_of
from verl_ascend_rollout.report import Report


def build(found: SideBySide) -> Report:
    """The report: all numbers in its facts, all verdicts in its checks."""
    models = {run.smoke.model.name for run in found.runs if run.smoke.model}
    title = f"Smoke reports side by side: {wording.listed([run.label for run in found.runs])}"
    if len(models) == 1:
        title += f"; {wording.name(models.pop(), 80)}"
    return Report(
        "compare", title, facts=_facts(found), checks=tuple(checks_of(found)), sections=tuple(sections_of(found))
    )


def for_people(report: Report) -> Report:
    """The report with what its sections tell left out of its facts."""
    return dataclasses.replace(report, facts={})


def _facts(found: SideBySide) -> dict[str, Any]:
    return {
        "baseline": found.runs[0].label,
        "reports": [
            {
                "label": run.label,
                "file": wording.name(run.file, 200),
                "created": wording.name(run.report.created, 40),
                "verdict": run.report.verdict,
                "ended_in": wording.name(run.smoke.ended_in, 40),
                "platform": wording.name(run.smoke.platform.name, 40) if run.smoke.platform else None,
                "stand_in": wording.name(run.stand_in, 200),
                "vllm": wording.name(run.vllm, 40) if run.vllm else None,
            }
            for run in found.runs
        ],
        "comparisons": [
            {
                "report": pair.other.label,
                "quantity": comparison.quantity.name,
                "unit": comparison.quantity.unit,
                "baseline": comparison.base,
                "value": comparison.value,
                "ratio": comparison.ratio,
                "refused": list(comparison.refused),
                "remarks": list(comparison.remarks),
            }
            for pair in found.pairs
            for comparison in pair.compared.values()
        ],
        "agreement": [
            {
                "report": pair.other.label,
                "tolerance": pair.agreement.tolerance,
                "equal_tokens": pair.agreement.equal_tokens,
                "divergence": dataclasses.asdict(pair.agreement.divergence) if pair.agreement.divergence else None,
                "prompt_logprobs": dataclasses.asdict(pair.agreement.prompt) if pair.agreement.prompt else None,
                "answer_logprobs": dataclasses.asdict(pair.agreement.answer) if pair.agreement.answer else None,
            }
            for pair in found.pairs
        ],
    }
