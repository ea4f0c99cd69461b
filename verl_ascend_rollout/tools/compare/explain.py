"""Why two runs' times and sizes differ, and what was not run: out of what their reports recorded and nothing else.

Each sentence names the fact that it rests on.  What cannot be seen in the facts is not said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from verl_ascend_rollout.tools import wording
from verl_ascend_rollout.tools.compare.reading import Run, recorded
from verl_ascend_rollout.tools.compare.times import ENOUGH_TOKENS, Comparison
from verl_ascend_rollout.tools.smoke.tables import LOAD_PARTS, graphs, has_graphs, machine, shown

ALIKE = 0.02
"""Share of a load time within which another is about as long."""

LARGE_PART = 0.1
"""Share of a difference from which a part of it is named."""

MOST_CHECKS = 12
"""Checks of one report that are named as a next step."""


def load_split(run: Run) -> Iterator[str]:
    """Yield where one run's load time went."""
    total = run.get("load.total")
    if not total:
        return
    parts = {title: run.get(f"load.{part}") for part, title in LOAD_PARTS.items()}
    known = {title: seconds for title, seconds in parts.items() if seconds}
    if known:
        title, seconds = max(known.items(), key=lambda item: item[1])
        largest = f"{title}, {wording.seconds(seconds)} ({seconds / total:.0%})"
        yield f"{run.label}: the largest part of {wording.seconds(total)} is {largest}."
    unknown = [title for title, seconds in parts.items() if seconds is None]
    if unknown:
        yield f"{run.label}: {wording.listed(unknown)} {'is' if len(unknown) == 1 else 'are'} not recorded apart."


def of_load(base: Run, other: Run, compared: Mapping[str, Comparison]) -> Iterator[str]:
    """Yield why it took one longer to load than the other."""
    total = compared["load.total"]
    if total.refused:
        yield f"{other.label} and {base.label}: the load times are not compared: {'; '.join(total.refused)}."
    elif total.base is not None and total.value is not None:
        yield _of_total(base, other, total.value - total.base, total.base)
    for run, against in ((base, other), (other, base)):
        count, took = run.get("engine.graphs_captured"), run.get("load.graphs")
        if count and has_graphs(against) is False:
            seconds = f" in {wording.seconds(took)}" if took is not None else ""
            captured = f"{run.label} captured {wording.many(count, 'graph')}{seconds}"
            yield f"{captured}; {against.label} captures none{_eager_reason(against)}."
        if run.get("load.compile") and against.get("load.compile") == 0:
            yield f"torch.compile ran in {run.label} only, for {wording.seconds(run.get('load.compile'))}."


def _of_total(base: Run, other: Run, apart: float, whole: float) -> str:
    if abs(apart) < ALIKE * whole:
        return f"{other.label} took about as long as {base.label}."
    differences = []
    for part, title in LOAD_PARTS.items():
        values = recorded((base, other), f"load.{part}")
        if values and (values[1] - values[0]) / apart >= LARGE_PART:
            told = f"{title} ({wording.seconds(values[0])} and {wording.seconds(values[1])})"
            differences.append((abs(values[1] - values[0]), told))
    most = wording.listed([told for _, told in sorted(differences, reverse=True)])
    line = f"{other.label} took {wording.seconds(abs(apart))} {'longer' if apart > 0 else 'less'} than {base.label}"
    return f"{line}, most of it in {most}." if most else f"{line}."


def first_and_warm(run: Run) -> Iterator[str]:
    """Yield what a run's first call had to do once."""
    first, warm = run.smoke.first, run.smoke.warm
    if first is not None and warm is None:
        yield f"{run.label} has a first call only: what it costs once and what it costs each time are one number."
    if first is None or warm is None or not warm.seconds:
        return
    work, again = ((call.prompts, call.prompt_tokens, call.output_tokens) for call in (first, warm))
    if work != again:
        return
    share = first.seconds / warm.seconds
    if share >= 1.1:
        once = f"{wording.seconds(first.seconds - warm.seconds)} of it is work that is done once"
        yield f"{run.label}: the first call took {share:.3g} times as long as the same call again: {once}."
    else:
        yield f"{run.label}: the first call took no longer than the same call again: what is done once came before it."


def of_inference(base: Run, other: Run, compared: Mapping[str, Comparison]) -> Iterator[str]:
    """Yield why the calls of one took longer than those of the other."""
    for which in ("first", "warm"):
        refused = compared[f"{which}.seconds"].refused
        if refused:
            yield f"{other.label} and {base.label}: the {which} calls' seconds are not compared: {'; '.join(refused)}."
    one, two = base.smoke.warm or base.smoke.first, other.smoke.warm or other.smoke.first
    if one is not None and two is not None and one.output_tokens != two.output_tokens:
        yield (
            f"{other.label} answered with {wording.many(two.output_tokens, 'token')} and {base.label} with "
            f"{one.output_tokens:,}: each token is one more step of the whole model."
        )
    for run, against in ((base, other), (other, base)):
        if has_graphs(run) is False and has_graphs(against):
            yield (
                f"{run.label} ran without graphs{_eager_reason(run)}, {against.label} with {graphs(against)}: without "
                "them, the host starts each kernel of each step by itself, and a small batch waits for that."
            )
    yield from _machines(base, other)
    if base.release and other.release and base.release != other.release:
        told = f"{other.label} is vLLM {other.release}, {base.label} {base.release}"
        if machine(base) != machine(other):
            told += ": what differs between the releases is not told from what differs between the machines"
        yield f"{told}."


