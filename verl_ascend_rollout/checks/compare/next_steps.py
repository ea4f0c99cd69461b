"""What to do next, out of what the reports lack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from verl_ascend_rollout.checks.compare import wording
from verl_ascend_rollout.checks.compare.reading import Run
from verl_ascend_rollout.checks.compare.times import ENOUGH_TOKENS, Comparison, has_graphs

MOST = 12
"""Checks of one report that are named."""


def of(runs: Sequence[Run], compared: Sequence[Mapping[str, Comparison]]) -> Iterator[str]:
    """One sentence for each thing that was not run, not recorded, or not comparable."""
    alike: dict[str, list[str]] = {}
    for run in runs:
        for step in _of_run(run):
            alike.setdefault(step, []).append(run.label)
    for step, labels in alike.items():
        yield f"{wording.listed(labels)}: {step}"
    yield from _of_modes(runs)
    yield from _of_experts(runs)
    yield from _of_calls(runs, compared)


def _of_run(run: Run) -> Iterator[str]:
    if run.smoke.ended_in != "done":
        yield f"find out why smoke ended in {wording.name(run.smoke.ended_in, 40)}, and run it again."
    for check in [check for check in run.report.checks if check.verdict != "pass"][:MOST]:
        words = {"skip": "was skipped", "unknown": "could not be told", "warn": "warns", "fail": "failed"}
        summary = wording.quoted(check.summary, 200).rstrip(".")
        yield f"`{wording.name(check.name, 60)}` {words[check.verdict]}: {summary}."
    if run.stand_in:
        platform = wording.name(run.smoke.platform.name, 20).upper() if run.smoke.platform else "device"
        yield f"run the same smoke on a real {platform}: times and device memory are still to be measured."
    if run.smoke.model is not None and run.smoke.model.tiny:
        yield "run smoke with a real model: the toy of --tiny has random weights and next to no work."
    if run.smoke.ended_in == "done" and run.smoke.warm is None:
        yield "there is no warm call: run it with a release of smoke that makes one."
    unknown = len(run.smoke.warnings.unknown)
    if unknown and not any("warnings" in check.name and check.verdict != "pass" for check in run.report.checks):
        kinds = "kind of warning that is" if unknown == 1 else "kinds of warning that are"
        yield f"look at {unknown:,} {kinds} not known here."


def _of_modes(runs: Sequence[Run]) -> Iterator[str]:
    eager = [run for run in runs if has_graphs(run) is False]
    with_graphs = [run for run in runs if has_graphs(run)]
    if eager and with_graphs:
        yield (
            f"For times in one mode, run {wording.listed([run.label for run in eager])} with --graph, or "
            f"{wording.listed([run.label for run in with_graphs])} with --eager."
        )
    elif eager:
        accelerators = [run.label for run in eager if run.smoke.platform and run.smoke.platform.name != "cpu"]
        if accelerators:
            yield f"Graph mode was not run: smoke --graph on {wording.listed(accelerators)}."


def _of_experts(runs: Sequence[Run]) -> Iterator[str]:
    sparse = [run for run in runs if run.smoke.model and run.smoke.model.experts and run.smoke.engine]
    if sparse and not any(run.smoke.engine.expert_parallel for run in sparse if run.smoke.engine):
        yield "Expert parallelism was not run: smoke --ep, with --tp 2 or more."
    if runs and all(run.smoke.engine and run.smoke.engine.tensor_parallel == 1 for run in runs):
        yield "Only one rank was run: smoke --tp 2, 4 and 8, as the devices allow."


def _of_calls(runs: Sequence[Run], compared: Sequence[Mapping[str, Comparison]]) -> Iterator[str]:
    reasons = {reason for pair in compared for comparison in pair.values() for reason in comparison.refused}
    counts = {run.smoke.warm.output_tokens for run in runs if run.smoke.warm}
    if len(counts) > 1:
        yield (
            f"The answers have {wording.listed([str(count) for count in sorted(counts)])} tokens: a prompt whose "
            f"answer the limit cuts off everywhere, at {ENOUGH_TOKENS} tokens or more, makes the times comparable."
        )
    if "different prompts" in reasons:
        yield "Give all platforms the same --prompt."
    if any(reason.startswith("whether it is the same model") for reason in reasons):
        yield "Have config_hash recorded everywhere: without it nobody knows whether one model ran on all platforms."
    if any(reason.startswith("different models") or reason.startswith("different weights") for reason in reasons):
        yield "Load the same files on all platforms."
