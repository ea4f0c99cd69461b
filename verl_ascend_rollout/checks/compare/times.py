"""Which numbers of two reports may be compared, and which may not: a ratio is given only where it means something.

A hand-written report sets 0.08 s beside 1.75 s and does not say how many tokens either is for, nor in which graph mode.
So each number here is either compared, with what the reader has to bear in mind, or refused, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from verl_ascend_rollout.checks.compare import wording
from verl_ascend_rollout.checks.compare.reading import Run
from verl_ascend_rollout.checks.smoke.measured import Call, Smoke

ENOUGH_TOKENS = 32
"""Output tokens from which a rate is compared with that of another number of tokens.

The seconds of a call have the prefill in them: for a few tokens it is most of the time, and the rate is not a rate."""

RATE_SLACK = 0.05
"""How far tokens per second may be from output tokens over seconds, as a share, for rounding."""

Topic = Literal["first", "warm", "load", "memory"]
Unit = Literal["s", "tokens/s", "bytes", "tokens"]


@dataclass(frozen=True)
class Quantity:
    """A number that every smoke report may have.

    Attributes:
        name: where it is in the facts.
        title: for people.
        topic: the check that it belongs to.
        unit: of the value.
        of: the value; `None` where it was not recorded.
    """

    name: str
    title: str
    topic: Topic
    unit: Unit
    of: Callable[[Smoke], float | None]

    def shown(self, value: float | None) -> str:
        """The value with its unit."""
        if self.unit == "s":
            return wording.seconds(value)
        if self.unit == "bytes":
            return wording.size(value)
        return wording.number(value) + ("" if value is None or self.unit == "tokens" else f" {self.unit}")


def _call(which: Literal["first", "warm"], field: str) -> Callable[[Smoke], float | None]:
    def of(smoke: Smoke) -> float | None:
        call: Call | None = getattr(smoke, which)
        return None if call is None else getattr(call, field)

    return of


def _load(field: str) -> Callable[[Smoke], float | None]:
    return lambda smoke: None if smoke.load is None else getattr(smoke.load, field)


def _memory(field: str) -> Callable[[Smoke], float | None]:
    return lambda smoke: None if smoke.memory is None else getattr(smoke.memory, field)


LOAD_PARTS: dict[str, str] = {
    "imports": "imports",
    "weights": "weights",
    "compile": "torch.compile",
    "graphs": "graph capture",
    "kv_cache": "KV cache and warm-up",
    "other": "processes and set-up",
}
"""The parts of `Load.total`, in the order in which they happen, and how they are called."""

QUANTITIES: tuple[Quantity, ...] = (
    Quantity("first.seconds", "first call", "first", "s", _call("first", "seconds")),
    Quantity(
        "first.tokens_per_second", "rate of the first call", "first", "tokens/s", _call("first", "tokens_per_second")
    ),
    Quantity("warm.seconds", "warm call", "warm", "s", _call("warm", "seconds")),
    Quantity("warm.tokens_per_second", "rate of the warm call", "warm", "tokens/s", _call("warm", "tokens_per_second")),
    Quantity("load.total", "load", "load", "s", _load("total")),
    *(Quantity(f"load.{part}", f"load: {title}", "load", "s", _load(part)) for part, title in LOAD_PARTS.items()),
    Quantity("memory.weights", "weights", "memory", "bytes", _memory("weights")),
    Quantity("memory.kv_cache", "KV cache", "memory", "bytes", _memory("kv_cache")),
    Quantity("memory.kv_tokens", "tokens in the KV cache", "memory", "tokens", _memory("kv_tokens")),
)


@dataclass(frozen=True)
class Comparison:
    """One number of two reports.

    Attributes:
        quantity: which.
        base, value: the baseline's and the other's; `None` where it was not recorded.
        refused: why they are not compared; empty where they are.
        remarks: what to bear in mind where they are.
    """

    quantity: Quantity
    base: float | None
    value: float | None
    refused: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def ratio(self) -> float | None:
        """The other's over the baseline's; `None` where they are not compared."""
        return None if self.refused or not self.base or self.value is None else self.value / self.base


def compare(base: Run, other: Run) -> dict[str, Comparison]:
    """Every quantity of two reports, by name."""
    return {quantity.name: _compare(quantity, base, other) for quantity in QUANTITIES}


def _compare(quantity: Quantity, base: Run, other: Run) -> Comparison:
    values = quantity.of(base.smoke), quantity.of(other.smoke)
    refused = list(_refused(quantity, base, other, *values))
    remarks = [] if refused else list(_remarks(quantity, base, other))
    return Comparison(quantity, *values, tuple(dict.fromkeys(refused)), tuple(remarks))


def _refused(
    quantity: Quantity, base: Run, other: Run, base_value: float | None, other_value: float | None
) -> Iterator[str]:
    runs = (base, other)
    missing = [run.label for run, value in zip(runs, (base_value, other_value), strict=True) if value is None]
    if missing:
        yield f"not recorded in {wording.listed(missing)}"
        return
    if quantity.name != "memory.weights":
        yield from _not_hardware(quantity, runs)
    yield from different_work(base, other)
    if quantity.topic in ("first", "warm"):
        yield from _different_calls(quantity, base, other)
    if base_value == 0 and other_value == 0:
        yield "there is none of it in either"
    elif base_value == 0 or other_value == 0:
        none, some = (base, other) if base_value == 0 else (other, base)
        yield f"{none.label} has none of it, {some.label} has: see why the times differ"
    if quantity.name == "load.total":
        for run in runs:
            yield from _inconsistent_load(run)


def _not_hardware(quantity: Quantity, runs: tuple[Run, Run]) -> Iterator[str]:
    for run in runs:
        if run.smoke.platform is None:
            yield f"{run.label}'s platform is not recorded"
        elif run.stand_in and quantity.topic == "memory":
            yield f"{run.label}'s device memory is that of a stand-in, not of a device"
        elif run.stand_in:
            yield f"{run.label} ran on a stand-in: its times say nothing about the hardware"


def different_work(base: Run, other: Run) -> Iterator[str]:
    """Why the two engines had not the same to do, whatever they were asked."""
    runs = (base, other)
    yield from different_models(base, other)
    unknown = [run.label for run in runs if run.smoke.engine is None]
    if unknown:
        yield f"the engine's configuration is not recorded in {wording.listed(unknown)}"
    if base.smoke.engine is None or other.smoke.engine is None:
        return
    for field, title in (
        ("tensor_parallel", "tensor parallel"),
        ("pipeline_parallel", "pipeline parallel"),
        ("data_parallel", "data parallel"),
    ):
        sizes = getattr(base.smoke.engine, field), getattr(other.smoke.engine, field)
        if sizes[0] != sizes[1]:
            yield f"{title} {sizes[0]} and {sizes[1]}"
    if base.smoke.engine.expert_parallel != other.smoke.engine.expert_parallel:
        yield "experts are spread over the ranks in one of them only"


def different_models(base: Run, other: Run) -> Iterator[str]:
    """Why the two engines did not load the same, or why that is not known."""
    one, two = base.smoke.model, other.smoke.model
    if one is None or two is None:
        unknown = [run.label for run in (base, other) if run.smoke.model is None]
        yield f"the model is not recorded in {wording.listed(unknown)}"
        return
    if one.tiny != two.tiny:
        toy, real = (base, other) if one.tiny else (other, base)
        yield f"{toy.label} loaded the toy model, {real.label} a real one"
    elif one.config_hash is None or two.config_hash is None:
        unknown = [run.label for run, model in ((base, one), (other, two)) if model.config_hash is None]
        yield f"whether it is the same model is not recorded in {wording.listed(unknown)} (config_hash)"
    elif one.config_hash != two.config_hash:
        yield "different models: their config.json differs"
    elif one.weights_hash and two.weights_hash and one.weights_hash != two.weights_hash:
        yield "different weights of one architecture: their files differ"
    for field, title in (("dtype", "dtype"), ("quantization", "quantization")):
        values = getattr(one, field), getattr(two, field)
        if None in values:
            unknown = [run.label for run, value in zip((base, other), values, strict=True) if value is None]
            yield f"the {title} is not recorded in {wording.listed(unknown)}"
        elif values[0] != values[1]:
            yield f"{title} {wording.name(values[0] or 'none', 20)} and {wording.name(values[1] or 'none', 20)}"


def _different_calls(quantity: Quantity, base: Run, other: Run) -> Iterator[str]:
    one: Call = getattr(base.smoke, quantity.topic)
    two: Call = getattr(other.smoke, quantity.topic)
    yield from _different_prompts(base, other, one, two)
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
    if quantity.unit == "tokens/s":
        for run, call in ((base, one), (other, two)):
            yield from _inconsistent_rate(run, call)
    if quantity.topic == "warm":
        yield from _inside_the_spread(one, two, quantity)


def _different_prompts(base: Run, other: Run, one: Call, two: Call) -> Iterator[str]:
    outputs = base.smoke.output, other.smoke.output
    if one.prompt_tokens != two.prompt_tokens:
        yield f"{one.prompt_tokens:,} prompt tokens and {two.prompt_tokens:,}"
    elif outputs[0] is None or outputs[1] is None:
        unknown = [run.label for run, output in zip((base, other), outputs, strict=True) if output is None]
        yield f"the prompt is not recorded in {wording.listed(unknown)}"
    elif outputs[0].prompt_token_ids != outputs[1].prompt_token_ids or outputs[0].prompt != outputs[1].prompt:
        yield "different prompts"


def _inconsistent_rate(run: Run, call: Call) -> Iterator[str]:
    if call.seconds > 0:
        rate = call.output_tokens / call.seconds
        if abs(call.tokens_per_second - rate) > RATE_SLACK * max(rate, call.tokens_per_second):
            yield (
                f"{run.label}'s {call.tokens_per_second:.3g} tokens/s are not its {call.output_tokens:,} tokens in "
                f"{wording.seconds(call.seconds)}"
            )


def _inconsistent_load(run: Run) -> Iterator[str]:
    load = run.smoke.load
    if load is not None and load.total is not None:
        parts = sum(getattr(load, part) or 0.0 for part in LOAD_PARTS)
        if parts > load.total * (1 + RATE_SLACK):
            whole = wording.seconds(load.total)
            yield f"{run.label}'s parts take {wording.seconds(parts)}, more than the {whole} of all"


def _inside_the_spread(one: Call, two: Call, quantity: Quantity) -> Iterator[str]:
    spread = max(one.spread or 1.0, two.spread or 1.0)
    values = [call.seconds if quantity.unit == "s" else call.tokens_per_second for call in (one, two)]
    if min(values) > 0 and spread > 1.0 and max(values) / min(values) <= spread:
        yield f"no difference to speak of: repeats of one and the same call differ by a factor of {spread:.2f}"


def _remarks(quantity: Quantity, base: Run, other: Run) -> Iterator[str]:
    """What a reader has to know about two numbers that are compared."""
    engines = base.smoke.engine, other.smoke.engine
    if quantity.topic in ("first", "warm"):
        modes = [graphs(run) for run in (base, other)]
        if modes[0] != modes[1]:
            yield f"{modes[0]} and {modes[1]}"
        threads = [run.smoke.platform.threads if run.smoke.platform else None for run in (base, other)]
        if None not in threads and threads[0] != threads[1]:
            yield f"{threads[0]} and {threads[1]} threads"
    if base.vllm and other.vllm and quantity.topic != "memory" and _release(base) != _release(other):
        yield f"vLLM {_release(base)} and {_release(other)}"
    if quantity.topic == "warm":
        calls = [run.smoke.warm for run in (base, other)]
        repeats = [call.repeats for call in calls if call is not None]
        if min(repeats) < 2:
            yield "measured once: how far repeats differ is not known"
        elif repeats[0] != repeats[1]:
            yield f"medians of {repeats[0]} and {repeats[1]} calls"
    elif quantity.topic in ("first", "load"):
        yield "measured once"
    if quantity.name == "load.graphs" and engines[0] and engines[1]:
        captured = [engine.graphs_captured for engine in engines if engine is not None]
        if captured[0] != captured[1]:
            yield f"{wording.number(captured[0])} graphs and {wording.number(captured[1])}"
    if quantity.name in ("load.weights", "load.total"):
        yield "whether the files lay in the machine's file cache is not recorded"
    if quantity.name == "memory.weights" and quantity.of(base.smoke) != quantity.of(other.smoke):
        yield "as they lie in memory: kernels may want them padded or repacked"
    if quantity.name in ("memory.kv_cache", "memory.kv_tokens"):
        yield "a setting decides it: what vLLM is given of the memory, less the weights"
    models = base.smoke.model, other.smoke.model
    if (
        models[0]
        and models[1]
        and not (models[0].weights_hash and models[1].weights_hash)
        and quantity.topic != "memory"
    ):
        yield "whether the weights are the same is not recorded"


def _release(run: Run) -> str:
    return wording.name((run.vllm or "").partition("+")[0], 40)


def has_graphs(run: Run) -> bool | None:
    """Whether a run's engine executed captured graphs; `None` where that is not recorded."""
    engine = run.smoke.engine
    if engine is None:
        return None
    if engine.graph_mode is not None:
        return engine.graph_mode != "NONE" and engine.graphs_captured != 0
    if engine.graphs_captured is not None:
        return engine.graphs_captured > 0
    return False if engine.eager else None  # without eager, graphs are meant, and may have failed


def graphs(run: Run) -> str:
    """How a run's engine executed: `eager`, `no graphs`, `67 graphs (FULL)`."""
    engine, captured = run.smoke.engine, has_graphs(run)
    if engine is None or captured is None:
        return f"graphs {wording.UNKNOWN}"
    if not captured:
        return "no graphs" if engine.eager is False else "eager"
    count = "graphs" if engine.graphs_captured is None else wording.many(engine.graphs_captured, "graph")
    return count if engine.graph_mode is None else f"{count} ({wording.name(engine.graph_mode, 40)})"
