"""A toy checkpoint on disk: `Geometry`'s tensors with random values, and a tokenizer with a chat template.

Written without torch and transformers, whose import takes longer than all the rest, and in a form that transformers 4
and 5 read alike: a tokenizer that transformers 5 saved does not load in 4.57 (its `tokenizer_class` is new).  The same
arguments give the same bytes in every file.  Nothing is downloaded.
"""

from __future__ import annotations

import json
import string
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_ascend_rollout.tools.toy_model import Geometry

if TYPE_CHECKING:
    import numpy
    from tokenizers import Tokenizer

PAD, EOS, IM_START, IM_END, UNKNOWN = "<pad>", "<eos>", "<|im_start|>", "<|im_end|>", "<unk>"
SPECIAL = (PAD, EOS, IM_START, IM_END, UNKNOWN)
PUNCTUATION = "!#$%&()*+,-./:;<=>?@[]^_{}~"
CHARACTERS = string.digits + string.ascii_lowercase + string.ascii_uppercase + " \n" + PUNCTUATION

VOCABULARY = len(SPECIAL) + len(CHARACTERS)
"""Tokens of the tokenizer, which a model's `vocab_size` has to equal: verl masks logits at and above `len(tokenizer)`
in the rollout only (verl 0.9.1, utils/vllm/patch: a larger vocabulary shows as a constant log-prob gap)."""

# The form of Qwen's template, without its default system message: a prompt stays short.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tokenizer() -> Tokenizer:
    """Make a tokenizer of `VOCABULARY` tokens, one a character, so that text and tokens have the same length."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=UNKNOWN))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def config(geometry: Geometry, std: float) -> dict[str, Any]:
    """config.json, with what the tokenizer adds to the geometry's."""
    return {
        **geometry.config(),
        "initializer_range": std,
        "pad_token_id": SPECIAL.index(PAD),
        "eos_token_id": SPECIAL.index(EOS),
    }


def write(folder: Path, geometry: Geometry, seed: int, std: float, *, rough: bool = False) -> None:
    """Write a random bf16 checkpoint and its tokenizer to `folder`, in the hub's format.

    Args:
        folder: made where it is missing.
        geometry: of the model; its vocabulary has to be `VOCABULARY`.
        seed: of the values.
        std: standard deviation of the weights.
        rough: make biases and norms random as well: a bias of zero would hide that it was not loaded.

    Raises:
        ValueError: the geometry's vocabulary is not the tokenizer's.
        OSError: the folder cannot be written.
    """
    if geometry.vocabulary != VOCABULARY:
        raise ValueError(f"the toy tokenizer has {VOCABULARY} tokens, and the geometry asks for {geometry.vocabulary}")
    import numpy  # comes with torch: where that is missing, a command that makes no model works all the same

    folder.mkdir(parents=True, exist_ok=True)
    generator = numpy.random.default_rng(seed)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, shape in geometry.tensors():
        start = len(data)
        data += make_tensor(name, shape, generator, std, rough)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (start, len(data))}
    # A safetensors file: the header's length, the header (padded with spaces to 8 bytes), the data.
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    written = config(geometry, std)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": EOS,
        "unk_token": UNKNOWN,
        "additional_special_tokens": [IM_START, IM_END],
        "model_max_length": geometry.positions,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    generation_config = {
        "do_sample": True,
        "pad_token_id": written["pad_token_id"],
        "eos_token_id": written["eos_token_id"],
    }
    for file, content in (
        ("config.json", written),
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation_config),
    ):
        (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def make_tensor(
    name: str, shape: tuple[int, ...], generator: numpy.random.Generator, std: float, rough: bool = False
) -> bytes:
    """Make a tensor in bf16, little-endian: norms are one and biases zero (unless `rough`), the rest is normal."""
    import numpy

    norm, bias = name.endswith("norm.weight"), name.endswith(".bias")
    if norm or bias:
        values = numpy.full(shape, 1.0 if norm else 0.0, dtype=numpy.float32)
        if rough:
            values += generator.normal(0.0, std, shape).astype(numpy.float32)
    else:
        values = generator.normal(0.0, std, shape).astype(numpy.float32)
    # bf16 is the upper half of a float32; the nearest one, halves to even.
    bits = values.view(numpy.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
