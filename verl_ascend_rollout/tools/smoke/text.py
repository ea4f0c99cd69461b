"""What people read of a smoke test: the report's sections, and the terminal's summary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from verl_ascend_rollout.policy.decision import Decisions, shown
from verl_ascend_rollout.tools import wording
from verl_ascend_rollout.tools.report import Report, Section
from verl_ascend_rollout.tools.smoke import tables
from verl_ascend_rollout.tools.smoke.measured import Smoke
from verl_ascend_rollout.tools.terminal import beside, checks, console, shortened

PLATFORMS = {"cpu": "a CPU", "cuda": "a CUDA GPU", "npu": "an Ascend NPU"}

TINY_NOTE = (
    "The model is a toy with random weights: its text is noise.  What counts is that it is the same noise each time, "
    "and the same as Hugging Face's."
)


def title(facts: Smoke) -> str:
    """Return the report's heading: the model, and on what it ran; where something stands in for hardware, that is named
    and the hardware is not."""
    platform, stack = facts.platform, "nothing"
    known = {name: f"{name} {version}" for name, version in facts.versions.items()}
    vllm = f"vLLM {facts.vllm}" if facts.vllm else "vLLM"
    if platform is not None and platform.stand_in:
        real = [known[name] for name in ("torch-npu", "vllm-ascend") if name in known]
        stack = f"real {', '.join([*real, vllm])} on {platform.stand_in}"
    elif platform is not None:
        plugin = f", {known['vllm-ascend']}" if platform.name == "npu" and "vllm-ascend" in known else ""
        stack = f"{vllm}{plugin} on {PLATFORMS[platform.name]}"
    return f"vLLM inference verification: {facts.model.name if facts.model is not None else 'no model'}, {stack}"


def sections(facts: Smoke, decisions: Decisions, phases: Mapping[str, float]) -> Iterator[Section]:
    """Yield all parts of the report beside its checks."""
    runs = {"value": facts}
    ended = (("ended in", facts.ended_in),)
    yield tables.table("Summary", tables.SUMMARY, runs, _notes(facts), more=ended, before_checks=True)
    yield tables.table("Model", tables.MODEL, runs)
    yield tables.table("Configuration", tables.CONFIGURATION, runs, more=tuple(facts.versions.items()))
    yield from _outputs(facts)
    text = (
        "The first call is the engine's first; the warm one is the same call again, with nothing cached of its prompt. "
        "Times of two reports compare where graph mode and token counts do."
    )
    trials = tuple((f"check {name}", wording.seconds(seconds)) for name, seconds in phases.items() if "." in name)
    calls = {**tables.LOAD, **tables.INFERENCE}
    yield tables.table("Where the time went", calls, runs, text, every=True, more=trials)
    yield tables.table("Memory", tables.MEMORY, runs, tables.MEMORY_TEXT)
    yield from tables.warnings({"times": facts})
    yield Section(
        "Decisions",
        "What was decided for this platform, and why (`ascend-safe explain` prints the same).",
        ("name", "value", "reason", "source", "confidence"),
        tuple((d.name, shown(d.value), d.reason, d.source, d.confidence) for d in decisions),
    )
    yield Section("Command", verbatim=facts.command)


def show(report: Report, facts: Smoke, out: Path) -> None:
    """Print the summary, the checks and the verdict, redacted."""
    clean, terminal = report.redacted(), console()
    terminal.print(clean.title, "", sep="\n")
    rows = {name: value for section in clean.sections if section.title == "Summary" for name, value in section.rows}
    rows.pop("prompt → text", None)  # escaped for Markdown
    output = clean.facts.get("output")
    rows |= {name: shortened(output[name]) for name in ("prompt", "text") if output}
    for name, value in rows.items():
        beside(terminal, f"  {name}", " ".join(value.split()), 14)
    terminal.print()
    checks(terminal, clean.checks)
    if facts.model is not None and facts.model.tiny:
        terminal.print("", TINY_NOTE.replace("  ", " "), sep="\n")
    terminal.print("", f"{out}/: smoke.md, smoke.json, smoke.junit.xml, engine.log", "", clean.verdict_line(), sep="\n")


def _notes(facts: Smoke) -> str:
    said = []
    if facts.platform is not None and facts.platform.stand_in:
        said.append(
            f"**No Ascend hardware was used.** vLLM, torch-npu and vllm-ascend are real, and run on "
            f"{facts.platform.stand_in}: times, memory and rounding say nothing about an NPU."
        )
    if facts.model is not None and facts.model.tiny:
        said.append(TINY_NOTE)
    return "\n\n".join(said)


def _outputs(facts: Smoke) -> Iterator[Section]:
    outputs = [output for output in (facts.output, *facts.more_outputs) if output is not None]
    for number, output in enumerate(outputs, 1):
        template = "through the chat template" if output.chat_template else "without a chat template"
        yield Section(
            "Output" if number == 1 else f"Output {number}",
            f"{len(output.prompt_token_ids)} prompt tokens ({template}), {len(output.token_ids)} answer tokens, "
            f"greedy; ended by {tables.shown(output.finish_reason)}.",
            verbatim=f"> {output.prompt}\n{output.text}",
        )
    if not outputs:
        yield Section("Output", "None: it ended before the engine answered.")
