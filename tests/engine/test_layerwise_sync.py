"""A rollout server whose worker loads weights through vLLM's own bracket: right after every sync, silent after none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ray

from verl_ascend_rollout import events

pytestmark = pytest.mark.engine


@pytest.fixture
def layerwise(server: Any, checkpoints: Any) -> Iterator[Any]:
    """The server on that path; the next test finds it as it was, with the first checkpoint."""
    settings = {"kv_release": "auto", "verify": "always"}
    server.call("collective_rpc", "ascend_safe_configure", None, (), {**settings, "weight_path": "layerwise"})
    yield server
    server.call("collective_rpc", "ascend_safe_configure", None, (), {**settings, "weight_path": "by_layout"})
    server.sync(checkpoints[0].tensors())


def test_syncs_are_bit_exact_against_a_fresh_engine(
    layerwise: Any, checkpoints: Any, fresh: Any, events_file: Any
) -> None:
    for number in (0, 1, 1, 0, 1, 0, 0, 1, 0, 1):
        layerwise.call("sleep")
        layerwise.call("wake_up", ["weights"])
        layerwise.sync(checkpoints[number].tensors())
        layerwise.call("wake_up", ["kv_cache"])
        assert layerwise.answers() == fresh(number)["fresh"]
    syncs = [event for event in events.read(events_file) if event["step"] == "sync" and event["process"] == "worker"]
    assert [event["detail"]["path"] for event in syncs[-10:]] == ["layerwise"] * 10


def test_after_a_sync_that_was_broken_off_nothing_is_generated_until_one_has_passed(
    layerwise: Any, checkpoints: Any, fresh: Any
) -> None:
    def broken() -> Iterator[Any]:
        for number, pair in enumerate(checkpoints[1].tensors()):
            if number == 200:
                raise OSError("the trainer's disk is gone")
            yield pair

    left_out = "model.layers.1.mlp.experts.37.down_proj.weight"
    for stream, said in (
        (broken(), "the trainer's disk is gone"),
        ([(name, tensor) for name, tensor in checkpoints[1].tensors() if name != left_out], left_out),
    ):
        with pytest.raises(Exception, match=said):
            layerwise.sync(stream)
        with pytest.raises(Exception, match="refuses to generate: the last weight sync failed"):
            ray.get(layerwise.start([5, 6, 7], f"after {said}"))
        layerwise.sync(checkpoints[1].tensors())
        assert layerwise.answers() == fresh(1)["fresh"]
