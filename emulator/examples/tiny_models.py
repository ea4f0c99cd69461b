"""Make two tiny Qwen1.5-MoE-shaped checkpoints of one shape with different weights: `tiny_models.py FOLDER`.

Stands in for a model and its update; leaves out a tokenizer (prompts are token ids).  60 routed experts and one shared,
as in Qwen1.5-MoE-A2.7B; everything else is small.  Run it in the environment that will serve the checkpoints:
transformers 5 saves the experts of a mixture in another layout than transformers 4 reads.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

SEEDS = {"old": 0, "new": 7}


def tiny_qwen2_moe(seed: int) -> Qwen2MoeForCausalLM:
    """A Qwen2MoeForCausalLM in bf16 with random weights."""
    torch.manual_seed(seed)
    config = Qwen2MoeConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=60,
        num_experts_per_tok=4,
        moe_intermediate_size=96,
        shared_expert_intermediate_size=128,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    return Qwen2MoeForCausalLM(config).to(torch.bfloat16)


def save(folder: Path) -> None:
    """FOLDER/old and FOLDER/new."""
    for name, seed in SEEDS.items():
        tiny_qwen2_moe(seed).save_pretrained(folder / name)


if __name__ == "__main__":
    save(Path(sys.argv[1]))
