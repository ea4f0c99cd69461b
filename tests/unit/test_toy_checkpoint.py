"""The toy checkpoint: the same arguments give the same bytes, and both generations of transformers can read them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy
import pytest

from verl_ascend_rollout.policy.job_config import ConfigError
from verl_ascend_rollout.tools import toy_checkpoint
from verl_ascend_rollout.tools.smoke import checkpoint, request
from verl_ascend_rollout.tools.toy_model import Geometry


def _hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def write(folder: Path, seed: int = 0, rough: bool = True) -> dict[str, str]:
    toy_checkpoint.write(folder, request.TINY, seed, 0.1, rough=rough)
    return _hashes(folder)


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    first, again, other = write(tmp_path / "a"), write(tmp_path / "b"), write(tmp_path / "c", seed=1)
    assert first == again
    assert {name for name in first if first[name] != other[name]} == {"model.safetensors"}


def test_rough_leaves_no_tensor_constant(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    write(tmp_path / "rough")
    write(tmp_path / "smooth", rough=False)
    rough = safetensors.load_file(tmp_path / "rough" / "model.safetensors")
    smooth = safetensors.load_file(tmp_path / "smooth" / "model.safetensors")
    constant = {name for name, tensor in smooth.items() if tensor.float().std() == 0}
    assert constant and all(name.endswith(("norm.weight", ".bias")) for name in constant)
    assert not [name for name, tensor in rough.items() if tensor.float().std() == 0]


def test_bf16_is_rounded_to_the_nearest() -> None:
    torch = pytest.importorskip("torch")
    generator = numpy.random.default_rng(3)
    data = toy_checkpoint.make_tensor("x.weight", (64, 32), generator, 0.5)
    ours = torch.frombuffer(bytearray(data), dtype=torch.bfloat16).reshape(64, 32)
    values = numpy.random.default_rng(3).normal(0.0, 0.5, (64, 32)).astype(numpy.float32)
    assert torch.equal(ours, torch.from_numpy(values).to(torch.bfloat16))


def test_the_tokenizers_class_is_one_that_transformers_4_has(tmp_path: Path) -> None:
    """transformers 5 saves `TokenizersBackend`, which 4.57 does not know."""
    transformers = pytest.importorskip("transformers")
    write(tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert len(tokenizer) == toy_checkpoint.VOCABULARY == request.TINY.vocabulary
    said = tokenizer.apply_chat_template(
        [{"role": "user", "content": request.PROMPT}], tokenize=False, add_generation_prompt=True
    )
    tokens = tokenizer.encode(said, add_special_tokens=False)
    assert tokenizer.unk_token_id not in tokens
    assert tokenizer.decode(tokens) == said
    assert len(tokens) + request.MAX_TOKENS < request.TINY.positions


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer has 96 tokens, and the geometry asks for 128"):
        toy_checkpoint.write(tmp_path, Geometry(vocabulary=128), 0, 0.1)


def test_a_checkpoint_is_read_by_its_headers(tmp_path: Path) -> None:
    write(tmp_path)
    found = checkpoint.read(tmp_path)
    assert found.parameters == request.TINY.bytes() // 2
    assert (found.facts.experts, found.facts.layers, found.facts.head_size) == (60, 2, 32)
    assert found.weights_hash() == checkpoint.read(tmp_path).weights_hash()
    (tmp_path / "config.json").write_text(json.dumps(dict(reversed(found.config.items()))))
    assert checkpoint.read(tmp_path).config_hash == found.config_hash  # the order of keys is no difference


def test_a_broken_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    write(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]"):
        weights.write_bytes(broken)
        with pytest.raises(ConfigError, match=r"is no whole safetensors file .*copy the checkpoint again"):
            checkpoint.read(tmp_path)
    weights.write_bytes(whole)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(ConfigError, match=r"lacks 1 of its 2 weight files \(model-2"):
        checkpoint.read(tmp_path)
    index.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        checkpoint.read(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="it is no JSON object"):
        checkpoint.read(tmp_path)
