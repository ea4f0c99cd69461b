"""The sections of a comparison, in the order that people read: what a hand-written report has, and what it lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

from verl_ascend_rollout.checks.compare import explain, next_steps, wording
from verl_ascend_rollout.checks.compare.outputs import Agreement
from verl_ascend_rollout.checks.compare.pairs import SideBySide
from verl_ascend_rollout.checks.compare.reading import Run
from verl_ascend_rollout.checks.compare.times import LOAD_PARTS, graphs
from verl_ascend_rollout.checks.compare.verdicts import checks_of, ratio_of
from verl_ascend_rollout.checks.smoke.measured import Call, Model, Warned
from verl_ascend_rollout.report import Report, Section, Verdict

MOST_WARNINGS = 30
"""Kinds of warning that are shown of one run."""

SHOWN_HASH = 12
"""Characters of a hash that are shown."""


def sections_of(found: SideBySide) -> Iterator[Section]:
    """All sections."""
    yield _table(found, "Summary", SUMMARY, before_checks=True)
    yield _table(found, "Model", MODEL)
    yield _table(found, "Configuration", CONFIGURATION)
    yield _versions(found)
    for run in found.runs:
        yield _output(run)
    yield _agreement(found)
    yield from _load(found)
    yield from _inference(found)
    yield _comparable(found)
    yield _memory(found)
    yield Section("Key observations", _bullets(_observations(found)))
    yield Section("Platform notes", _bullets(note for run in found.runs for note in _notes(run)))
    yield from _warnings(found)
    yield Section(
        "Run it again",
        "The commands as they were given, each on its platform, and then this comparison:",
        verbatim="\n".join(
            [
                *(f"# {run.label}\n{_command(run)}" for run in found.runs),
                "# the comparison",
                "ascend-safe compare " + " ".join(wording.verbatim(run.file, 300) for run in found.runs),
            ]
        ),
    )
    yield Section("Next steps", _bullets(next_steps.of(found.runs, [pair.compared for pair in found.pairs])))
    yield Section("Conclusion", _conclusion(found))


Row = tuple[str, Callable[[Run], str]]


def _seconds_and_tokens(call: Call | None) -> str:
    if call is None:
        return wording.UNKNOWN
    words = f"{wording.seconds(call.seconds)} for {wording.many(call.output_tokens, 'token')}"
    if call.prompts != 1:
        words += f" in {wording.many(call.prompts, 'request')}"
    if call.repeats > 1:
        words += f" (median of {call.repeats}"
        words += f", slowest over fastest {call.spread:.2f})" if call.spread else ")"
    return words


def _rate(call: Call | None) -> str:
    return wording.UNKNOWN if call is None else f"{wording.number(call.tokens_per_second)} tokens/s"


def _said(run: Run) -> str:
    output = run.smoke.output
    if output is None:
        return wording.UNKNOWN
    return f'"{wording.quoted(output.prompt, 120)}" → "{wording.quoted(output.text, 160)}"'


def _status(run: Run) -> str:
    ended = "" if run.smoke.ended_in == "done" else f", ended in {wording.name(run.smoke.ended_in, 40)}"
    return run.report.verdict.upper() + ended


def _of_platform(field: str) -> Callable[[Run], str]:
    return lambda run: _shown(getattr(run.smoke.platform, field) if run.smoke.platform else None)


def _of_model(field: str) -> Callable[[Run], str]:
    return lambda run: _shown(getattr(run.smoke.model, field) if run.smoke.model else None)


def _of_engine(field: str) -> Callable[[Run], str]:
    return lambda run: _shown(getattr(run.smoke.engine, field) if run.smoke.engine else None)


def _of_memory(field: str) -> Callable[[Run], str]:
    return lambda run: wording.size(getattr(run.smoke.memory, field) if run.smoke.memory else None)


def _shown(value: Any) -> str:
    if value is None:
        return wording.UNKNOWN
    if isinstance(value, bool):
        return wording.truth(value)
    if isinstance(value, int | float):
        return wording.number(value)
    if isinstance(value, tuple):
        return ", ".join(wording.name(part, 40) for part in value[:30]) or "none"
    return wording.name(value) or "none"


def _hash(field: str) -> Callable[[Run], str]:
    def of(run: Run) -> str:
        model: Model | None = run.smoke.model
        value = getattr(model, field) if model else None
        return wording.UNKNOWN if value is None else wording.name(value[:SHOWN_HASH])

    return of


SUMMARY: tuple[Row, ...] = (
    ("date", lambda run: wording.name(run.report.created, 40)),
    ("model", lambda run: wording.name(run.smoke.model.name, 80) if run.smoke.model else wording.UNKNOWN),
    ("platform", lambda run: explain.machine(run) + (" (stand-in)" if run.stand_in else "")),
    ("vLLM", lambda run: wording.name(run.vllm, 40) if run.vllm else wording.UNKNOWN),
    ("load", lambda run: wording.seconds(run.smoke.load.total if run.smoke.load else None)),
    ("first call", lambda run: _seconds_and_tokens(run.smoke.first)),
    ("warm call", lambda run: _seconds_and_tokens(run.smoke.warm)),
    ("warm rate", lambda run: _rate(run.smoke.warm)),
    ("graphs", graphs),
    ("weights", _of_memory("weights")),
    ("KV cache", _of_memory("kv_cache")),
    ("prompt → text", _said),
    ("smoke's verdict", _status),
)

MODEL: tuple[Row, ...] = (
    ("name", _of_model("name")),
    ("architecture", _of_model("architecture")),
    ("toy of --tiny", _of_model("tiny")),
    ("parameters", _of_model("parameters")),
    ("layers", _of_model("layers")),
    ("experts", lambda run: _experts(run)),
    ("dtype", _of_model("dtype")),
    ("quantization", _of_model("quantization")),
    ("config.json (SHA-256)", _hash("config_hash")),
    ("weights (SHA-256)", _hash("weights_hash")),
)

CONFIGURATION: tuple[Row, ...] = (
    ("platform", _of_platform("name")),
    ("SoC", _of_platform("soc")),
    ("device", _of_platform("device")),
    ("devices", _of_platform("devices")),
    ("stand-in", _of_platform("stand_in")),
    ("driver", _of_platform("driver")),
    ("CANN or CUDA", _of_platform("toolkit")),
    ("instruction sets", _of_platform("isa")),
    ("threads", _of_platform("threads")),
    ("tensor parallel", _of_engine("tensor_parallel")),
    ("pipeline parallel", _of_engine("pipeline_parallel")),
    ("data parallel", _of_engine("data_parallel")),
    ("expert parallel", _of_engine("expert_parallel")),
    ("eager", _of_engine("eager")),
    ("why", lambda run: wording.quoted(run.smoke.engine.eager_reason) if run.smoke.engine else wording.UNKNOWN),
    ("graph mode", _of_engine("graph_mode")),
    ("graphs captured", _of_engine("graphs_captured")),
    ("attention", _of_engine("attention_backend")),
    ("experts by", _of_engine("moe_backend")),
    ("max_model_len", _of_engine("max_model_len")),
    ("max_num_seqs", _of_engine("max_num_seqs")),
    ("block size", _of_engine("block_size")),
    ("prefix caching", _of_engine("prefix_caching")),
    ("chunked prefill", _of_engine("chunked_prefill")),
)


def _experts(run: Run) -> str:
    model = run.smoke.model
    if model is None:
        return wording.UNKNOWN
    if model.experts is None:
        return "none"
    chosen = "" if model.experts_per_token is None else f", {model.experts_per_token:,} for each token"
    return f"{model.experts:,}{chosen}"


def _table(found: SideBySide, title: str, rows: Sequence[Row], *, before_checks: bool = False) -> Section:
    cells = [(head, *(of(run) for run in found.runs)) for head, of in rows]
    # A row that says nothing of any of them is left out.
    telling = [row for row in cells if set(row[1:]) - {wording.UNKNOWN, "none"}]
    columns = ("", *(run.label for run in found.runs))
    text = f"The others are compared with {found.runs[0].label}." if before_checks else ""
    return Section(title, text, columns, tuple(telling), before_checks=before_checks)


def _versions(found: SideBySide) -> Section:
    names = sorted({package for run in found.runs for package in list(run.smoke.versions)[:100]})
    rows = []
    for package in names:
        versions = [run.smoke.versions.get(package) for run in found.runs]
        shown = [wording.name(version, 60) if version else "-" for version in versions]
        rows.append((wording.name(package, 60), *shown, "" if len(set(versions)) == 1 else "differs"))
    return Section("Versions", columns=("package", *(run.label for run in found.runs), ""), rows=tuple(rows))


def _output(run: Run) -> Section:
    output, title = run.smoke.output, f"Output: {run.label}"
    if output is None:
        return Section(title, f"None: smoke ended in {wording.name(run.smoke.ended_in, 40)}.")
    counts = [f"{wording.many(len(output.token_ids), 'token')}", f"finished by {_shown(output.finish_reason)}"]
    if output.chat_template:
        counts.append("through the chat template")
    told = [f"prompt: {wording.verbatim(output.prompt)}", f"answer: {wording.verbatim(output.text)}"]
    return Section(title, f"{', '.join(counts)}.", verbatim="\n".join(told))


def _agreement(found: SideBySide) -> Section:
    rows = []
    for pair in found.pairs:
        for number, agreed in enumerate((pair.agreement, *pair.agreement.more), 1):
            rows.append((pair.other.label + (f", prompt {number}" if pair.agreement.more else ""), *_agreed(agreed)))
    columns = ("against the baseline", "equal tokens", "differs at", "gap there", "prompt", "answer", "tolerance")
    text = (
        f"Baseline: {found.runs[0].label}. Log-probabilities are natural logarithms; the answer's are compared as far "
        "as its tokens are equal."
    )
    return Section("Agreement of the outputs", text, columns, tuple(rows))


def _agreed(agreed: Agreement) -> tuple[str, ...]:
    gap = agreed.divergence.gap if agreed.divergence else None
    return (
        wording.number(agreed.equal_tokens) if agreed.equal_tokens is not None else "not compared",
        "-" if agreed.divergence is None else f"token {agreed.divergence.position}",
        "-" if gap is None else f"{gap:.3g}",
        agreed.prompt.told() if agreed.prompt else "not compared",
        agreed.answer.told() if agreed.answer else "not compared",
        "-" if agreed.tolerance is None else f"{agreed.tolerance:.3g}",
    )


def _load(found: SideBySide) -> Iterator[Section]:
    rows = []
    for part, title in (*LOAD_PARTS.items(), ("total", "in all")):
        values = [getattr(run.smoke.load, part) if run.smoke.load else None for run in found.runs]
        if any(value is not None for value in values):
            rows.append((title, *(wording.seconds(value) for value in values)))
    lines = [line for run in found.runs for line in explain.load_split(run)]
    lines += [line for pair in found.pairs for line in explain.of_load(pair.base, pair.other, pair.compared)]
    yield Section("Load", columns=("", *(run.label for run in found.runs)), rows=tuple(rows))
    yield Section("Why the load times differ", _bullets(lines))


def _inference(found: SideBySide) -> Iterator[Section]:
    rows: list[tuple[str, ...]] = []
    for which in ("first", "warm"):
        calls: list[Call | None] = [getattr(run.smoke, which) for run in found.runs]
        rows.append((f"{which} call", *(_seconds_and_tokens(call) for call in calls)))
        rows.append((f"{which} call, prompt tokens", *(_shown(call.prompt_tokens if call else None) for call in calls)))
        rows.append((f"{which} call, rate", *(_rate(call) for call in calls)))
    rows.append(("graphs", *(graphs(run) for run in found.runs)))
    lines = [line for run in found.runs for line in explain.first_and_warm(run)]
    lines += [line for pair in found.pairs for line in explain.of_inference(pair.base, pair.other, pair.compared)]
    yield Section("Inference", columns=("", *(run.label for run in found.runs)), rows=tuple(rows))
    yield Section("Why the inference times differ", _bullets(lines))


def _comparable(found: SideBySide) -> Section:
    rows = []
    for pair in found.pairs:
        for comparison in pair.compared.values():
            if not comparison.base and not comparison.value:
                continue  # neither has any of it, or neither has recorded it
            shown = comparison.quantity.shown
            if comparison.refused:
                verdict, why = "not compared", "; ".join(comparison.refused)
            else:
                verdict, why = ratio_of(comparison), "; ".join(comparison.remarks)
            rows.append(
                (
                    comparison.quantity.title,
                    pair.other.label,
                    shown(comparison.value),
                    f"{pair.base.label}: {shown(comparison.base)}",
                    verdict,
                    why,
                )
            )
    columns = ("number", "report", "value", "baseline", "ratio to the baseline", "why not, or what to bear in mind")
    return Section("What may be compared, and what not", columns=columns, rows=tuple(rows))


def _memory(found: SideBySide) -> Section:
    rows: list[tuple[str, ...]] = [
        (title, *(_of_memory(field)(run) for run in found.runs))
        for field, title in (
            ("weights", "weights"),
            ("kv_cache", "KV cache"),
            ("device_total", "of the device"),
            ("device_free_after", "free once the engine ran"),
        )
    ]
    tokens = [run.smoke.memory.kv_tokens if run.smoke.memory else None for run in found.runs]
    rows.insert(2, ("tokens in the KV cache", *(wording.number(count) for count in tokens)))
    telling = tuple(row for row in rows if set(row[1:]) != {wording.UNKNOWN})
    text = "Of one worker, the largest where there are several; on a CPU the device is the machine's memory."
    return Section("Memory", text, ("", *(run.label for run in found.runs)), telling)


def _observations(found: SideBySide) -> Iterator[str]:
    for pair in found.pairs:
        for check in pair.agreement.checks:
            if check.verdict != "skip":
                yield f"{check.summary}."
        if all(check.verdict == "skip" for check in pair.agreement.checks):
            yield f"Outputs are not compared: {pair.agreement.checks[0].summary}."
        compared = [comparison for comparison in pair.compared.values() if comparison.ratio is not None]
        for name in ("load.total", "first.seconds", "warm.seconds", "warm.tokens_per_second", "memory.weights"):
            comparison = pair.compared[name]
            if comparison.ratio is not None:
                shown = comparison.quantity.shown
                yield (
                    f"{comparison.quantity.title}: {shown(comparison.value)} in {pair.other.label}, "
                    f"{shown(comparison.base)} in {pair.base.label}: {ratio_of(comparison)}."
                )
        refused = sum(
            bool(comparison.refused) for comparison in pair.compared.values() if comparison.base or comparison.value
        )
        yield f"{pair.other.label} against {pair.base.label}: compared numbers {len(compared)}, refused {refused}."


def _notes(run: Run) -> Iterator[str]:
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
    facts = []
    if platform.soc:
        facts.append(f"SoC {wording.name(platform.soc, 20)}")
    if platform.name in ("npu", "cuda"):
        kit = "CANN" if platform.name == "npu" else "CUDA"
        facts += [f"{kit} {_shown(platform.toolkit)}", f"driver {_shown(platform.driver)}"]
    if platform.name == "cpu":
        threads = platform.threads
        facts.append(f"threads {wording.UNKNOWN}" if threads is None else wording.many(threads, "thread"))
        facts.append(f"kernels chosen by {_shown(platform.isa)}")
    engine = run.smoke.engine
    if engine is not None and engine.eager_reason.strip():
        facts.append(f"eager {wording.truth(engine.eager)}: {wording.quoted(engine.eager_reason, 200)}")
    yield f"{run.label}: {explain.machine(run)}{''.join(f'; {fact}' for fact in facts)}."


def _warnings(found: SideBySide) -> Iterator[Section]:
    for title, field in (
        ("Warnings that are known to be harmless", "harmless"),
        ("Warnings that are not known here", "unknown"),
    ):
        kinds: dict[str, Warned] = {}
        for run in found.runs:
            for warned in getattr(run.smoke.warnings, field):
                kinds.setdefault(warned.text, warned)
        rows: list[tuple[str, ...]] = []
        for text, warned in list(kinds.items())[:MOST_WARNINGS]:
            counts = [_times(run, field, text) for run in found.runs]
            why = f"{wording.quoted(warned.why, 240)} ({wording.quoted(warned.source, 120) or 'source not recorded'})"
            rows.append((wording.quoted(text, 240), *counts, *([why] if field == "harmless" else [])))
        told = f"How often each line came. {wording.many(len(kinds), 'kind')} in all."
        if len(kinds) > MOST_WARNINGS:
            told += f" The first {MOST_WARNINGS} are shown; the reports have them all."
        columns = ("line", *(run.label for run in found.runs), *(["why it is harmless"] if field == "harmless" else []))
        yield Section(title, told if rows else "None.", columns if rows else (), tuple(rows))


def _times(run: Run, field: str, text: str) -> str:
    lines: tuple[Warned, ...] = getattr(run.smoke.warnings, field)
    return wording.number(sum(warned.count for warned in lines if warned.text == text))


def _command(run: Run) -> str:
    command = " ".join(wording.verbatim(run.smoke.command, 1000).split())
    if not command:
        return f"# its command is {wording.UNKNOWN}"
    return command if command.startswith(("ascend-safe", "python")) else f"ascend-safe {command}"


def _conclusion(found: SideBySide) -> str:
    checks = list(checks_of(found))
    lines = []
    for verdict in get_args(Verdict):
        names = [check.name for check in checks if check.verdict == verdict]
        if names:
            lines.append(f"- {verdict}: {', '.join(names)}")
    report = Report("compare", "", checks=tuple(checks))
    ends = {
        "pass": "The reports agree wherever they can be compared.",
        "warn": "Nothing failed, and something is to be looked at.",
        "fail": "Something failed: see the checks above.",
        "unknown": "Too little is recorded, or too little is alike, to say that the platforms agree.",
    }
    outputs = [check for check in checks if check.name.startswith("outputs.")]
    end = ends.get(report.verdict, ends["unknown"])
    if report.verdict in ("pass", "warn") and all(check.verdict in ("skip", "unknown") for check in outputs):
        end = "The outputs were not compared: that the platforms agree is not shown."
    return "\n".join([end, "", *lines])


def _bullets(lines: Any) -> str:
    unique = list(dict.fromkeys(lines))
    return "\n".join(f"- {line}" for line in unique) if unique else "Nothing that the reports recorded."
