"""Tables of what smoke recorded, a column for each run: smoke's own report has one, a comparison several."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from verl_ascend_rollout.tools import wording
from verl_ascend_rollout.tools.report import Section
from verl_ascend_rollout.tools.smoke.measured import Call, Warned
from verl_ascend_rollout.tools.wording import UNKNOWN

MOST_WARNINGS = 30
"""Kinds of warning that are shown."""

SHOWN_HASH = 12
"""Characters of a hash that are shown."""

TOOLKITS = {"npu": "CANN", "cuda": "CUDA"}

LOAD_PARTS: dict[str, str] = {
    "imports": "imports",
    "weights": "weights",
    "compile": "torch.compile",
    "graphs": "graph capture",
    "kv_cache": "KV cache and warm-up",
    "other": "processes and set-up",
}
"""The parts of `Load.total`, in the order in which they happen, and how they are called."""


class Facts(Protocol):
    """What a run recorded: `Smoke`, or compare's `Run`."""

    def get(self, path: str) -> Any:
        """Return a fact by its place; `None` where it was not recorded."""


Rows = Mapping[str, str | Callable[[Facts], str]]
"""By title the place of a fact, or how it is shown."""


def shown(value: Any) -> str:
    """Return any fact as people read it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or isinstance(value, int | float):
        return wording.number(value)
    if isinstance(value, tuple | list):
        return ", ".join(wording.name(part, 40) for part in value[:30]) or "none"
    return wording.name(value) or "none"


def table(
    title: str,
    rows: Rows,
    runs: Mapping[str, Facts],
    text: str = "",
    *,
    every: bool = False,
    more: tuple[tuple[str, ...], ...] = (),
    before_checks: bool = False,
) -> Section:
    """Return a table with a column for each run, by its label; a row that says nothing of any is left out, but for
    `every`; `more` rows come below."""
    cells = [
        (head, *(shown(run.get(of)) if isinstance(of, str) else of(run) for run in runs.values()))
        for head, of in rows.items()
    ]
    telling = tuple(row for row in cells if every or set(row[1:]) - {UNKNOWN, "none"})
    return Section(title, text, ("", *runs), (*telling, *more), before_checks=before_checks)


def has_graphs(run: Facts) -> bool | None:
    """Return whether a run's engine executed captured graphs; `None` where that is not recorded."""
    mode, captured = run.get("engine.graph_mode"), run.get("engine.graphs_captured")
    if mode is not None:
        return bool(mode != "NONE" and captured != 0)
    if captured is not None:
        return bool(captured > 0)
    return False if run.get("engine.eager") else None  # without eager, graphs are meant, and may have failed


def graphs(run: Facts) -> str:
    """Return how a run's engine executed: `eager`, `no graphs`, `67 graphs (FULL)`."""
    captured, mode, count = has_graphs(run), run.get("engine.graph_mode"), run.get("engine.graphs_captured")
    if captured is None:
        return f"graphs {UNKNOWN}"
    if not captured:
        return "no graphs" if run.get("engine.eager") is False else "eager"
    told = "graphs" if count is None else wording.many(count, "graph")
    return told if mode is None else f"{told} ({wording.name(mode, 40)})"


def machine(run: Facts) -> str:
    """Return the device, as far as it is known."""
    if run.get("platform") is None:
        return f"a machine that is {UNKNOWN}"
    device, count = run.get("platform.device"), run.get("platform.devices")
    told = wording.name(device, 80) if device else f"a device whose name is {UNKNOWN}"
    return f"{count:,} x {told}" if count and count > 1 else told


def _of(path: str, how: Callable[[Any], str]) -> Callable[[Facts], str]:
    return lambda run: how(run.get(path))


def _call(call: Call | None) -> str:
    if call is None:
        return UNKNOWN
    words = f"{wording.seconds(call.seconds)} for {wording.many(call.output_tokens, 'token')}"
    words += f" after {call.prompt_tokens:,} of the prompt"
    if call.prompts != 1:
        words += f" in {wording.many(call.prompts, 'request')}"
    if call.repeats > 1:
        spread = f", slowest over fastest {call.spread:.2f}" if call.spread else ""
        words += f" (median of {call.repeats}{spread})"
    return words


def _rate(value: float | None) -> str:
    return UNKNOWN if value is None else f"{wording.number(value)} tokens/s"


def _hash(value: str | None) -> str:
    return shown((value or "")[:SHOWN_HASH] or None)


def _said(run: Facts) -> str:
    output = run.get("output")
    if output is None:
        return UNKNOWN
    return f'"{wording.quoted(output.prompt, 120)}" → "{wording.quoted(output.text, 160)}"'


def _experts(run: Facts) -> str:
    experts, chosen = run.get("model.experts"), run.get("model.experts_per_token")
    if run.get("model") is None or experts is None:
        return UNKNOWN if run.get("model") is None else "none"
    return f"{experts:,}" + ("" if chosen is None else f", {chosen:,} for each token")


