"""The process that runs the engine: `python -m verl_ascend_rollout.checks.smoke.child ASKED.json`.

It tells what it finds, as it finds it, in JSON lines on the descriptor that its parent named; what it and vLLM print is
the log.  Each message has a `kind`: `phase` (name, state `begin` or `end`, seconds), `fact` (name, value), `check`
(a report's check), `error` (phase, text).
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from verl_ascend_rollout.checks.smoke import lines
from verl_ascend_rollout.checks.smoke.supervisor import FD_VARIABLE
from verl_ascend_rollout.report import Check, timed

BATCH = ("Name three colours.", "Count from one to ten.", "Hello")
"""Beside the user's prompts in a batch: others of other lengths."""


class Teller:
    """Writes messages to the parent."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "w", buffering=1, encoding="utf-8")
        self.phase_now = ""

    def tell(self, kind: str, **content: Any) -> None:
        self._file.write(json.dumps({"kind": kind, **content}) + "\n")

    def fact(self, name: str, value: Any) -> None:
        self.tell("fact", name=name, value=value)

    def check(self, check: Check) -> None:
        import msgspec

        self.tell("check", value=msgspec.to_builtins(check))

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.phase_now = name
        started = time.perf_counter()
        self.tell("phase", name=name, state="begin")
        yield
        self.tell("phase", name=name, state="end", seconds=time.perf_counter() - started)


def main() -> int:
    """Run the engine that the file asks for; the exit status."""
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    descriptor = int(os.environ.pop(FD_VARIABLE))
    os.set_inheritable(descriptor, False)
    teller = Teller(descriptor)
    try:
        _run(asked, teller)
    except Exception as error:
        traceback.print_exc()
        teller.tell("error", phase=teller.phase_now, text=lines.one_sentence(error))
        return 1
    return 0


def _run(asked: dict[str, Any], teller: Teller) -> None:
    started = time.perf_counter()
    with teller.phase("imports"):
        import torch
        from vllm import LLM

        teller.fact("imports", time.perf_counter() - started)
        print(f"ascend-safe smoke: torch {torch.__version__}, {LLM.__module__}", flush=True)

    from verl_ascend_rollout.checks.smoke import trials
    from verl_ascend_rollout.checks.smoke.engine import Engine

    with teller.phase("engine"):
        engine = Engine(asked["model"], asked["arguments"])
    teller.fact("total", time.perf_counter() - started)
    teller.fact("left_out", engine.left_out)
    teller.fact("workers", engine.ask("ascend_safe_smoke_facts"))

    with teller.phase("generate"):
        prompts = tuple(engine.prompt(text) for text in asked["prompts"])
        room = asked["arguments"].get("max_model_len")
        longest = max(len(prompt.tokens) for prompt in prompts)
        if room is not None and longest + asked["max_tokens"] > room:
            raise ValueError(
                f"a prompt of {longest} tokens and {asked['max_tokens']} to answer it do not fit into {room}: say a "
                "smaller --max-tokens, a larger --max-model-len, or a shorter --prompt"
            )
        seconds, first = engine.timed_answer(prompts[0], asked["max_tokens"])
        teller.fact("first", _call(seconds, len(prompts[0].tokens), len(first.tokens)))
        # What the first call left to be done once, a second may do as well: caches of kernels for its exact shapes.
        repeats = [engine.timed_answer(prompts[0], asked["max_tokens"])[0] for _ in range(asked["repeats"])]
        middle = statistics.median(repeats)
        warm = _call(middle, len(prompts[0].tokens), len(first.tokens))
        spread = max(repeats) / min(repeats) if min(repeats) > 0 else None
        teller.fact("warm", {**warm, "repeats": len(repeats), "spread": spread})
        outputs = []
        for prompt in prompts:
            (answer,) = engine.fresh_answers([prompt], asked["max_tokens"])
            engine.forget()
            (scored,) = engine.answer([prompt], 1, prompt_logprobs=True)
            outputs.append(
                {
                    "prompt": prompt.text,
                    "prompt_token_ids": prompt.tokens,
                    "text": answer.text,
                    "token_ids": answer.tokens,
                    "logprobs": answer.logprobs,
                    "prompt_logprobs": scored.prompt_logprobs,
                    "finish_reason": answer.finish_reason,
                    "chat_template": prompt.chat_template,
                }
            )
        teller.fact("outputs", outputs)

    others = [engine.prompt(text) for text in BATCH]
    workers = engine.ask("ascend_safe_smoke_facts")
    setting = trials.Setting(
        prompts=(
            *prompts,
            *(other for other in others if room is None or len(other.tokens) + asked["max_tokens"] <= room),
        ),
        max_tokens=asked["max_tokens"],
        files=tuple(asked["files"]),
        why_no_files=asked["why_no_files"],
        sleep_mode=asked["sleep_mode"],
        why_no_sleep=asked["why_no_sleep"],
        weight_path=asked["weight_path"],
        quantization=workers[0]["quantization"],
    )
    with teller.phase("output.deterministic"):
        before, deterministic, finite = trials.baseline(engine, setting, first)
        teller.check(deterministic)
        teller.check(finite)
    for name, trial in trials.TRIALS.items():
        if name in asked["skipped"]:
            teller.check(Check(name, "skip", "left out with --skip"))
            continue
        with teller.phase(name):
            begun = time.perf_counter()
            check = trial(engine, setting, before)
            teller.check(timed(check, time.perf_counter() - begun))


def _call(seconds: float, prompt_tokens: int, output_tokens: int) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "tokens_per_second": output_tokens / seconds,
    }


if __name__ == "__main__":
    sys.exit(main())
