"""Make what the demo trains on: a toy Qwen1.5-MoE checkpoint, its tokenizer, and a toy data set.

    python recipes/grpo_tiny_cpu/make_tiny.py FOLDER [--seed 0]

writes FOLDER/model (checkpoint and tokenizer), FOLDER/train.parquet and FOLDER/val.parquet.  The same seed gives the
same bytes in every tensor and every row.  Nothing is downloaded.

The model has the parts of Qwen1.5-MoE-A2.7B that make its weight sync hard (60 routed experts of which 4 are chosen, a
gated shared expert, qkv biases, no tied embeddings), at a size that two CPU cores can train.  Two sizes are not free:
`vocab_size` equals the tokenizer's length (see `toy_checkpoint`), and the head size is one that vLLM's CPU attention
has kernels for (vLLM 0.28, v1/attention/backends/cpu_attn.py: 32, 64, 80, ...).
"""

from __future__ import annotations

import argparse
import json
import random
import string
import sys
from pathlib import Path
from typing import Any

from verl_ascend_rollout.tools import toy_checkpoint
from verl_ascend_rollout.tools.toy_checkpoint import SPECIAL as SPECIAL
from verl_ascend_rollout.tools.toy_model import Geometry

DATA_SOURCE = "tiny_digits"
RESPONSE_LENGTH = 16
"""Tokens in a response, and (as the ground truth) how many digits earn the full reward."""

MAX_WORDS = 3
"""Words in a prompt; with the template a prompt is at most 48 tokens."""

INIT_STD = 0.05
"""Standard deviation of the random weights: the first policy is near uniform over the vocabulary (logits of std about
0.4), and the probabilities still differ enough for a correlation between trainer and rollout to mean something."""

GEOMETRY = Geometry(
    layers=2,
    hidden=64,
    head_size=32,
    moe_intermediate=32,  # vLLM's x86 kernel packs expert weights in blocks of 32
    shared_intermediate=128,
    vocabulary=toy_checkpoint.VOCABULARY,
    positions=256,
)
"""Qwen1.5-MoE with every size cut down except the number of experts."""


def make_model(folder: Path, seed: int) -> None:
    """Write a random bf16 checkpoint and its tokenizer to `folder`, in the hub's format."""
    toy_checkpoint.write(folder, GEOMETRY, seed, INIT_STD)


def make_rows(count: int, split: str, seed: int) -> list[dict[str, Any]]:
    """`count` rows of verl's RL data set format.

    A prompt is one to three random lower-case words.  The ground truth is the number of digits wanted, as text: it
    reaches the reward function only, and no prompt has a digit in it.
    """
    generator = random.Random(f"{split}-{seed}")
    rows = []
    for index in range(count):
        words = [
            "".join(generator.choices(string.ascii_lowercase, k=generator.randint(3, 6)))
            for _ in range(generator.randint(1, MAX_WORDS))
        ]
        rows.append(
            {
                "data_source": DATA_SOURCE,
                "prompt": [{"role": "user", "content": " ".join(words)}],
                "ability": "digits",
                "reward_model": {"style": "rule", "ground_truth": str(RESPONSE_LENGTH)},
                "extra_info": {"index": index, "split": split},
            }
        )
    return rows


def make_data(folder: Path, seed: int, train: int, val: int) -> None:
    """Write `train.parquet` and `val.parquet` to `folder`."""
    import pyarrow.json
    import pyarrow.parquet

    for split, count in (("train", train), ("val", val)):
        # By way of JSON, since pyarrow imports pandas to look at Python objects.
        lines = "\n".join(json.dumps(row) for row in make_rows(count, split, seed))
        table = pyarrow.json.read_json(pyarrow.BufferReader(lines.encode()))
        pyarrow.parquet.write_table(table, folder / f"{split}.parquet")


def make(folder: Path, seed: int = 0, train: int = 1024, val: int = 16) -> None:
    """Write the model, the tokenizer and both data files to `folder`, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder / "model", seed)
    make_data(folder, seed, train, val)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the toy model and the toy data set of the demo.")
    parser.add_argument("folder", type=Path, help="where to write model/, train.parquet and val.parquet")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        make(options.folder, options.seed)
    except OSError as error:
        print(f"make_tiny: cannot write to {options.folder}: {error}; choose another folder", file=sys.stderr)
        return 1
    print(f"made {options.folder}/model, {options.folder}/train.parquet and {options.folder}/val.parquet")
    return 0


if __name__ == "__main__":
    sys.exit(main())
