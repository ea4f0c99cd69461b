"""Experts travel merged where the workers take that, and as verl sends them everywhere else: the same bits either way.

verl's own `unfuse_moe_params`, transformers' own models, verl's own FSDP engine on two ranks, verl's own transport.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import socket
import subprocess
import sys
import threading
import types
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from verl_ascend_rollout.integration import patches
from verl_ascend_rollout.transport.stream import parse_slice_name

HERE = Path(__file__).resolve().parent
EXPERTS, HIDDEN, INTERMEDIATE, LAYERS = 5, 16, 8, 2
GATE_UP_BYTES = EXPERTS * 2 * INTERMEDIATE * HIDDEN * 2
"""Of one layer, in bf16."""

Stream = Iterable[tuple[str, torch.Tensor]]


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    patches.install()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Tiny models of transformers, by type, each saved in the folder `path`."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    common = {
        "vocab_size": 32,
        "hidden_size": HIDDEN,
        "intermediate_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": INTERMEDIATE,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    made = {
        "qwen2_moe": Qwen2MoeForCausalLM(Qwen2MoeConfig(**common, shared_expert_intermediate_size=8)),
        "qwen3_moe": Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, head_dim=8)),
    }
    for name, model in made.items():
        model.to(torch.bfloat16)
        model.path = tmp_path_factory.mktemp(name)
        model.save_pretrained(model.path)
    return made


def unfuse(weights: Stream, model_type: str = "qwen2_moe") -> Any:
    """The stream as verl's engine makes it in a process of ours."""
    module = importlib.import_module("verl.workers.engine.fsdp.transformer_impl")
    return module.unfuse_moe_params(iter(weights), model_type)


def verls_own(weights: Stream, model_type: str = "qwen2_moe") -> Iterator[tuple[str, torch.Tensor]]:
    """The stream as verl's engine makes it without us."""
    module = importlib.import_module("verl.workers.engine.fsdp.utils")
    own: Iterator[tuple[str, torch.Tensor]] = module.unfuse_moe_params.__wrapped__(iter(weights), model_type)
    return own


def assert_same(left: Stream, right: Stream) -> None:
    """The same names in the same order, the same shapes, dtypes and bits."""
    left, right = list(left), list(right)
    assert [name for name, _ in left] == [name for name, _ in right]
    for (name, tensor), (_, other) in zip(left, right, strict=True):
        assert (tensor.shape, tensor.dtype) == (other.shape, other.dtype), name
        assert torch.equal(tensor, other), name


def taken_apart(weights: Stream) -> dict[str, torch.Tensor]:
    """A stream in any form, one tensor an expert: slices are put together, and the rest is left to verl."""
    whole: dict[str, torch.Tensor] = {}
    for name, tensor in weights:
        found = parse_slice_name(name)
        if found is None:
            assert name not in whole
            whole[name] = tensor
            continue
        merged, first, stop = found
        before = whole.get(merged, tensor[:0])
        assert (len(before), len(tensor)) == (first, stop - first), name
        whole[merged] = torch.cat([before, tensor])
    return dict(verls_own(whole.items()))


# ---------------------------------------------------------------------------------------------------------- the stream


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe"])
def test_whoever_iterates_gets_verls_own_stream(models: dict[str, Any], model_type: str) -> None:
    from safetensors.torch import load_file

    weights = models[model_type].state_dict().items()
    assert_same(unfuse(weights, model_type), verls_own(weights, model_type))
    assert set(dict(unfuse(weights, model_type))) == set(load_file(models[model_type].path / "model.safetensors"))
    stream = unfuse(weights, model_type)
    assert isinstance(stream, Generator)
    assert iter(stream) is stream
    assert next(stream)[0] == "model.embed_tokens.weight"
    stream.close()
    assert list(stream) == []


def test_a_model_that_verl_leaves_merged_stays_as_it_is() -> None:
    weights = [("model.layers.0.mlp.experts.gate_up_proj", torch.zeros(2, 4, 8))]
    assert_same(unfuse(weights, "gpt_oss"), weights)
    assert len(list(unfuse(weights, "qwen2_moe"))) == 4, "another type is taken apart"


