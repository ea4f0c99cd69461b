"""Make what the demo trains on: a toy Qwen1.5-MoE checkpoint, its tokenizer, and a toy data set.

    python recipes/grpo_tiny_cpu/make_tiny.py FOLDER [--seed 0]

writes FOLDER/model (checkpoint and tokenizer), FOLDER/train.parquet and FOLDER/val.parquet.  The same seed gives the
same bytes in every tensor and every row.  Nothing is downloaded.

The model has the parts of Qwen1.5-MoE-A2.7B that make its weight sync hard (60 routed experts of which 4 are chosen, a
gated shared expert, qkv biases, no tied embeddings), at a size that two CPU cores can train.  Two sizes are not free:
`vocab_size` equals the tokenizer's length, since verl masks logits at and above `len(tokenizer)` in the rollout only
(verl 0.9.1, utils/vllm/patch: a larger vocabulary shows as a constant log-prob gap), and the head size is one that
vLLM's CPU attention has kernels for (vLLM 0.28, v1/attention/backends/cpu_attn.py: 32, 64, 80, ...).

The files are written without torch and transformers: importing those two takes longer than all the rest.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, EOS, IM_START, IM_END, UNKNOWN = "<pad>", "<eos>", "<|im_start|>", "<|im_end|>", "<unk>"
SPECIAL = (PAD, EOS, IM_START, IM_END, UNKNOWN)
PUNCTUATION = "!#$%&()*+,-./:;<=>?@[]^_{}~"
CHARACTERS = string.digits + string.ascii_lowercase + string.ascii_uppercase + " \n" + PUNCTUATION
VOCAB_SIZE = len(SPECIAL) + len(CHARACTERS)

# The form of Qwen's template, without its default system message: a prompt stays short.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

MAX_LENGTH = 256
"""Tokens that the model has positions for."""

DATA_SOURCE = "tiny_digits"
RESPONSE_LENGTH = 16
"""Tokens in a response, and (as the ground truth) how many digits earn the full reward."""

MAX_WORDS = 3
"""Words in a prompt; with the template a prompt is at most 48 tokens."""

INIT_STD = 0.05
"""Standard deviation of the random weights: the first policy is near uniform over the vocabulary (logits of std about
0.4), and the probabilities still differ enough for a correlation between trainer and rollout to mean something."""


CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,  # head size 32
    "num_key_value_heads": 2,
    "moe_intermediate_size": 32,  # vLLM's x86 kernel packs expert weights in blocks of 32
    "shared_expert_intermediate_size": 128,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": MAX_LENGTH,
    "max_window_layers": 2,
    "use_sliding_window": False,
    "rope_theta": 1000000.0,
    "attention_dropout": 0.0,
    "router_aux_loss_coef": 0.001,
    "initializer_range": INIT_STD,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "pad_token_id": SPECIAL.index(PAD),
    "eos_token_id": SPECIAL.index(EOS),
}
"""config.json: the keys of Qwen/Qwen1.5-MoE-A2.7B, every size cut down except the number of experts."""


def make_tokenizer() -> Tokenizer:
    """A tokenizer of `VOCAB_SIZE` tokens, one a character, so that text and tokens have the same length."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=UNKNOWN))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def tensor_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of the checkpoint, as Qwen1.5-MoE's own has them (linear: [out, in])."""
    hidden, vocabulary = CONFIG["hidden_size"], CONFIG["vocab_size"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        for projection in ("q_proj", "k_proj", "v_proj"):
            yield f"{prefix}.self_attn.{projection}.weight", (hidden, hidden)
            yield f"{prefix}.self_attn.{projection}.bias", (hidden,)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{prefix}.mlp.gate.weight", (CONFIG["num_experts"], hidden)
        yield f"{prefix}.mlp.shared_expert_gate.weight", (1, hidden)
        experts = [(f"experts.{expert}", CONFIG["moe_intermediate_size"]) for expert in range(CONFIG["num_experts"])]
        for name, width in [*experts, ("shared_expert", CONFIG["shared_expert_intermediate_size"])]:
            yield f"{prefix}.mlp.{name}.gate_proj.weight", (width, hidden)
            yield f"{prefix}.mlp.{name}.up_proj.weight", (width, hidden)
            yield f"{prefix}.mlp.{name}.down_proj.weight", (hidden, width)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def make_tensor(name: str, shape: tuple[int, ...], generator: numpy.random.Generator) -> bytes:
    """A random tensor in bf16, little-endian: norms are one, biases zero, the rest normal with `INIT_STD`."""
    if name.endswith("norm.weight"):
        values = numpy.ones(shape, dtype=numpy.float32)
    elif name.endswith(".bias"):
        values = numpy.zeros(shape, dtype=numpy.float32)
    else:
        values = generator.normal(0.0, INIT_STD, shape).astype(numpy.float32)
    # bf16 is the upper half of a float32; the nearest one, halves to even.
    bits = values.view(numpy.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def make_model(folder: Path, seed: int) -> None:
    """Write a random bf16 checkpoint and its tokenizer to `folder`, in the hub's format."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = numpy.random.default_rng(seed)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, shape in tensor_shapes():
        start = len(data)
        data += make_tensor(name, shape, generator)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (start, len(data))}
    # A safetensors file: the header's length, the header (padded with spaces to 8 bytes), the data.
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": EOS,
        "unk_token": UNKNOWN,
        "additional_special_tokens": [IM_START, IM_END],
        "model_max_length": MAX_LENGTH,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    generation_config = {
        "do_sample": True,
        "pad_token_id": CONFIG["pad_token_id"],
        "eos_token_id": CONFIG["eos_token_id"],
    }
    for file, content in (
        ("config.json", CONFIG),
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation_config),
    ):
        (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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
