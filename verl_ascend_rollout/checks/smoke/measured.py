"""What a smoke report records, on every platform alike: the schema that `smoke` writes and `compare` reads.

It has everything that people wrote into such reports by hand, and what they left out and what made their times
incomparable: how many tokens a time is for, whether it was the first call or a warm one, and in which graph mode.
A value that could not be found is `None`, never 0.  Times are seconds, sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from verl_ascend_rollout.report import Report, ReportError


@dataclass(frozen=True)
class Platform:
    """The machine.

    Attributes:
        name: `cpu`, `cuda`, `npu`.
        soc: Ascend's chip generation (`A2`, `A3`, ...); empty elsewhere.
        device: the device's own name, or the CPU's.
        devices: how many of them the engine used; 1 for a CPU.
        driver: the driver's version; on a CPU `None`.
        toolkit: CANN's or CUDA's version; on a CPU `None`.
        stand_in: what stands in for the hardware, where something does; empty on real hardware.
        isa: on a CPU, the instruction sets that its kernels are chosen by (`amx`, `avx512`, ...).
        threads: on a CPU, threads that the engine computes with.
    """

    name: str
    soc: str = ""
    device: str | None = None
    devices: int | None = None
    driver: str | None = None
    toolkit: str | None = None
    stand_in: str = ""
    isa: tuple[str, ...] = ()
    threads: int | None = None


@dataclass(frozen=True)
class Model:
    """What was loaded.

    Attributes:
        name: the path's last part, or the hub's name.
        architecture: `Qwen2MoeForCausalLM`.
        tiny: made by `--tiny`.
        config_hash: SHA-256 of its `config.json`, keys sorted; two reports are of one model if this and
            `weights_hash` agree.
        weights_hash: SHA-256 over the names, sizes and first and last MiB of the weight files; `None` where they are
            not on this machine's disk.
        parameters: how many.
        layers, experts, experts_per_token: of the model; experts `None` for a dense one.
        dtype: that it was loaded in.
        quantization: vLLM's name of it; empty for none.
    """

    name: str
    architecture: str | None = None
    tiny: bool = False
    config_hash: str | None = None
    weights_hash: str | None = None
    parameters: int | None = None
    layers: int | None = None
    experts: int | None = None
    experts_per_token: int | None = None
    dtype: str | None = None
    quantization: str = ""


@dataclass(frozen=True)
class Engine:
    """How vLLM ran it.

    Attributes:
        tensor_parallel, pipeline_parallel, data_parallel: sizes.
        expert_parallel: whether experts are spread over the ranks.
        eager: vLLM's `enforce_eager` as it was in the end.
        eager_reason: why, as the policy or the user said it.
        graph_mode: `NONE`, `PIECEWISE`, `FULL`, ...: the mode that the engine really ran with; `None` if not found.
        graphs_captured: how many; 0 where graphs are off.
        attention_backend, moe_backend: their class names.
        max_model_len, max_num_seqs, block_size: vLLM's settings.
        prefix_caching, chunked_prefill: vLLM's settings.
    """

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    expert_parallel: bool = False
    eager: bool | None = None
    eager_reason: str = ""
    graph_mode: str | None = None
    graphs_captured: int | None = None
    attention_backend: str | None = None
    moe_backend: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    block_size: int | None = None
    prefix_caching: bool | None = None
    chunked_prefill: bool | None = None


@dataclass(frozen=True)
class Load:
    """Where the time until the first request went, in seconds.

    Attributes:
        imports: importing torch, vLLM and the platform's plug-in, in the process that asks.
        weights: reading the weights and processing them into the kernels' layouts, in the slowest worker.
        compile: torch.compile, where it ran.
        graphs: capturing graphs; 0 where there are none.
        kv_cache: profiling the memory, allocating the KV cache, and the warm-up (without graphs).
        other: the engine's start less the above: processes, distributed set-up, configuration.
        total: from the start of the imports until the engine answers.
    """

    imports: float | None = None
    weights: float | None = None
    compile: float | None = None
    graphs: float | None = None
    kv_cache: float | None = None
    other: float | None = None
    total: float | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker (the largest, where there are several).

    Attributes:
        weights: of the model's parameters and buffers, as they lie in memory.
        kv_cache: of the KV cache as it was allocated.
        kv_tokens: tokens that the KV cache has room for.
        device_total: of the device; of the machine's memory on a CPU.
        device_free_after: what was free once the engine ran.
    """

    weights: int | None = None
    kv_cache: int | None = None
    kv_tokens: int | None = None
    device_total: int | None = None
    device_free_after: int | None = None


