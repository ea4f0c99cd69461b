"""A CPU engine whose head is tied to its embedding, synced in several ways: tied_engine.py FOLDER SETTINGS OUT.json

FOLDER holds the checkpoints `old` and `new` of one tied model, of which each file has the embedding only and one tensor
an expert.  Written: for each way of sending `new` what the engine answers after it, or the error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch

NamedTensor = tuple[str, torch.Tensor]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def merged(tensors: dict[str, torch.Tensor]) -> Iterator[NamedTensor]:
    """The experts of a layer in two tensors, as transformers 5 keeps them."""
    for name, tensor in tensors.items():
        before, found, after = name.partition(".mlp.experts.")
        if not found:
            yield name, tensor
        elif after == "0.down_proj.weight":
            count = sum(
                other.startswith(f"{before}{found}") and other.endswith("down_proj.weight") for other in tensors
            )
            gate, up, down = (
                torch.stack([tensors[f"{before}{found}{expert}.{part}_proj.weight"] for expert in range(count)])
                for part in ("gate", "up", "down")
            )
            yield f"{before}{found}gate_up_proj", torch.cat([gate, up], dim=1)
            yield f"{before}{found}down_proj", down


def main(folder: Path, settings_file: Path, out: Path) -> None:
    from safetensors.torch import load_file
    from vllm import LLM, SamplingParams

    settings = json.loads(settings_file.read_text())
    extension = "verl_ascend_rollout.worker.lifecycle.AscendSafeLifecycle"
    engine = LLM(str(folder / "old"), worker_extension_cls=extension, **settings["engine"])
    engine.collective_rpc(
        "ascend_safe_configure", kwargs={"kv_release": "auto", "weight_path": "by_layout", "verify": "always"}
    )
    core: Any = engine.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
    worker = core.model_executor.driver_worker.worker
    old, new = (load_file(folder / which / "model.safetensors") for which in ("old", "new"))
    assert HEAD not in new
    ways: dict[str, list[NamedTensor]] = {
        "no head": list(new.items()),
        "head last": [*new.items(), (HEAD, new[EMBEDDING])],
        "head first": [(HEAD, new[EMBEDDING]), *new.items()],
        "another head": [*new.items(), (HEAD, new[EMBEDDING] + 1)],
        "merged experts": list(merged(new)),
    }

    def sync(tensors: list[NamedTensor]) -> None:
        def receive(load: Any) -> None:
            for pair in tensors:
                load([pair])

        worker._ascend_safe_reload(receive)
        engine.reset_prefix_cache()

    sampling = SamplingParams(**settings["sampling"], detokenize=False)
    found: dict[str, Any] = {}
    for way, tensors in ways.items():
        sync(list(old.items()))
        try:
            sync(tensors)
        except RuntimeError as error:
            found[way] = str(error)
            continue
        answers = []
        for prompt in settings["prompts"]:
            (output,) = engine.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
            tokens = list(output.outputs[0].token_ids)
            steps = zip(output.outputs[0].logprobs, tokens, strict=True)
            rows = [next(iter(step.values())).logprob for step in output.prompt_logprobs[1:]]
            answers.append([tokens, [step[token].logprob for step, token in steps], rows])
        found[way] = answers
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
