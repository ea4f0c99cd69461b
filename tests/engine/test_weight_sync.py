"""A weight sync is right the second time, and the tenth: bit for bit what a fresh engine says on the same weights."""

from __future__ import annotations

import asyncio
import copy
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from verl_ascend_rollout import events
from verl_ascend_rollout.transport import rendezvous

pytestmark = pytest.mark.engine


def worker_syncs(events_file: Any) -> list[dict[str, Any]]:
    """The worker's events of weight syncs so far."""
    return [event for event in events.read(events_file) if event["step"] == "sync" and event["process"] == "worker"]


@pytest.fixture(autouse=True)
def whole_again(server: Any, checkpoints: Any) -> Iterator[None]:
    """Whatever a test did, the next one finds the first checkpoint in the engine."""
    yield
    server.sync(checkpoints[0].tensors())
    server.call("wake_up", ["kv_cache"])


def test_ten_syncs_are_bit_exact_against_a_fresh_engine(
    server: Any, checkpoints: Any, fresh: Any, events_file: Any
) -> None:
    assert fresh(0)["fresh"] != fresh(1)["fresh"], "two checkpoints that answer alike would prove nothing"
    before = len(worker_syncs(events_file))
    for number in (0, 1, 0, 1, 1, 0, 1, 0, 1, 0):
        # In the order of a training step: asleep, weights awake, sync, KV cache awake.
        server.call("sleep")
        server.call("wake_up", ["weights"])
        server.sync(checkpoints[number].tensors())
        server.call("wake_up", ["kv_cache"])
        assert server.answers() == fresh(number)["fresh"]
    # All but the first of an engine repeat what the first one did.
    assert [event["detail"]["path"] for event in worker_syncs(events_file)[before:]].count("replay") >= 9


def test_control_vllms_own_reload_is_wrong_here(fresh: Any) -> None:
    """If this fails, vLLM has mended its reload on CPUs."""
    assert fresh(0)["stock_reload"] != fresh(1)["fresh"]


def test_the_order_of_the_tensors_does_not_matter(server: Any, checkpoints: Any, fresh: Any) -> None:
    server.sync(reversed(list(checkpoints[1].tensors())))
    assert server.answers() == fresh(1)["fresh"]


def test_float32_weights_are_cast_on_arrival(server: Any, checkpoints: Any, fresh: Any) -> None:
    """verl sends the trainer's precision (bucketed_weight_transfer.py: no cast on the sender's side)."""
    server.sync((name, tensor.float()) for name, tensor in checkpoints[1].tensors())
    assert server.answers() == fresh(1)["fresh"]


@pytest.mark.parametrize(
    "left_out",
    [
        "model.layers.1.mlp.experts.37.down_proj.weight",
        "model.layers.0.self_attn.k_proj.bias",
        "model.layers.1.mlp.shared_expert_gate.weight",
        "lm_head.weight",
        "model.norm.weight",
    ],
)
def test_a_tensor_that_never_came_is_named_and_the_engine_refuses_to_generate(
    server: Any, checkpoints: Any, fresh: Any, left_out: str
) -> None:
    started = time.monotonic()
    with pytest.raises(Exception, match="is not the whole model") as failure:
        server.sync([(name, tensor) for name, tensor in checkpoints[1].tensors() if name != left_out])
    assert left_out in str(failure.value)
    assert time.monotonic() - started < 60, "the sender waited for a receiver that had failed"
    with pytest.raises(Exception, match="refuses to generate: the last weight sync failed"):
        ray.get(server.start([5, 6, 7], f"refused-{left_out}"))

    server.sync(checkpoints[1].tensors())
    assert server.answers() == fresh(1)["fresh"], "a full sync after a failed one is whole"


def test_a_tensor_that_comes_twice_is_named(server: Any, checkpoints: Any) -> None:
    name, tensor = "model.norm.weight", torch.ones(64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=f"hold {name} more than once"):
        server.sync([*checkpoints[1].tensors(), (name, tensor)])


def test_a_stream_that_breaks_off_leaves_neither_side_waiting(server: Any, checkpoints: Any, fresh: Any) -> None:
    def broken() -> Iterator[Any]:
        for number, pair in enumerate(checkpoints[1].tensors()):
            if number == 200:
                raise OSError("the trainer's disk is gone")
            yield pair

    started = time.monotonic()
    with pytest.raises(OSError, match="the trainer's disk is gone"):
        server.sync(broken())
    assert time.monotonic() - started < 60
    with pytest.raises(Exception, match="the last weight sync failed: the trainer's disk is gone"):
        ray.get(server.start([5, 6, 7], "after-a-broken-stream"))
    server.sync(checkpoints[1].tensors())
    assert server.answers() == fresh(1)["fresh"]


