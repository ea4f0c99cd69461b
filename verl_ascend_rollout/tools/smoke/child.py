"""The two child processes of smoke: `python -m verl_ascend_rollout.tools.smoke.child engine|reference ASKED.json`.

`engine` starts vLLM, asks it, and checks; `reference` computes the same with Hugging Face's model, on the CPU, in
float32.  Both tell what they find, as they find it, in JSON lines on the descriptor that their parent named; what they
and vLLM print is the log.  Each message has a `kind`: `phase` (name, state `begin` or `end`, seconds), `fact` (name,
value), `check` (a report's check), `error` (text).
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
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from verl_ascend_rollout.engine import causes
from verl_ascend_rollout.tools.report import Check
from verl_ascend_rollout.tools.smoke.engine import Engine
from verl_ascend_rollout.tools.smoke.measured import Output
from verl_ascend_rollout.tools.supervisor import FD_VARIABLE

BATCH = ("Name three colours.", "Count from one to ten.", "Hello")
"""Beside the user's prompts in a batch: others of other lengths."""


class Teller:
    """Writes messages to the parent."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self._file = os.fdopen(descriptor, "w", buffering=1, encoding="utf-8")

    def tell(self, kind: str, **content: Any) -> None:
        # msgspec's own JSON has null for NaN, and an engine that computes NaN is what smoke is there to report.
        self._file.write(json.dumps({"kind": kind, **msgspec.to_builtins(content)}) + "\n")

    def fact(self, name: str, value: Any) -> None:
        self.tell("fact", name=name, value=value)

    def check(self, check: Check, seconds: float = 0.0) -> None:
        self.tell("check", value=replace(check, seconds=seconds))

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        self.tell("phase", name=name, state="begin")
        yield
        self.tell("phase", name=name, state="end", seconds=time.perf_counter() - started)


def main() -> int:
    """Run what the file asks for; the exit status."""
    which, file = sys.argv[1:]
    teller = Teller(int(os.environ.pop(FD_VARIABLE)))
    try:
        {"engine": _engine, "reference": _reference}[which](json.loads(Path(file).read_text(encoding="utf-8")), teller)
    except Exception as error:
        traceback.print_exc()
        teller.tell("error", text=causes.one_sentence(error))
        return 1
    return 0


def _engine(asked: dict[str, Any], teller: Teller) -> None:
    """Start the engine, time its calls, and try what a rollout does with it."""
    started = time.perf_counter()
    with teller.phase("imports"):
        import torch
        from vllm import LLM

        teller.fact("imports", time.perf_counter() - started)
        print(f"ascend-safe smoke: torch {torch.__version__}, {LLM.__module__}", flush=True)

    from verl_ascend_rollout.tools.smoke import trials

    with teller.phase("engine"):
        engine = Engine(asked["model"], asked["arguments"])
    teller.fact("total", time.perf_counter() - started)
    facts = engine.ask("ascend_safe_smoke_facts")
    teller.fact("workers", facts)
    room, most = asked["arguments"].get("max_model_len"), asked["max_tokens"]
    with teller.phase("generate"):
        prompts = tuple(engine.prompt(text) for text in asked["prompts"])
        longest = max(len(prompt.prompt_token_ids) for prompt in prompts)
        if room is not None and longest + most > room:
            raise ValueError(
                f"a prompt of {longest} tokens and {most} to answer it do not fit into {room}: say a smaller "
                "--max-tokens, a larger --max-model-len, or a shorter --prompt"
            )
        first = _timed(engine, prompts[0], most, asked["repeats"], teller)
        teller.fact("outputs", [_scored(engine, prompt, most) for prompt in prompts])
    others = [engine.prompt(text) for text in BATCH]
    setting = trials.Setting(
        prompts=(*prompts, *(other for other in others if room is None or len(other.prompt_token_ids) + most <= room)),
        quantization=facts[0]["quantization"],
        **{field: asked[field] for field in ("max_tokens", "files", "why_no_sleep", "weight_path")},
    )
    with teller.phase("output.deterministic"):
        begun = time.perf_counter()
        before, deterministic, finite = trials.baseline(engine, setting, first)
        teller.check(deterministic, time.perf_counter() - begun)
        teller.check(finite)
    for name, trial in trials.TRIALS.items():
        if name in asked["skipped"]:
            teller.check(Check(name, "skip", "left out with --skip"))
            continue
        with teller.phase(name):
            begun = time.perf_counter()
            teller.check(trial(engine, setting, before), time.perf_counter() - begun)


def _timed(engine: Engine, prompt: Output, most: int, repeats: int, teller: Teller) -> Output:
    """Tell the first call's time and the warm one's, and return the first answer."""
    seconds, first = engine.timed_answer(prompt, most)

    def call(seconds: float) -> dict[str, Any]:
        counts = {"prompt_tokens": len(prompt.prompt_token_ids), "output_tokens": len(first.token_ids)}
        return {"seconds": seconds, **counts, "tokens_per_second": len(first.token_ids) / seconds}

    teller.fact("first", call(seconds))
    # What the first call left to be done once, a second may do as well: caches of kernels for its exact shapes.
    times = [engine.timed_answer(prompt, most)[0] for _ in range(repeats)]
    spread = max(times) / min(times) if min(times) > 0 else None
    teller.fact("warm", {**call(statistics.median(times)), "repeats": repeats, "spread": spread})
    return first


def _scored(engine: Engine, prompt: Output, most: int) -> Output:
    """Return what the engine says to a prompt, with the log-probabilities of the prompt's own tokens."""
    (answer,) = engine.fresh_answers([prompt], most)
    engine.forget()
    (scored,) = engine.answer([prompt], 1, prompt_logprobs=True)
    return replace(answer, prompt_logprobs=scored.prompt_logprobs)


def _reference(asked: dict[str, Any], teller: Teller) -> None:
    """Compute, for each sequence of tokens, the log-probability of every token given those before it, the token that it
    would have chosen there, and how much the log-probabilities of the vocabulary vary."""
    with teller.phase("output.reference"):
        import torch
        from transformers import AutoModelForCausalLM

        settings = {"trust_remote_code": asked["trust_remote_code"], "low_cpu_mem_usage": True}
        try:
            model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32, **settings)
        except TypeError:  # transformers before 4.56 knows it by another name
            model = AutoModelForCausalLM.from_pretrained(asked["model"], torch_dtype=torch.float32, **settings)
        model.eval()
        found = []
        for tokens in asked["sequences"]:
            with torch.no_grad():
                logits = model(torch.tensor([tokens])).logits[0, :-1].float()
            logprobs = logits.log_softmax(-1)
            chosen = logprobs.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
            found.append(
                {
                    "logprobs": chosen.tolist(),
                    "best": logprobs.argmax(-1).tolist(),
                    "best_logprobs": logprobs.max(-1).values.tolist(),
                    "spread": logprobs.std(-1).mean().item(),
                }
            )
        teller.fact("reference", found)


if __name__ == "__main__":
    sys.exit(main())
