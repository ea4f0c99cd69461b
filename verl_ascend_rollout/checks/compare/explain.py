"""Why two runs' times and sizes differ, out of what their reports recorded and nothing else.

Each sentence names the fact that it rests on.  What cannot be seen in the facts is not said.
"""

from __future__ import annotations

from collections.abc import Iterator

from verl_ascend_rollout.checks.compare import wording
from verl_ascend_rollout.checks.compare.reading import Run
from verl_ascend_rollout.checks.compare.times import LOAD_PARTS, Comparison, graphs, has_graphs
from verl_ascend_rollout.checks.smoke.measured import Call

ALIKE = 0.02
"""Share of a load time within which another is about as long."""

LARGE_PART = 0.1
"""Share of a difference from which a part of it is named."""


def load_split(run: Run) -> Iterator[str]:
    """Where one run's load time went."""
    load = run.smoke.load
    if load is None or not load.total:
        return
    parts = {title: getattr(load, part) for part, title in LOAD_PARTS.items()}
    known = {title: seconds for title, seconds in parts.items() if seconds}
    if known:
        title, seconds = max(known.items(), key=lambda item: item[1])
        yield (
            f"{run.label}: the largest part of {wording.seconds(load.total)} is {title}, {wording.seconds(seconds)} "
            f"({seconds / load.total:.0%})."
        )
    unknown = [title for title, seconds in parts.items() if seconds is None]
    if unknown:
        yield f"{run.label}: {wording.listed(unknown)} {'is' if len(unknown) == 1 else 'are'} not recorded apart."


def of_load(base: Run, other: Run, compared: dict[str, Comparison]) -> Iterator[str]:
    """Why it took one longer to load than the other."""
    total = compared["load.total"]
    if total.refused:
        yield f"{other.label} and {base.label}: the load times are not compared: {'; '.join(total.refused)}."
    elif total.base is not None and total.value is not None:
        apart = total.value - total.base
        word = "longer" if apart > 0 else "less"
        differences = []
        for part, title in LOAD_PARTS.items():
            one, two = compared[f"load.{part}"].base, compared[f"load.{part}"].value
            if one is not None and two is not None and apart and (two - one) / apart >= LARGE_PART:
                differences.append((abs(two - one), f"{title} ({wording.seconds(one)} and {wording.seconds(two)})"))
        told = [text for _, text in sorted(differences, reverse=True)]
        line = f"{other.label} took {wording.seconds(abs(apart))} {word} than {base.label}"
        if abs(apart) < ALIKE * total.base:
            line, told = f"{other.label} took about as long as {base.label}", []
        yield f"{line}, most of it in {wording.listed(told)}." if told else f"{line}."
    yield from _capture(base, other)
    yield from _toolchain(base, other)


def _capture(base: Run, other: Run) -> Iterator[str]:
    for run, against in ((base, other), (other, base)):
        engine, load = run.smoke.engine, run.smoke.load
        if engine is not None and engine.graphs_captured and has_graphs(against) is False:
            took = f" in {wording.seconds(load.graphs)}" if load is not None and load.graphs is not None else ""
            yield (
                f"{run.label} captured {wording.many(engine.graphs_captured, 'graph')}{took}; {against.label} captures "
                f"none{_eager_reason(against)}."
            )


def _toolchain(base: Run, other: Run) -> Iterator[str]:
    loads = base.smoke.load, other.smoke.load
    for run, load, against in ((base, loads[0], loads[1]), (other, loads[1], loads[0])):
        if load is not None and load.compile and against is not None and against.compile == 0:
            yield f"torch.compile ran in {run.label} only, for {wording.seconds(load.compile)}."


def of_inference(base: Run, other: Run, compared: dict[str, Comparison]) -> Iterator[str]:
    """Why the calls of one took longer than those of the other."""
    for which in ("first", "warm"):
        refused = compared[f"{which}.seconds"].refused
        if refused:
            yield f"{other.label} and {base.label}: the {which} calls' seconds are not compared: {'; '.join(refused)}."
    yield from _counts(base, other)
    yield from _modes(base, other)
    yield from _machines(base, other)
    yield from _engines(base, other)
    yield from _releases(base, other)


