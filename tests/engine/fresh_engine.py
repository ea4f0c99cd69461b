"""A fresh vLLM engine on a checkpoint, without any part of this project: the reference for the engine tests.

    python fresh_engine.py CHECKPOINT SETTINGS.json OUT.json [--reload OTHER_CHECKPOINT]

writes what the engine answers to each prompt: {"fresh": [[token_ids, log_probs, prompt_log_probs], ...]}, and with
`--reload` also "stock_reload": the answers after vLLM's own `reload_weights` on the other checkpoint.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("settings", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--reload")
    arguments = parser.parse_args()
    settings = json.loads(arguments.settings.read_text())

    from vllm import LLM, SamplingParams

    engine = LLM(arguments.checkpoint, **settings["engine"])
    sampling = SamplingParams(**settings["sampling"])

    def answer(prompt_ids: list[int]) -> list[Any]:
        # One request at a time: the shape of a batch decides in which order a kernel adds.
        (output,) = engine.generate([{"prompt_token_ids": prompt_ids}], sampling, use_tqdm=False)
        tokens = list(output.outputs[0].token_ids)
        log_probs = [step[token].logprob for token, step in zip(tokens, output.outputs[0].logprobs, strict=True)]
        prompt = [next(iter(step.values())).logprob for step in output.prompt_logprobs[1:]]
        return [tokens, log_probs, prompt]

    answers = {"fresh": [answer(prompt) for prompt in settings["prompts"]]}
    if arguments.reload:
        engine.collective_rpc("reload_weights", kwargs={"weights_path": arguments.reload})
        engine.reset_prefix_cache()
        answers["stock_reload"] = [answer(prompt) for prompt in settings["prompts"]]
    arguments.out.write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
