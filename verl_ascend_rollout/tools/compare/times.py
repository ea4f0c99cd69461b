"""Which numbers of two reports may be compared, and which may not: a ratio is given only where it means something.

A hand-written report sets 0.08 s beside 1.75 s and does not say how many tokens either is for, nor in which graph mode.
So each number here is either compared, with what the reader has to bear in mind, or refused, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from verl_ascend_rollout.tools import wording
from verl_ascend_rollout.tools.compare.reading import Run, differing, recorded
from verl_ascend_rollout.tools.smoke.measured import Call
from verl_ascend_rollout.tools.smoke.tables import LOAD_PARTS, graphs

ENOUGH_TOKENS = 32
"""Output tokens from which a rate is compared with that of another number of tokens.

The seconds of a call have the prefill in them: for a few tokens it is most of the time, and the rate is not a rate."""

RATE_SLACK = 0.05
"""How far tokens per second may be from output tokens over seconds, as a share, for rounding."""


@dataclass(frozen=True)
class Quantity:
    """A number that every smoke report may have."""

    name: str  # where it is in the facts
    title: str  # for people
    unit: Literal["s", "tokens/s", "bytes", "tokens"]  # of the value

    @property
    def topic(self) -> str:
        """The check that it belongs to: `first`, `warm`, `load`, `memory`."""
        return self.name.partition(".")[0]

    def shown(self, value: float | None) -> str:
        """Return the value with its unit."""
        if self.unit == "s":
            return wording.seconds(value)
        if self.unit == "bytes":
            return wording.size(value)
        return wording.number(value) + ("" if value is None or self.unit == "tokens" else f" {self.unit}")


QUANTITIES: tuple[Quantity, ...] = (
    Quantity("first.seconds", "first call", "s"),
    Quantity("first.tokens_per_second", "rate of the first call", "tokens/s"),
    Quantity("warm.seconds", "warm call", "s"),
    Quantity("warm.tokens_per_second", "rate of the warm call", "tokens/s"),
    Quantity("load.total", "load", "s"),
    *(Quantity(f"load.{part}", f"load: {title}", "s") for part, title in LOAD_PARTS.items()),
    Quantity("memory.weights", "weights", "bytes"),
    Quantity("memory.kv_cache", "KV cache", "bytes"),
    Quantity("memory.kv_tokens", "tokens in the KV cache", "tokens"),
)


@dataclass(frozen=True)
class Comparison:
    """One number of two reports."""

    quantity: Quantity  # which
    base: float | None  # the baseline's and the other's; `None` where it was not recorded
    value: float | None
    refused: tuple[str, ...] = ()  # why they are not compared; empty where they are
    remarks: tuple[str, ...] = ()  # what to bear in mind where they are

    @property
    def ratio(self) -> float | None:
        """The other's over the baseline's; `None` where they are not compared."""
        return None if self.refused or not self.base or self.value is None else self.value / self.base

    @property
    def ratio_shown(self) -> str:
        """As people read it: `21.9 x`."""
        if self.ratio is None:
            return "not compared"
        return f"{self.ratio:.2f} x" if 0.1 <= self.ratio < 100 else f"{self.ratio:.3g} x"


def compare(base: Run, other: Run) -> dict[str, Comparison]:
    """Compare every quantity of two reports, by name."""
    found = {}
    for one in QUANTITIES:
        refused = tuple(dict.fromkeys(_refused(one, base, other)))
        remarks = () if refused else tuple(_remarks(one, base, other))
        found[one.name] = Comparison(one, base.get(one.name), other.get(one.name), refused, remarks)
    return found


def _unknown(runs: Sequence[Run], path: str, what: str) -> Iterator[str]:
    """Yield where something is not recorded."""
    labels = [run.label for run in runs if run.get(path) is None]
    if labels:
        yield what.format(wording.listed(labels))


def _refused(quantity: Quantity, base: Run, other: Run) -> Iterator[str]:
    runs = (base, other)
    values = recorded(runs, quantity.name)
    if not values:
        yield from _unknown(runs, quantity.name, "not recorded in {}")
        return
    for run in runs if quantity.name != "memory.weights" else ():
        if run.smoke.platform is None:
            yield f"{run.label}'s platform is not recorded"
        elif run.stand_in and quantity.topic == "memory":
            yield f"{run.label}'s device memory is that of a stand-in, not of a device"
        elif run.stand_in:
            yield f"{run.label} ran on a stand-in: its times say nothing about the hardware"
    yield from different_models(base, other)
    yield from _unknown(runs, "engine", "the engine's configuration is not recorded in {}")
    for kind in ("tensor", "pipeline", "data"):
        if sizes := differing(runs, f"engine.{kind}_parallel"):
            yield f"{kind} parallel {sizes[0]} and {sizes[1]}"
    if differing(runs, "engine.expert_parallel"):
        yield "experts are spread over the ranks in one of them only"
    if quantity.topic in ("first", "warm"):
        yield from _different_calls(quantity, base, other)
    if values == [0, 0]:
        yield "there is none of it in either"
    elif 0 in values:
        none, some = (base, other) if values[0] == 0 else (other, base)
        yield f"{none.label} has none of it, {some.label} has: see why the times differ"
    for run in runs if quantity.name == "load.total" else ():
        parts = sum(run.get(f"load.{part}") or 0.0 for part in LOAD_PARTS)
        whole = run.get("load.total")
        if parts > whole * (1 + RATE_SLACK):
            yield f"{run.label}'s parts take {wording.seconds(parts)}, more than the {wording.seconds(whole)} of all"


def different_models(base: Run, other: Run) -> Iterator[str]:
    """Yield why the two engines did not load the same, or why that is not known."""
    runs = (base, other)
    if None in (base.smoke.model, other.smoke.model):
        yield from _unknown(runs, "model", "the model is not recorded in {}")
        return
    unknown = list(
        _unknown(runs, "model.config_hash", "whether it is the same model is not recorded in {} (config_hash)")
    )
    if differing(runs, "model.tiny"):
        toy, real = (base, other) if base.get("model.tiny") else (other, base)
        yield f"{toy.label} loaded the toy model, {real.label} a real one"
    elif unknown or differing(runs, "model.config_hash"):
        yield from unknown or ["different models: their config.json differs"]
    elif differing(runs, "model.weights_hash"):
        yield "different weights of one architecture: their files differ"
    for field in ("dtype", "quantization"):
        yield from _unknown(runs, f"model.{field}", f"the {field} is not recorded in {{}}")
        if values := [wording.name(value or "none", 20) for value in differing(runs, f"model.{field}")]:
            yield f"{field} {values[0]} and {values[1]}"


def _different_calls(quantity: Quantity, base: Run, other: Run) -> Iterator[str]:
    runs = (base, other)
    calls: list[Call] = recorded(runs, quantity.topic)
    one, two = calls
    if one.prompt_tokens != two.prompt_tokens:
        yield f"{one.prompt_tokens:,} prompt tokens and {two.prompt_tokens:,}"
    elif differing(runs, "output.prompt_token_ids") or differing(runs, "output.prompt"):
        yield "different prompts"
    else:
        yield from _unknown(runs, "output", "the prompt is not recorded in {}")
    if one.prompts != two.prompts:
        yield f"{wording.many(one.prompts, 'request')} at once and {two.prompts:,}"
    counts = (one.output_tokens, two.output_tokens)
    if 0 in counts:
        yield "a call without an output token"
    elif counts[0] != counts[1]:
        if quantity.unit == "s":
            yield f"{counts[0]:,} output tokens and {counts[1]:,}"
        elif min(counts) < ENOUGH_TOKENS:
            yield f"fewer than {ENOUGH_TOKENS} output tokens give no rate: the prefill is most of their time"
    for run, call in zip(runs, calls, strict=True) if quantity.unit == "tokens/s" else ():
        rate = call.output_tokens / call.seconds if call.seconds > 0 else call.tokens_per_second
        if abs(call.tokens_per_second - rate) > RATE_SLACK * max(rate, call.tokens_per_second):
            yield (
                f"{run.label}'s {call.tokens_per_second:.3g} tokens/s are not its {call.output_tokens:,} tokens in "
                f"{wording.seconds(call.seconds)}"
            )
    if quantity.topic == "warm":
        spread = max(one.spread or 1.0, two.spread or 1.0)
        values = recorded(runs, quantity.name)
        if min(values) > 0 and spread > 1.0 and max(values) / min(values) <= spread:
            yield f"no difference to speak of: repeats of one and the same call differ by a factor of {spread:.2f}"


def _remarks(quantity: Quantity, base: Run, other: Run) -> Iterator[str]:
    """Yield what a reader has to know about two numbers that are compared."""
    runs = (base, other)
    if quantity.topic in ("first", "warm"):
        if graphs(base) != graphs(other):
            yield f"{graphs(base)} and {graphs(other)}"
        if threads := differing(runs, "platform.threads"):
            yield f"{threads[0]} and {threads[1]} threads"
    if base.release and other.release and quantity.topic != "memory" and base.release != other.release:
        yield f"vLLM {base.release} and {other.release}"
    if quantity.topic == "warm":
        repeats = recorded(runs, "warm.repeats")
        if min(repeats) < 2:
            yield "measured once: how far repeats differ is not known"
        elif repeats[0] != repeats[1]:
            yield f"medians of {repeats[0]} and {repeats[1]} calls"
    elif quantity.topic in ("first", "load"):
        yield "measured once"
    captured = [run.get("engine.graphs_captured") for run in runs]
    if quantity.name == "load.graphs" and captured[0] != captured[1]:
        yield f"{wording.number(captured[0])} graphs and {wording.number(captured[1])}"
    if quantity.name in ("load.weights", "load.total"):
        yield "whether the files lay in the machine's file cache is not recorded"
    if quantity.name == "memory.weights" and differing(runs, quantity.name):
        yield "as they lie in memory: kernels may want them padded or repacked"
    if quantity.name in ("memory.kv_cache", "memory.kv_tokens"):
        yield "a setting decides it: what vLLM is given of the memory, less the weights"
    if not all(run.get("model.weights_hash") for run in runs) and quantity.topic != "memory":
        yield "whether the weights are the same is not recorded"
