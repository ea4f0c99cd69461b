"""A rollout server as verl starts it, with a trainer's adapter, and a storm of calls and requests upon it."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Prompts of several lengths: shorter and longer than a block, and long enough to fill many.
PROMPTS = [
    [5 + (start * 31 + index * 7) % 80 for index in range(length)] for start, length in enumerate((5, 17, 64, 120))
]
SAMPLING = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}

ORDERS: list[tuple[str, tuple[Any, ...], str]] = [
    ("free_cache_engine", (), "weights_only"),
    ("free_cache_engine", (), "weights_only"),
    ("init_cache_engine", (), "awake"),
    ("init_cache_engine", (), "awake"),
    ("sleep", (), "asleep"),
    ("free_cache_engine", (), "asleep"),
    ("wake_up", (["weights"],), "weights_only"),
    ("sleep", (), "asleep"),
    ("wake_up", (["kv_cache"],), "awake"),  # before the weights
    ("release_kv_cache", (), "weights_only"),
    ("wake_up", (["weights"],), "weights_only"),
    ("resume_kv_cache", (), "awake"),
    ("sleep", (), "asleep"),
    ("abort_all_requests", (), "asleep"),
    ("resume_generation", (), "asleep"),
    ("wake_up", (), "awake"),
]
"""Calls of the server, with their arguments, and the state in which each leaves it: awake at both ends."""

Answers = list[list[Any]]


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


def start_server(
    checkpoint: Path,
    events_file: Path,
    engine: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    replica: int = 0,
    **config: Any,
) -> Server:
    """Start the server actor in the Ray cluster that is there.

    Args:
        checkpoint: its weights are not loaded: the first sync brings them.
        events_file: where the events go.
        engine: `engine_kwargs.vllm`.
        options: of ours, beside those that every test has.
        replica: its rank; another server may be rank 0.
        config: fields of verl's RolloutConfig.
    """
    import ray
    from verl.workers.config import CheckpointEngineConfig, HFModelConfig, RolloutConfig
    from verl.workers.rollout.base import get_rollout_class
    from verl.workers.rollout.replica import RolloutMode, get_rollout_replica_class
    from verl.workers.rollout.vllm_rollout.vllm_rollout import ServerAdapter

    rollout = RolloutConfig(
        name="ascend_safe",
        tensor_model_parallel_size=1,
        prompt_length=128,
        response_length=64,
        # verl 0.9.1 stops here: FrozenInstanceError in its own _validate_configs.
        enable_chunked_prefill=False,
        max_num_batched_tokens=64,
        enforce_eager=None,
        calculate_log_probs=True,
        # Small, so that a sync takes several buckets.
        checkpoint_engine=CheckpointEngineConfig(update_weights_bucket_megabytes=1),
        engine_kwargs={
            "vllm": dict(engine),
            "ascend_safe": {"verify": "always", "events": str(events_file), **(options or {})},
        },
        **config,
    )
    model = HFModelConfig(path=str(checkpoint))
    made = get_rollout_replica_class("ascend_safe")(replica, rollout, model, gpus_per_node=1)
    # verl 0.7.1's adapter looks for a name without the rollout's.
    prefix = "ascend_safe" if hasattr(ServerAdapter, "_get_server_name_prefix") else "vllm"
    actor = made.server_class.options(name=f"{prefix}_server_{replica}_0", max_concurrency=200, num_cpus=0).remote(
        config=rollout,
        model_config=model,
        rollout_mode=RolloutMode.HYBRID,
        workers=[],
        replica_rank=replica,
        node_rank=0,
        gpus_per_node=1,
        nnodes=1,
        cuda_visible_devices="0",
    )
    ray.get(actor.launch_server.remote(), timeout=300)
    os.environ.update(RANK=str(replica), RAY_LOCAL_WORLD_SIZE="1", WORLD_SIZE=str(replica + 1))
    adapter = get_rollout_class("ascend_safe")(config=rollout, model_config=model, device_mesh=None)
    return Server(actor, adapter)


AFTERWARDS = 4
"""Requests after a storm, which nobody aborts."""


def storm_prompts() -> list[list[int]]:
    """Prompts of 3 to 100 tokens."""
    source = random.Random(5)
    return [[source.randrange(5, 85) for _ in range(source.choice((3, 20, 40, 100)))] for _ in range(16)]


def alone(server: Server, tokens: int, seconds: float) -> list[list[int]]:
    """What each of the storm's prompts gives when it is the only request."""
    import ray

    return [
        list(ray.get(server.start(prompt, f"alone-{number}", max_tokens=tokens), timeout=seconds).token_ids)
        for number, prompt in enumerate(storm_prompts())
    ]