def test_an_error_of_the_trainer_comes_through() -> None:
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield "model.norm.weight", torch.zeros(2)
        raise OSError("the trainer's disk is gone")

    for stream in (unfuse(broken()), unfuse(broken()).merged(1 << 30, slices=True)):
        assert next(stream)[0] == "model.norm.weight"
        with pytest.raises(OSError, match="the trainer's disk is gone"):
            next(stream)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe"])
def test_merged_is_what_the_model_has(models: dict[str, Any], model_type: str) -> None:
    weights = models[model_type].state_dict().items()
    assert_same(unfuse(weights, model_type).merged(GATE_UP_BYTES, slices=False), weights)


def test_experts_beyond_the_limit_go_as_verl_sends_them(models: dict[str, Any]) -> None:
    weights = models["qwen2_moe"].state_dict().items()
    sent = dict(unfuse(weights).merged(GATE_UP_BYTES - 1, slices=False))
    # gate_up_proj is above the limit and down_proj, half as large, below it.
    assert sum(".mlp.experts.down_proj" in name for name in sent) == LAYERS
    assert sum(".mlp.experts.3." in name for name in sent) == 2 * LAYERS
    assert taken_apart(sent.items()).keys() == dict(verls_own(weights)).keys()
    # Nothing fits: verl's stream, and no tensor that is not an expert's is touched.
    assert_same(unfuse(weights).merged(0, slices=False), verls_own(weights))
    assert_same(unfuse(weights).merged(0, slices=True), verls_own(weights))


@pytest.mark.parametrize("fits", [1, 2, 3, 4])
def test_slices_are_whole_experts_and_as_many_as_fit(models: dict[str, Any], fits: int) -> None:
    weights = models["qwen2_moe"].state_dict().items()
    largest = GATE_UP_BYTES // EXPERTS * fits + 1
    sent = list(unfuse(weights).merged(largest, slices=True))
    experts = [(name, tensor) for name, tensor in sent if ".mlp.experts." in name]
    assert all(tensor.nbytes <= largest for _, tensor in experts)
    assert [name for name, _ in experts if "layers.1" in name and "gate_up" in name] == [
        f"model.layers.1.mlp.experts.gate_up_proj[{first}:{min(first + fits, EXPERTS)}]"
        for first in range(0, EXPERTS, fits)
    ]
    assert_same(sorted(taken_apart(sent).items()), sorted(verls_own(weights)))


def test_a_tensor_with_the_name_and_not_the_form_of_merged_experts_goes_as_it_came() -> None:
    weights = [("model.layers.0.mlp.experts.down_proj", torch.zeros(4, 8)), ("lm_head.weight", torch.zeros(64, 8))]
    assert_same(unfuse(weights).merged(1, slices=True), weights)


