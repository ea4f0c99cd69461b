"""One rollout server on a real vLLM engine, shared by all engine tests, and fresh engines to compare it with."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
KV_BYTES = 2**30

# Prompts of several lengths: shorter and longer than a block, and long enough to fill many.
PROMPTS = [
    [5 + (start * 31 + index * 7) % 80 for index in range(length)] for start, length in enumerate((5, 17, 64, 120))
]
SAMPLING = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
ENGINE = {
    "dtype": "bfloat16",
    "max_model_len": 192,
    "max_num_seqs": 16,
    "enforce_eager": True,
    "enable_chunked_prefill": False,
    "max_num_batched_tokens": 192,
    "enable_prefix_caching": True,
    "logprobs_mode": "processed_logprobs",
    "kv_cache_memory_bytes": KV_BYTES,
    # vLLM's default of 128 on a CPU is longer than most prompts here: nothing would ever be cached.
    "block_size": 32,
}

Answers = list[list[Any]]


@dataclass(frozen=True)
class Checkpoint:
    """A toy checkpoint on disk."""

    path: Path

    def tensors(self) -> Iterator[tuple[str, Any]]:
        """Names and tensors, as a trainer would send them."""
        from safetensors.torch import load_file

        yield from load_file(self.path / "model.safetensors").items()


@dataclass
class Server:
    """The rollout server actor and a trainer's adapter to it."""

    actor: Any
    adapter: Any

    def call(self, method: str, *args: Any, timeout: float = 120, **kwargs: Any) -> Any:
        """Call a method of the server and wait for its result."""
        import ray

        return ray.get(getattr(self.actor, method).remote(*args, **kwargs), timeout=timeout)

    def start(self, prompt: Sequence[int], request: str, **sampling: Any) -> Any:
        """Start a generation; the Ray reference of its result."""
        parameters = {**SAMPLING, "logprobs": True, "prompt_logprobs": 0, **sampling}
        return self.actor.generate.remote(list(prompt), parameters, request)

    def answers(self) -> Answers:
        """What the engine says to each prompt, one after the other: token ids, log-probs, the prompt's log-probs."""
        import ray

        found = []
        for number, prompt in enumerate(PROMPTS):
            output = ray.get(self.start(prompt, f"answer-{os.urandom(4).hex()}-{number}"), timeout=120)
            prompt_log_probs = [step[0] for step in output.extra_fields["prompt_logprobs"][:-1]]
            found.append([list(output.token_ids), list(output.log_probs), prompt_log_probs])
        return found

    def sync(self, tensors: Any, timeout: float = 120) -> None:
        """One weight sync over the real transport, as the trainer worker does it."""
        asyncio.run(asyncio.wait_for(self.adapter.update_weights(iter(tensors), global_steps=1), timeout))


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
        from verl.workers.config import CheckpointEngineConfig, HFModelConfig, RolloutConfig
        from verl.workers.rollout.base import get_rollout_class
        from verl.workers.rollout.replica import RolloutMode, get_rollout_replica_class

        config = RolloutConfig(
            name="ascend_safe",
            tensor_model_parallel_size=1,
            prompt_length=128,
            response_length=64,
            max_model_len=ENGINE["max_model_len"],
            max_num_seqs=ENGINE["max_num_seqs"],
            # verl 0.9.1 stops here: FrozenInstanceError in its own _validate_configs.
            enable_chunked_prefill=False,
            max_num_batched_tokens=64,
            enforce_eager=None,
            calculate_log_probs=True,
            # Small, so that a sync takes several buckets.
            checkpoint_engine=CheckpointEngineConfig(update_weights_bucket_megabytes=1),
            engine_kwargs={
                "vllm": {name: ENGINE[name] for name in ("kv_cache_memory_bytes", "block_size")},
                "ascend_safe": {"verify": "always", "events": str(events_file)},
            },
        )
        model_config = HFModelConfig(path=str(checkpoints[0].path))
        replica = get_rollout_replica_class("ascend_safe")(0, config, model_config, gpus_per_node=1)
        actor = replica.server_class.options(name="ascend_safe_server_0_0", max_concurrency=200, num_cpus=0).remote(
            config=config,
            model_config=model_config,
            rollout_mode=RolloutMode.HYBRID,
            workers=[],
            replica_rank=0,
            node_rank=0,
            gpus_per_node=1,
            nnodes=1,
            cuda_visible_devices="0",
        )
        ray.get(actor.launch_server.remote(), timeout=300)
        os.environ.update(RANK="0", RAY_LOCAL_WORLD_SIZE="1", WORLD_SIZE="1")
        adapter = get_rollout_class("ascend_safe")(config=config, model_config=model_config, device_mesh=None)
        yield Server(actor, adapter)
    finally:
        ray.shutdown()