def storm(
    server: Server,
    weights: Callable[[], Iterable[tuple[str, Any]]],
    reference: Sequence[Sequence[int]],
    *,
    seed: int,
    in_flight: int,
    tokens: int,
    rounds: int,
    seconds: float,
) -> dict[str, int]:
    """Call everything in random order, some of it at once, while requests are in flight; wait until all has ended.

    Each request must end with the tokens that it has alone, or aborted with the first of them.

    Args:
        weights: one full set, the same each time.
        reference: from `alone`.
        seed: of the order.
        in_flight: requests that are kept running or waiting.
        tokens: to generate for each.
        rounds: of calls.
        seconds: in which all must have ended.

    Returns:
        How many requests were `completed`, how many `aborted`.
    """
    import ray

    plain: dict[str, tuple[Any, ...]] = {
        "free_cache_engine": (),
        "init_cache_engine": (),
        "sleep": (),
        "wake_up": (["kv_cache"],),
        "abort_all_requests": (),
        "resume_generation": (),
        "release_kv_cache": (),
        "resume_kv_cache": (),
        "memory": (),
    }
    source, prompts = random.Random(seed), storm_prompts()
    running: list[tuple[int, Any]] = []
    calls: list[Any] = []
    syncs: list[threading.Thread] = []
    failures: list[BaseException] = []
    deadline = time.monotonic() + seconds

    def left() -> float:
        return max(1.0, deadline - time.monotonic())

    def start(count: int) -> None:
        for _ in range(count):
            number = source.randrange(len(prompts))
            name = f"storm-{seed}-{len(running)}"
            running.append((number, server.start(prompts[number], name, max_tokens=tokens, prompt_logprobs=None)))

    def sync() -> None:
        try:
            server.sync(weights(), timeout=seconds)
        except BaseException as error:
            failures.append(error)

    start(in_flight)
    for _ in range(rounds):
        time.sleep(source.uniform(0, 0.15))
        if source.random() < 0.12:
            syncs.append(threading.Thread(target=sync, daemon=True))
            syncs[-1].start()
            if source.random() < 0.5:  # else other calls come meanwhile
                syncs[-1].join(left())
        for name in source.sample(sorted(plain), source.choice((1, 1, 2, 3))):
            calls.append(getattr(server.actor, name).remote(*plain[name]))
        if source.random() < 0.5:
            waiting = ray.wait([request for _, request in running], num_returns=len(running), timeout=0)[1]
            start(max(0, in_flight - len(waiting)))
    for thread in syncs:
        thread.join(left())
        assert not thread.is_alive(), "a sync hangs"
    assert not failures, failures[0]
    ray.get(calls, timeout=left())
    server.call("wake_up", timeout=left())
    server.call("resume_generation", timeout=left())
    # An engine that has been through all this still answers; those before may all have been aborted.
    start(AFTERWARDS)
    ends = {"completed": 0, "aborted": 0}
    for number, request in running:
        output = ray.get(request, timeout=left())
        ends[output.stop_reason] += 1
        found = list(output.token_ids)
        expected = list(reference[number])
        assert found == (expected if output.stop_reason == "completed" else expected[: len(found)])
    return ends