def test_less_is_held_than_verl_holds() -> None:
    def most_at_once(make: Callable[[Stream], Iterator[tuple[str, torch.Tensor]]]) -> int:
        alive: list[weakref.ref[torch.Tensor]] = []
        most = 0

        def gathered() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal most
            for layer in range(4):
                for name in ("gate_up_proj", "down_proj"):
                    tensor = torch.zeros(EXPERTS, 4, 4)
                    alive.append(weakref.ref(tensor))
                    most = max(most, sum(reference() is not None for reference in alive))
                    yield f"model.layers.{layer}.mlp.experts.{name}", tensor
                    del tensor

        stream = make(gathered())
        while next(stream, None) is not None:
            pass
        return most

    limits: list[dict[str, Any]] = [
        {"largest": 1 << 20, "slices": False},
        {"largest": 1, "slices": False},
        {"largest": 130, "slices": True},
    ]
    assert most_at_once(verls_own) == 3
    for limit in limits:
        held = most_at_once(lambda weights, limit=limit: unfuse(weights).merged(**limit))
        assert held == 2, f"more than the one before and the one that is gathered, with {limit}"


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe"])
def test_the_fsdp_engine_on_two_ranks_gives_both_forms(models: dict[str, Any], model_type: str, tmp_path: Path) -> None:
    """An odd number of experts, so that the ranks' shards are not of one size."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(HERE / "fsdp_stream.py"), str(models[model_type].path), str(tmp_path / "streams.pt")]
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "VERL_PLATFORM": "cpu"}
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **job, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(output[-3000:] for output in said)
    streams = torch.load(tmp_path / "streams.pt", weights_only=True)
    # The trainer's model is float32.
    weights = [(name, tensor.float()) for name, tensor in models[model_type].state_dict().items()]
    assert_same(streams["merged"], weights)
    assert_same(streams["apart"], verls_own(weights, model_type))


# --------------------------------------------------------------------------------------------------------- the adapter


class Server:
    """The handle of a rollout server that says what its workers said, and counts how often it was asked."""

    def __init__(self, explained: Any) -> None:
        self.asked = 0
        self._explained = explained
        self.explain = types.SimpleNamespace(remote=self._remote)

    async def _remote(self) -> Any:
        self.asked += 1
        if isinstance(self._explained, Exception):
            raise self._explained
        return self._explained


@pytest.fixture
def adapter_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Makes the adapter of the second of two trainer ranks, which sends to its own worker by verl's transport."""
    import ray
    from verl.workers.config import CheckpointEngineConfig, RolloutConfig
    from verl.workers.rollout.base import get_rollout_class

    monkeypatch.setattr(
        ray, "get_runtime_context", lambda: types.SimpleNamespace(get_job_id=lambda: "job", get_node_id=lambda: "node")
    )
    # One device a node: the second rank has no server.
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "RAY_LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)

    def make(server: Server | None, bucket_megabytes: int = 1) -> Any:
        def get_actor(name: str) -> Server:
            assert name == "ascend_safe_server_0_0"
            if server is None:
                raise ValueError(f"no actor is named {name}")
            return server

        monkeypatch.setattr(ray, "get_actor", get_actor)
        config = RolloutConfig(
            name="ascend_safe",
            tensor_model_parallel_size=2,
            checkpoint_engine=CheckpointEngineConfig(update_weights_bucket_megabytes=bucket_megabytes),
            engine_kwargs={"ascend_safe": {"events": str(tmp_path / "events.jsonl")}},
        )
        adapter = get_rollout_class("ascend_safe")(config=config, model_config="model", device_mesh=None)
        adapter.zmq_handle = f"ipc://{tmp_path}/weights.sock"
        assert adapter.use_shm
        # As where verl's transport works on device memory.
        monkeypatch.setattr(adapter, "_has_own_transport", lambda kwargs: False)
        return adapter

    return make


def sync(adapter: Any, weights: Any, **kwargs: Any) -> list[tuple[str, torch.Tensor]]:
    """One weight sync by verl's transport; what its receiver got, in order."""
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver

    came: list[tuple[str, torch.Tensor]] = []
    receiver = BucketedWeightReceiver(adapter.zmq_handle, torch.device("cpu"), use_shm=True)

    def keep(weights: Stream, is_last: bool) -> None:
        came.extend((name, tensor.clone()) for name, tensor in weights)

    thread = threading.Thread(target=receiver.receive_weights, args=(keep,), daemon=True)
    thread.start()
    asyncio.run(asyncio.wait_for(adapter.update_weights(weights, **kwargs), 60))
    thread.join(60)
    assert not thread.is_alive()
    return came


def workers(*forms: str) -> dict[str, Any]:
    """What a server explains whose workers take experts so."""
    return {"workers": [{"kv_release": "reallocate", "experts": form} for form in forms]}


def test_workers_that_take_them_get_them_merged_and_are_asked_once(
    models: dict[str, Any], adapter_to: Callable[..., Any], tmp_path: Path
) -> None:
    from verl_ascend_rollout import events

    weights = models["qwen2_moe"].state_dict().items()
    server = Server(workers("whole", "whole"))
    adapter = adapter_to(server)
    for _ in range(2):
        assert_same(sync(adapter, unfuse(weights), global_steps=1), weights)
    assert server.asked == 1
    (one, other) = (event["detail"] for event in events.read(tmp_path / "events.jsonl"))
    assert one == other
    assert one["tensors"] == len(weights) < len(list(verls_own(weights))) - LAYERS * 3 * EXPERTS + 3 * LAYERS
    assert one["bytes"] == sum(tensor.nbytes for _, tensor in weights)