@dataclass(frozen=True)
class Call:
    """One timed call of `generate`, or the median of several alike.

    Attributes:
        seconds: from the call to the last token.
        prompt_tokens: of one prompt, times the prompts.
        output_tokens: in all.
        tokens_per_second: output tokens in a second.
        prompts: how many requests the call had.
        repeats: how many calls the seconds are the median of.
        spread: slowest over fastest of the repeats.
    """

    seconds: float
    prompt_tokens: int
    output_tokens: int
    tokens_per_second: float
    prompts: int = 1
    repeats: int = 1
    spread: float | None = None


@dataclass(frozen=True)
class Output:
    """What the model said, greedily.

    Attributes:
        prompt: as given.
        prompt_token_ids: what the engine was asked with.
        text: the answer.
        token_ids: the answer's tokens.
        logprobs: the log-probability of each of them, natural logarithm, in the engine's own arithmetic.
        prompt_logprobs: of each prompt token but the first, given those before it.
        finish_reason: `stop` or `length`.
        chat_template: whether the prompt went through the tokenizer's chat template.
    """

    prompt: str
    prompt_token_ids: tuple[int, ...] = ()
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    prompt_logprobs: tuple[float, ...] = ()
    finish_reason: str | None = None
    chat_template: bool = False


@dataclass(frozen=True)
class Warned:
    """A kind of warning or error line that appeared while the engine ran.

    Attributes:
        text: the line as it first came, without its time stamp and process number.
        count: how often.
        source: who is known to write it, and in which release that was read; empty where it is not known.
        why: why it is harmless; empty where that is not known.
    """

    text: str
    count: int = 1
    source: str = ""
    why: str = ""


@dataclass(frozen=True)
class Warnings:
    """Lines that look like warnings: those that are known to be harmless here, and all others."""

    harmless: tuple[Warned, ...] = ()
    unknown: tuple[Warned, ...] = ()


@dataclass(frozen=True)
class Smoke:
    """The facts of a smoke report.

    Attributes:
        platform, model, engine, load, memory: see their classes; `None` where smoke ended before it knew.
        versions: of the packages that matter, by distribution name; `python` and `ascend-safe` among them.
        first: the first call of the engine's life.
        warm: the same call again, the prefix cache having been reset.
        output: what came out of it.
        more_outputs: what came of the other prompts, where more than one was given; not timed.
        warnings: what was printed.
        import_fix: whether a folder that hides vLLM was to be got out of the way (`--no-import-fix`: it was not).
        put_first: what was hidden and put first, a sentence each.
        command: the command as it was given, without the program's path.
        ended_in: the phase in which smoke ended: `done`, or the one that failed or timed out.
    """

    platform: Platform | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    model: Model | None = None
    engine: Engine | None = None
    load: Load | None = None
    memory: Memory | None = None
    first: Call | None = None
    warm: Call | None = None
    output: Output | None = None
    more_outputs: tuple[Output, ...] = ()
    warnings: Warnings = Warnings()
    import_fix: bool = True
    put_first: tuple[str, ...] = ()
    command: str = ""
    ended_in: str = "done"

    def as_facts(self) -> dict[str, Any]:
        """As a `Report`'s facts."""
        facts: dict[str, Any] = msgspec.to_builtins(self)
        return facts

    @classmethod
    def of(cls, report: Report, name: str = "the report") -> Smoke:
        """What a smoke report recorded.

        Args:
            report: as `report.read` gives it.
            name: what to call it in an error: the file.

        Raises:
            ReportError: it is another kind of report, or its facts are not these, or have numbers that cannot be.
        """
        if report.kind != "smoke":
            raise ReportError(f"{name} is a {report.kind} report, and only reports of ascend-safe smoke are compared")
        try:
            return msgspec.convert(report.facts, cls)
        except msgspec.ValidationError as error:
            raise ReportError(f"{name} is no smoke report of ascend-safe: {str(error).rstrip('.')}") from None