def first_and_warm(run: Run) -> Iterator[str]:
    """What a run's first call had to do once."""
    first, warm = run.smoke.first, run.smoke.warm
    if first is not None and warm is None:
        yield f"{run.label} has a first call only: what it costs once and what it costs each time are one number."
    if first is None or warm is None or not warm.seconds or not _alike(first, warm):
        return
    share = first.seconds / warm.seconds
    if share >= 1.1:
        yield (
            f"{run.label}: the first call took {share:.3g} times as long as the same call again: "
            f"{wording.seconds(first.seconds - warm.seconds)} of it is work that is done once."
        )
    else:
        yield f"{run.label}: the first call took no longer than the same call again: what is done once came before it."


def _alike(one: Call, two: Call) -> bool:
    return (one.prompts, one.prompt_tokens, one.output_tokens) == (two.prompts, two.prompt_tokens, two.output_tokens)


def _counts(base: Run, other: Run) -> Iterator[str]:
    one, two = base.smoke.warm or base.smoke.first, other.smoke.warm or other.smoke.first
    if one is not None and two is not None and one.output_tokens != two.output_tokens:
        yield (
            f"{other.label} answered with {wording.many(two.output_tokens, 'token')} and {base.label} with "
            f"{one.output_tokens:,}: each token is one more step of the whole model."
        )


def _modes(base: Run, other: Run) -> Iterator[str]:
    for run, against in ((base, other), (other, base)):
        if has_graphs(run) is False and has_graphs(against):
            yield (
                f"{run.label} ran without graphs{_eager_reason(run)}, {against.label} with {graphs(against)}: without "
                "them, the host starts each kernel of each step by itself, and a small batch waits for that."
            )


def _eager_reason(run: Run) -> str:
    reason = run.smoke.engine.eager_reason if run.smoke.engine else ""
    return f" ({wording.quoted(reason, 160)})" if reason.strip() else ""


def _machines(base: Run, other: Run) -> Iterator[str]:
    one, two = base.smoke.platform, other.smoke.platform
    if one is None or two is None:
        return
    for run in (base, other):
        if run.stand_in:
            yield f"{run.label} computes on what stands in for the hardware: {wording.quoted(run.stand_in, 160)}."
    if one.name != two.name or one.device != two.device:
        names = [f"{run.label} on {machine(run)}" for run in (other, base)]
        yield f"The machines differ: {wording.listed(names)}."
    if one.name == two.name == "cpu":
        if one.threads and two.threads and one.threads != two.threads:
            yield f"{other.label} computes with {wording.many(two.threads, 'thread')}, {base.label} with {one.threads}."
        if set(one.isa) != set(two.isa):
            sets = [", ".join(wording.name(isa, 20) for isa in platform.isa[:20]) or "none" for platform in (two, one)]
            yield (
                f"vLLM chooses its CPU kernels by instruction set: {sets[0]} in {other.label}, {sets[1]} in "
                f"{base.label}."
            )


def machine(run: Run) -> str:
    """The device, as far as it is known."""
    platform = run.smoke.platform
    if platform is None:
        return f"a machine that is {wording.UNKNOWN}"
    device = wording.name(platform.device, 80) if platform.device else f"a device whose name is {wording.UNKNOWN}"
    count = f"{platform.devices:,} x " if platform.devices and platform.devices > 1 else ""
    return f"{count}{device}"


def _engines(base: Run, other: Run) -> Iterator[str]:
    one, two = base.smoke.engine, other.smoke.engine
    if one is None or two is None:
        return
    for field, title in (
        ("attention_backend", "attention"),
        ("moe_backend", "experts"),
        ("max_num_seqs", "max_num_seqs"),
        ("max_model_len", "max_model_len"),
        ("chunked_prefill", "chunked prefill"),
    ):
        values = [getattr(engine, field) for engine in (two, one)]
        if None not in values and values[0] != values[1]:
            shown = [wording.truth(value) if isinstance(value, bool) else wording.name(value, 60) for value in values]
            yield f"{title}: {shown[0]} in {other.label}, {shown[1]} in {base.label}."


def _releases(base: Run, other: Run) -> Iterator[str]:
    if base.vllm and other.vllm and base.vllm.partition("+")[0] != other.vllm.partition("+")[0]:
        told = f"{other.label} is vLLM {wording.name(other.vllm, 40)}, {base.label} {wording.name(base.vllm, 40)}"
        if machine(base) != machine(other):
            told += ": what differs between the releases is not told from what differs between the machines"
        yield f"{told}."