@pytest.mark.parametrize(
    ("explained", "said"),
    [
        (workers("apart", "apart"), False),
        (workers("whole", "apart"), False),
        (workers("another form", "another form"), False),
        (workers(), False),
        ({"workers": [{"kv_release": "reallocate"}]}, True),
        ({}, True),
        (RuntimeError("the server is gone"), True),
        (None, True),
    ],
    ids=["apart", "not all", "unknown form", "no workers", "no form", "older server", "error", "no server"],
)
def test_where_the_workers_do_not_take_them_or_nobody_says_verls_stream_is_sent(
    models: dict[str, Any],
    adapter_to: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    explained: Any,
    said: bool,
) -> None:
    weights = models["qwen2_moe"].state_dict().items()
    adapter = adapter_to(None if explained is None else Server(explained))
    with caplog.at_level("WARNING", logger="verl_ascend_rollout.trainer"):
        for _ in range(2):
            assert_same(sync(adapter, unfuse(weights)), verls_own(weights))
    warnings = [record for record in caplog.records if record.name == "verl_ascend_rollout.trainer"]
    assert len(warnings) == said
    assert all("Experts are sent one by one, since the server of replica 0" in w.getMessage() for w in warnings)


def test_what_is_not_taken_apart_by_verl_is_sent_as_it_came_and_nobody_is_asked(
    models: dict[str, Any], adapter_to: Callable[..., Any]
) -> None:
    weights = models["qwen3_moe"].state_dict().items()
    server = Server(workers("whole", "whole"))
    assert_same(sync(adapter_to(server), iter(weights)), weights)
    assert server.asked == 0


def test_a_sync_with_lora_stays_as_verl_sends_it(models: dict[str, Any], adapter_to: Callable[..., Any]) -> None:
    weights = models["qwen2_moe"].state_dict().items()
    server = Server(workers("whole", "whole"))
    came = sync(adapter_to(server), unfuse(weights), peft_config={"r": 8}, base_sync_done=False)
    assert_same(came, verls_own(weights))
    assert server.asked == 0


@pytest.mark.parametrize("form", ["whole", "slices"])
def test_experts_that_are_larger_than_verls_bucket_arrive_in_parts(adapter_to: Callable[..., Any], form: str) -> None:
    """verl's sender refuses a tensor that is larger than its bucket in shared memory."""
    generator = torch.Generator().manual_seed(0)
    gate_up, down = (
        torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in ((6, 512, 256), (6, 256, 256))
    )
    weights = [("model.layers.0.mlp.experts.gate_up_proj", gate_up), ("model.layers.0.mlp.experts.down_proj", down)]
    assert gate_up.nbytes > 2**20 > down.nbytes

    came = sync(adapter_to(Server(workers(form, form))), unfuse(weights))
    names = [name for name, _ in came]
    assert names[-1] == "model.layers.0.mlp.experts.down_proj"
    if form == "slices":
        assert [parse_slice_name(name) for name in names[:-1]] == [(weights[0][0], 0, 4), (weights[0][0], 4, 6)]
    else:
        assert len(names[:-1]) == 2 * 6
    assert_same(sorted(taken_apart(came).items()), sorted(verls_own(weights)))


def test_experts_of_any_strides_arrive_the_same_bits(adapter_to: Callable[..., Any]) -> None:
    gate_up = torch.arange(4 * 8 * 16.0).reshape(4, 16, 8).transpose(1, 2)
    down = torch.arange(16 * 16 * 8.0).reshape(16, 16, 8)[::4, ::2]
    assert not gate_up.is_contiguous() and not down.is_contiguous()
    weights = [("model.layers.0.mlp.experts.gate_up_proj", gate_up), ("model.layers.0.mlp.experts.down_proj", down)]
    assert_same(sync(adapter_to(Server(workers("whole", "whole"))), unfuse(weights)), weights)
