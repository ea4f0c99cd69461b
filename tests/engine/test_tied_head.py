"""A head that is tied to its embedding, and merged experts: bit for bit as a fresh engine, whichever way they come."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_settings import ENGINE
from rollout_server import PROMPTS, SAMPLING

pytestmark = pytest.mark.engine

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def folder(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`old` and `new`: the shared checkpoints without their heads, and a configuration that ties."""
    from safetensors.torch import load_file, save_file

    made = tmp_path_factory.mktemp("tied")
    for which, checkpoint in zip(("old", "new"), checkpoints, strict=True):
        shutil.copytree(checkpoint.path, made / which)
        config = json.loads((made / which / "config.json").read_text())
        (made / which / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
        tensors = load_file(made / which / "model.safetensors")
        tensors.pop("lm_head.weight")
        save_file(tensors, made / which / "model.safetensors", metadata={"format": "pt"})
    return made


@pytest.fixture(scope="module")
def settings(folder: Path) -> Path:
    sampling = {**SAMPLING, "logprobs": 0, "prompt_logprobs": 0}
    written = folder / "settings.json"
    written.write_text(json.dumps({"engine": ENGINE, "sampling": sampling, "prompts": PROMPTS}))
    return written


@pytest.fixture(scope="module")
def synced(folder: Path, settings: Path) -> dict[str, Any]:
    return in_a_process(["tied_engine.py", folder, settings], folder / "synced.json")


@pytest.fixture(scope="module")
def answer_of(folder: Path, settings: Path) -> Callable[[str], Any]:
    return lambda which: in_a_process(["fresh_engine.py", folder / which, settings], folder / f"{which}.json")["fresh"]


def in_a_process(command: list[Any], out: Path) -> dict[str, Any]:
    script, *arguments = command
    done = subprocess.run(
        [sys.executable, str(HERE / script), *map(str, arguments), str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=out.parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_a_tied_head_may_come_or_not_and_experts_may_be_merged(
    synced: dict[str, Any], answer_of: Callable[[str], Any]
) -> None:
    new = answer_of("new")
    assert new != answer_of("old"), "two checkpoints that answer alike would prove nothing"
    for way in ("no head", "head last", "head first", "merged experts"):
        assert synced[way] == new, way


def test_a_head_that_is_not_the_embedding_is_refused(synced: dict[str, Any]) -> None:
    assert "is not the same as the other of model.embed_tokens.weight and lm_head.weight" in synced["another head"]
