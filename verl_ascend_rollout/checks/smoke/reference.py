"""Hugging Face's model on the CPU in float32: `python -m verl_ascend_rollout.checks.smoke.reference ASKED.json`.

For each sequence of tokens: the log-probability of every token given those before it, the token that it would have
chosen there, and how much the log-probabilities of the vocabulary vary.  Told to the parent as the fact `reference`.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from verl_ascend_rollout.checks.smoke import lines
from verl_ascend_rollout.checks.smoke.child import Teller
from verl_ascend_rollout.checks.smoke.supervisor import FD_VARIABLE


def main() -> int:
    """Compute what the file asks for; the exit status."""
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    teller = Teller(int(os.environ.pop(FD_VARIABLE)))
    try:
        with teller.phase("output.reference"):
            teller.fact("reference", _run(asked))
    except Exception as error:
        traceback.print_exc()
        teller.tell("error", phase=teller.phase_now, text=lines.one_sentence(error))
        return 1
    return 0


def _run(asked: dict[str, Any]) -> list[dict[str, Any]]:
    import torch

    model = _load(asked["model"], asked["trust_remote_code"])
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
    return found


def _load(model: str, trust_remote_code: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    settings = {"trust_remote_code": trust_remote_code, "low_cpu_mem_usage": True}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **settings)
    except TypeError:  # transformers before 4.56 knows it by another name
        loaded = AutoModelForCausalLM.from_pretrained(model, torch_dtype=torch.float32, **settings)
    return loaded.eval()


if __name__ == "__main__":
    sys.exit(main())
