"""One rollout server on a real vLLM engine, shared by all engine tests, and fresh engines to compare it with."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engine_settings import ENGINE
from rollout_server import PROMPTS, SAMPLING, Answers, Server, start_server

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Checkpoint:
    """A toy checkpoint on disk."""

    path: Path

    def tensors(self) -> Iterator[tuple[str, Any]]:
        """Names and tensors, as a trainer would send them."""
        from safetensors.torch import load_file

        yield from load_file(self.path / "model.safetensors").items()


@pytest.fixture(scope="session")
def checkpoints(
    load_recipe: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkpoint, Checkpoint]:
    """Two toy Qwen1.5-MoE checkpoints of one shape.  Every tensor is random, biases and norms as well: a bias of zero
    would hide that it was not loaded."""
    import torch
    from safetensors.torch import load_file, save_file

    made = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp(f"checkpoint{seed}") / "model"
        load_recipe("make_tiny").make_model(folder, seed)
        generator = torch.Generator().manual_seed(seed)
        tensors = load_file(folder / "model.safetensors")
        for name, tensor in sorted(tensors.items()):
            noise = torch.randn(tensor.shape, generator=generator) * 0.2
            tensors[name] = (tensor.float() + noise).to(tensor.dtype)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        made.append(Checkpoint(folder))
    return made[0], made[1]


@pytest.fixture(scope="session")
def fresh(checkpoints: tuple[Checkpoint, Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """What a fresh engine answers on each checkpoint, and what vLLM's own reload makes of it; each asked once."""
    folder = tmp_path_factory.mktemp("fresh")
    settings = folder / "settings.json"
    sampling = {**SAMPLING, "logprobs": 0, "prompt_logprobs": 0}
    settings.write_text(json.dumps({"engine": ENGINE, "sampling": sampling, "prompts": PROMPTS}))
    known: dict[int, dict[str, Answers]] = {}

    def answers(number: int) -> dict[str, Answers]:
        if number not in known:
            out = folder / f"{number}.json"
            command = [
                sys.executable,
                str(HERE / "fresh_engine.py"),
                str(checkpoints[number].path),
                str(settings),
                str(out),
            ]
            if number == 0:
                command += ["--reload", str(checkpoints[1].path)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
            assert done.returncode == 0, done.stderr[-3000:]
            known[number] = json.loads(out.read_text())
        return known[number]

    return answers


@pytest.fixture(scope="session")
def events_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("events") / "events.jsonl"


@pytest.fixture(scope="session")
def server(checkpoints: tuple[Checkpoint, Checkpoint], events_file: Path) -> Iterator[Server]:
    """A rollout server as verl starts it: dummy weights, to be synced before use; verl's defaults for what is not said
    here, among them sleep mode on."""
    import ray

    ray.init(num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=True, ignore_reinit_error=False)
    try:
        engine = {name: ENGINE[name] for name in ("kv_cache_memory_bytes", "block_size")}
        yield start_server(
            checkpoints[0].path,
            events_file,
            engine,
            max_model_len=ENGINE["max_model_len"],
            max_num_seqs=ENGINE["max_num_seqs"],
        )
    finally:
        ray.shutdown()