SUMMARY: Rows = {
    "model": "model.name",
    "platform": lambda run: machine(run) + (" (stand-in)" if run.get("platform.stand_in") else ""),
    "vLLM": lambda run: wording.name(run.get("vllm"), 40) if run.get("vllm") else UNKNOWN,
    "load": _of("load.total", wording.seconds),
    "first call": _of("first", _call),
    "warm call": _of("warm", _call),
    "warm rate": _of("warm.tokens_per_second", _rate),
    "graphs": graphs,
    "weights": _of("memory.weights", wording.size),
    "KV cache": _of("memory.kv_cache", wording.size),
    "prompt → text": _said,
}

MODEL: Rows = {
    "name": "model.name",
    "architecture": "model.architecture",
    "toy of --tiny": "model.tiny",
    "parameters": "model.parameters",
    "layers": "model.layers",
    "experts": _experts,
    "dtype": "model.dtype",
    "quantization": "model.quantization",
    "config.json (SHA-256)": _of("model.config_hash", _hash),
    "weights (SHA-256)": _of("model.weights_hash", _hash),
}

CONFIGURATION: Rows = {
    "platform": "platform.name",
    "SoC": "platform.soc",
    "device": "platform.device",
    "devices": "platform.devices",
    "stand-in": "platform.stand_in",
    "driver": "platform.driver",
    "CANN or CUDA": "platform.toolkit",
    "instruction sets": "platform.isa",
    "threads": "platform.threads",
    "tensor parallel": "engine.tensor_parallel",
    "pipeline parallel": "engine.pipeline_parallel",
    "data parallel": "engine.data_parallel",
    "expert parallel": "engine.expert_parallel",
    "eager": "engine.eager",
    "why": lambda run: UNKNOWN if run.get("engine") is None else wording.quoted(run.get("engine.eager_reason")),
    "graph mode": "engine.graph_mode",
    "graphs captured": "engine.graphs_captured",
    "attention": "engine.attention_backend",
    "experts by": "engine.moe_backend",
    "max_model_len": "engine.max_model_len",
    "max_num_seqs": "engine.max_num_seqs",
    "block size": "engine.block_size",
    "prefix caching": "engine.prefix_caching",
    "chunked prefill": "engine.chunked_prefill",
}

LOAD: Rows = {title: _of(f"load.{part}", wording.seconds) for part, title in (*LOAD_PARTS.items(), ("total", "in all"))}

INFERENCE: Rows = {
    "first call": _of("first", _call),
    "first call, rate": _of("first.tokens_per_second", _rate),
    "warm call": _of("warm", _call),
    "warm call, rate": _of("warm.tokens_per_second", _rate),
    "graphs": graphs,
}

MEMORY: Rows = {
    "weights": _of("memory.weights", wording.size),
    "KV cache": _of("memory.kv_cache", wording.size),
    "tokens in the KV cache": "memory.kv_tokens",
    "of the device": _of("memory.device_total", wording.size),
    "free once the engine ran": _of("memory.device_free_after", wording.size),
}
MEMORY_TEXT = "Of one worker, the largest where there are several; on a CPU the device is the machine's memory."


def versions(runs: Mapping[str, Facts]) -> Section:
    """Return the versions of all packages; where there are several runs, which differ."""
    recorded = [run.get("versions") for run in runs.values()]
    rows = []
    for package in sorted({package for versions in recorded for package in list(versions)[:100]}):
        found = [versions.get(package) for versions in recorded]
        told = [wording.name(version, 60) if version else "-" for version in found]
        rows.append((wording.name(package, 60), *told, "" if len(set(found)) == 1 else "differs"))
    return Section("Versions", columns=("package", *runs, ""), rows=tuple(rows))


def warnings(runs: Mapping[str, Facts]) -> Iterator[Section]:
    """Yield the warnings that are known to be harmless, and those that are not known."""
    for title, which in (("are known to be harmless", "harmless"), ("are not known here", "unknown")):
        lines: list[tuple[Warned, ...]] = [run.get(f"warnings.{which}") for run in runs.values()]
        kinds: dict[str, Warned] = {}
        for warned in itertools.chain(*lines):
            kinds.setdefault(warned.text, warned)
        why = ["why it is harmless"] if which == "harmless" else []
        rows = []
        for text, warned in list(kinds.items())[:MOST_WARNINGS]:
            counts = [sum(line.count for line in of_run if line.text == text) for of_run in lines]
            told = f"{wording.quoted(warned.why, 240)} ({wording.quoted(warned.source, 120) or 'source not recorded'})"
            rows.append((wording.quoted(text, 240), *map(wording.number, counts), *([told] if why else [])))
        text = f"How often each line came. {wording.many(len(kinds), 'kind')} in all."
        if len(kinds) > MOST_WARNINGS:
            text += f" The first {MOST_WARNINGS} are shown; the reports have them all."
        title = f"Warnings that {title}"
        yield Section(title, text, ("line", *runs, *why), tuple(rows)) if kinds else Section(title, "None.")