def _eager_reason(run: Run) -> str:
    reason = run.get("engine.eager_reason") or ""
    return f" ({wording.quoted(reason, 160)})" if reason.strip() else ""


def _machines(base: Run, other: Run) -> Iterator[str]:
    one, two = base.smoke.platform, other.smoke.platform
    if one is None or two is None:
        return
    for run in (base, other):
        if run.stand_in:
            yield f"{run.label} computes on what stands in for the hardware: {wording.quoted(run.stand_in, 160)}."
    if (one.name, one.device) != (two.name, two.device):
        names = [f"{run.label} on {machine(run)}" for run in (other, base)]
        yield f"The machines differ: {wording.listed(names)}."
    if one.name == two.name == "cpu":
        if one.threads and two.threads and one.threads != two.threads:
            yield f"{other.label} computes with {wording.many(two.threads, 'thread')}, {base.label} with {one.threads}."
        if set(one.isa) != set(two.isa):
            sets = f"{shown(two.isa)} in {other.label}, {shown(one.isa)} in {base.label}"
            yield f"vLLM chooses its CPU kernels by instruction set: {sets}."


def notes(run: Run) -> Iterator[str]:
    """Yield what is to be known of a run's platform."""
    platform = run.smoke.platform
    if platform is None:
        yield f"{run.label}: the platform is {wording.UNKNOWN}."
        return
    if run.stand_in:
        yield (
            f"**{run.label} is no {wording.name(platform.name, 20).upper()}**: it ran on "
            f"{wording.quoted(run.stand_in, 200)}. Its times say nothing about the hardware; what it shows is that the "
            "software runs, and what it computes."
        )
    yield f"{run.label}: {machine(run)}; eager {shown(run.get('engine.eager'))}{_eager_reason(run)}."


def next_steps(runs: Sequence[Run], compared: Sequence[Mapping[str, Comparison]]) -> Iterator[str]:
    """Yield one sentence for each thing that was not run, not recorded, or not comparable."""
    alike: dict[str, list[str]] = {}
    for run in runs:
        for step in _of_run(run):
            alike.setdefault(step, []).append(run.label)
    for step, labels in alike.items():
        yield f"{wording.listed(labels)}: {step}"
    eager = [run.label for run in runs if has_graphs(run) is False]
    with_graphs = [run.label for run in runs if has_graphs(run)]
    on_device = [run.label for run in runs if run.label in eager and run.get("platform.name") not in (None, "cpu")]
    if eager and with_graphs:
        modes = f"{wording.listed(eager)} with --graph, or {wording.listed(with_graphs)} with --eager"
        yield f"For times in one mode, run {modes}."
    elif on_device:
        yield f"Graph mode was not run: smoke --graph on {wording.listed(on_device)}."
    sparse = [run for run in runs if run.get("model.experts") and run.smoke.engine]
    if sparse and not any(run.get("engine.expert_parallel") for run in sparse):
        yield "Expert parallelism was not run: smoke --ep, with --tp 2 or more."
    if runs and all(run.get("engine.tensor_parallel") == 1 for run in runs):
        yield "Only one rank was run: smoke --tp 2, 4 and 8, as the devices allow."
    counts = sorted({run.smoke.warm.output_tokens for run in runs if run.smoke.warm})
    if len(counts) > 1:
        yield (
            f"The answers have {wording.listed(list(map(str, counts)))} tokens: a prompt whose answer the limit cuts "
            f"off everywhere, at {ENOUGH_TOKENS} tokens or more, makes the times comparable."
        )
    reasons = " ".join({reason for pair in compared for comparison in pair.values() for reason in comparison.refused})
    if "different prompts" in reasons:
        yield "Give all platforms the same --prompt."
    if "whether it is the same model" in reasons:
        yield "Have config_hash recorded everywhere: without it nobody knows whether one model ran on all platforms."
    if "different models" in reasons or "different weights" in reasons:
        yield "Load the same files on all platforms."


def _of_run(run: Run) -> Iterator[str]:
    if run.smoke.ended_in != "done":
        yield f"find out why smoke ended in {run.ended_in}, and run it again."
    words = {"skip": "was skipped", "unknown": "could not be told", "warn": "warns", "fail": "failed"}
    for check in [check for check in run.report.checks if check.verdict != "pass"][:MOST_CHECKS]:
        summary = wording.quoted(check.summary, 200).rstrip(".")
        yield f"`{wording.name(check.name, 60)}` {words[check.verdict]}: {summary}."
    if run.stand_in:
        platform = wording.name(run.get("platform.name"), 20).upper()
        yield f"run the same smoke on a real {platform}: times and device memory are still to be measured."
    if run.get("model.tiny"):
        yield "run smoke with a real model: the toy of --tiny has random weights and next to no work."
