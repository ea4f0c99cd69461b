"""Experts that the trainer sends merged, over our own transport: the same engine, bit for bit, as one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from verl_ascend_rollout import events

pytestmark = pytest.mark.engine

LAYERS, EXPERTS = 2, 60
SENT_APART, SENT_MERGED = 391, 391 - LAYERS * 3 * EXPERTS + LAYERS * 2


@pytest.fixture(autouse=True)
def whole_again(server: Any, checkpoints: Any) -> Iterator[None]:
    """Whatever a test did, the next one finds the first checkpoint in the engine."""
    yield
    server.sync(checkpoints[0].tensors())
    server.call("wake_up", ["kv_cache"])


def as_the_trainer_has_it(checkpoint: Any) -> dict[str, torch.Tensor]:
    """The weights of transformers' own model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.bfloat16)
    return dict(model.state_dict())


def stream(weights: dict[str, torch.Tensor]) -> Any:
    """What verl's FSDP engine makes of them for the rollout."""
    from verl.workers.engine.fsdp import transformer_impl

    return transformer_impl.unfuse_moe_params(iter(weights.items()), "qwen2_moe")


def sent(events_file: Any) -> list[dict[str, Any]]:
    """What the trainer's side of each weight sync so far says of it."""
    found = events.read(events_file)
    return [event["detail"] for event in found if (event["step"], event["process"]) == ("sync", "trainer")]


def test_merged_and_taken_apart_syncs_in_turn_are_bit_exact_against_a_fresh_engine(
    server: Any, checkpoints: Any, fresh: Any, events_file: Any
) -> None:
    merged = [as_the_trainer_has_it(checkpoint) for checkpoint in checkpoints]
    server.sync(checkpoints[0].tensors())
    before = len(sent(events_file))
    for number, form in ((1, "merged"), (0, "merged"), (1, "apart"), (0, "merged"), (1, "merged")):
        server.sync(stream(merged[number]) if form == "merged" else checkpoints[number].tensors())
        server.call("wake_up", ["kv_cache"])
        assert server.answers() == fresh(number)["fresh"], (number, form)
    syncs = sent(events_file)[before:]
    assert [sync["tensors"] for sync in syncs] == [SENT_MERGED, SENT_MERGED, SENT_APART, SENT_MERGED, SENT_MERGED]
    assert len({sync["bytes"] for sync in syncs}) == 1


def test_merged_experts_that_never_came_are_an_error_and_the_engine_refuses_to_generate(
    server: Any, checkpoints: Any, fresh: Any
) -> None:
    merged = as_the_trainer_has_it(checkpoints[1])
    left_out = "model.layers.1.mlp.experts.down_proj"
    with pytest.raises(Exception, match=r"is not the whole model.*model\.layers\.1\.mlp\.experts"):
        server.sync(stream({name: tensor for name, tensor in merged.items() if name != left_out}))
    with pytest.raises(Exception, match="refuses to generate: the last weight sync failed"):
        server.answers()
    server.sync(stream(merged))
    server.call("wake_up", ["kv_cache"])
    assert server.answers() == fresh(1)["fresh"]
