"""vLLM's `LLM` as the checks use it, of any release from 0.11 on: what it has is asked for, not its version."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from verl_ascend_rollout.tools.smoke.measured import Output
from verl_ascend_rollout.worker import worker_rpc


class Engine:
    """A running engine, given those of the arguments that this vLLM has.  A prompt is an `Output` without an answer."""

    def __init__(self, model: str, arguments: Mapping[str, Any]) -> None:
        from vllm import LLM
        from vllm.engine.arg_utils import EngineArgs

        fields = {field.name for field in dataclasses.fields(EngineArgs)}
        known = {name: value for name, value in arguments.items() if name in fields}
        _say_kv_space(known)
        self.llm = LLM(model=model, **known)

    def prompt(self, text: str) -> Output:
        """Return a prompt as the model wants it: through the tokenizer's chat template, where it has one."""
        tokenizer = self.llm.get_tokenizer()
        if getattr(tokenizer, "chat_template", None):
            rendered = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            return Output(text, tuple(tokenizer.encode(rendered, add_special_tokens=False)), chat_template=True)
        return Output(text, tuple(tokenizer.encode(text)))

    def answer(self, prompts: Sequence[Output], max_tokens: int, *, prompt_logprobs: bool = False) -> list[Output]:
        """Generate greedy answers to the prompts, in one batch."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, logprobs=0, prompt_logprobs=0 if prompt_logprobs else None
        )
        asked = [{"prompt_token_ids": list(prompt.prompt_token_ids)} for prompt in prompts]
        said = self.llm.generate(asked, sampling, use_tqdm=False)
        return [_answered(prompt, output) for prompt, output in zip(prompts, said, strict=True)]

    def timed_answer(self, prompt: Output, max_tokens: int) -> tuple[float, Output]:
        """Return the seconds of one call, and what it gave; nothing of the prompt is cached from before."""
        self.forget()
        started = time.perf_counter()
        (answer,) = self.answer([prompt], max_tokens)
        return time.perf_counter() - started, answer

    def fresh_answers(self, prompts: Sequence[Output], max_tokens: int) -> list[Output]:
        """Answer each prompt by itself: the shape of a batch decides in which order a kernel adds."""
        return [self.timed_answer(prompt, max_tokens)[1] for prompt in prompts]

    def forget(self) -> None:
        """Reset the prefix cache."""
        self.llm.reset_prefix_cache()

    def ask(self, method: str, **keywords: Any) -> list[Any]:
        """Call a method of our worker extension on every worker.

        Raises:
            WorkerError: it failed on one of them.
        """
        call = {"method": method, "keywords": keywords}
        return worker_rpc.unwrap(method, self.llm.collective_rpc("ascend_safe_call", kwargs=call))


def _say_kv_space(arguments: Mapping[str, Any]) -> None:
    """Say in the environment how large a CPU engine's KV cache is, in whole GiB, where it reads that nowhere else.

    vLLM 0.11 has `kv_cache_memory_bytes` and does not look at it on a CPU (config/cache.py: cpu_kvcache_space_bytes);
    in 0.28 the variable would win over it.
    """
    from vllm.config import CacheConfig
    from vllm.platforms import current_platform

    size = arguments.get("kv_cache_memory_bytes")
    if size is None or current_platform.device_type != "cpu":
        return
    if any(field.name == "cpu_kvcache_space_bytes" for field in dataclasses.fields(CacheConfig)):
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(-(-size // 2**30)))


def _answered(prompt: Output, output: Any) -> Output:
    completion = output.outputs[0]
    tokens = tuple(completion.token_ids)
    before = zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=False)
    return dataclasses.replace(
        prompt,
        text=completion.text,
        token_ids=tokens,
        logprobs=tuple(step[token].logprob for token, step in zip(tokens, completion.logprobs or [], strict=True)),
        prompt_logprobs=tuple(step[token].logprob for token, step in before if step is not None),
        finish_reason=completion.finish_reason,
    )