def test_values_that_are_not_finite_are_named(server: Any, checkpoints: Any) -> None:
    tensors = dict(checkpoints[1].tensors())
    tensors["model.layers.0.mlp.experts.3.up_proj.weight"][0, 0] = float("nan")
    tensors["model.norm.weight"][5] = float("inf")
    with pytest.raises(Exception, match="holding NaN or Inf") as failure:
        server.sync(tensors.items())
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in str(failure.value)
    assert "model.norm.weight" in str(failure.value)


def test_a_name_that_the_model_does_not_have_is_an_error(server: Any, checkpoints: Any) -> None:
    with pytest.raises(Exception, match="not_a_parameter"):
        server.sync([*checkpoints[1].tensors(), ("model.layers.0.not_a_parameter.weight", torch.ones(4))])


def test_a_wrong_shape_is_an_error(server: Any, checkpoints: Any) -> None:
    tensors = dict(checkpoints[1].tensors())
    tensors["model.norm.weight"] = torch.ones(63, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="63"):
        server.sync(tensors.items())


def test_a_sync_that_passes_does_not_wake_an_engine_that_went_to_sleep_after_one_that_failed(
    server: Any, checkpoints: Any, fresh: Any
) -> None:
    with pytest.raises(Exception, match="is not the whole model"):
        server.sync(list(checkpoints[1].tensors())[1:])
    server.call("sleep")
    server.sync(checkpoints[1].tensors())
    waiting = server.start(range(5, 25), "after-failure-and-sleep")
    assert ray.wait([waiting], timeout=2)[0] == [], "there is no KV cache to generate with"
    server.call("wake_up", ["kv_cache"])
    assert len(ray.get(waiting, timeout=60).token_ids) == 12
    assert server.answers() == fresh(1)["fresh"]


def test_weights_that_this_path_does_not_load_are_refused(server: Any, checkpoints: Any) -> None:
    tensors = checkpoints[1].tensors()
    with pytest.raises(Exception, match="The weight sync of LoRA adapters is not supported on this platform"):
        asyncio.run(server.adapter.update_weights(tensors, peft_config={"r": 8}, base_sync_done=False))


@pytest.mark.parametrize(
    ("use_shm", "peft", "base_done", "own"),
    [
        (True, None, False, True),
        (True, {"r": 8}, False, True),
        # Adapters alone go by verl's receiver.
        (True, {"r": 8}, True, False),
        # Device memory is shared by verl's path.
        (False, None, False, False),
    ],
)
def test_which_transport_is_taken(use_shm: bool, peft: Any, base_done: bool, own: bool) -> None:
    from verl_ascend_rollout.integration.weight_sender import has_own_transport

    assert has_own_transport(use_shm, peft, base_done) is own


def test_a_rank_that_does_not_call_the_engine_only_helps_to_make_the_weights(server: Any) -> None:
    """All ranks of a trainer gather each tensor together: one that stopped early would leave the others waiting."""
    adapter = copy.copy(server.adapter)
    adapter._ensure_server_handle = lambda: False
    made = []

    async def weights() -> AsyncIterator[tuple[str, torch.Tensor]]:
        for number in range(3):
            made.append(number)
            yield f"weight.{number}", torch.ones(2)

    asyncio.run(adapter.update_weights(weights(), global_steps=1))
    assert made == [0, 1, 2]


def test_nothing_is_left_of_a_sync(
    server: Any, checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    server.sync(checkpoints[1].tensors())
    assert f"@{rendezvous.PREFIX}" not in Path("/proc/net/unix").read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_sync_leaves_events_on_both_sides(server: Any, checkpoints: Any, events_file: Any) -> None:
    server.sync(checkpoints[1].tensors())
    recorded = [event for event in events.read(events_file) if event["step"] == "sync"]
    worker = worker_syncs(events_file)[-1]
    assert worker["detail"]["tensors"] == sum(1 for _ in checkpoints[1].tensors())
    assert worker["detail"]["bytes"] == sum(tensor.nbytes for _, tensor in checkpoints[1].tensors())
    trainer = [event for event in recorded if event["process"] == "trainer"][-1]
    assert {name: trainer["detail"][name] for name in ("tensors", "bytes", "checksum")} == {
        name: worker["detail"][name] for name in ("tensors", "bytes", "checksum")
    }
    assert trainer["detail"]["checksum"] is not None, "verify=always takes checksums"
    assert {"trainer", "server", "worker"} <= {event["process"] for event in recorded}
