"""A vLLM engine that records its routing, with a KV cache too small for its requests: what their records hold.

    python routing_engine.py CHECKPOINT SETTINGS.json OUT.json

writes {"answers": [[prompt, answer, rows of its record], ...], "same", "cells", "preemptions", "cached_tokens"}: `same`
of the `cells` (token and layer) have the experts that transformers picks for the same tokens.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def picked(checkpoint: str, sequences: list[list[int]]) -> list[Any]:
    """What transformers' routers pick, (tokens, layers, top k) a sequence."""
    import torch
    from transformers import AutoModelForCausalLM

    from verl_ascend_rollout.integration.routing_replay import routers_of

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, attn_implementation="sdpa")
    seen: list[Any] = []
    for router in routers_of(model):
        router.module.register_forward_hook(lambda _module, _inputs, output: seen.append(output[2]))
    found = []
    for tokens in sequences:
        seen.clear()
        with torch.no_grad():
            model(torch.tensor([tokens]))
        found.append(torch.stack(seen, 1))
    return found


def main() -> None:
    checkpoint, settings_file, out = sys.argv[1:]
    settings = json.loads(Path(settings_file).read_text())

    import torch
    from vllm import LLM, SamplingParams

    engine = LLM(checkpoint, **settings["engine"])
    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in settings["prompts"]],
        SamplingParams(**settings["sampling"]),
        use_tqdm=False,
    )
    metrics = {metric.name: getattr(metric, "value", None) for metric in engine.get_metrics()}
    whole = [list(output.prompt_token_ids) + list(output.outputs[0].token_ids) for output in outputs]
    cells = same = 0
    for output, own in zip(outputs, picked(checkpoint, whole), strict=True):
        record = torch.as_tensor(output.outputs[0].routed_experts.astype("int64"))
        equal = record.sort(-1).values == own[: len(record)].sort(-1).values
        cells += equal[..., 0].numel()
        same += int(equal.all(-1).sum())
    answers = [
        [len(output.prompt_token_ids), len(output.outputs[0].token_ids), len(output.outputs[0].routed_experts)]
        for output in outputs
    ]
    found = {
        "answers": answers,
        "same": same,
        "cells": cells,
        "preemptions": metrics["vllm:num_preemptions"],
        "cached_tokens": sum(output.num_cached_tokens or 0 for output in outputs),
    }
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
