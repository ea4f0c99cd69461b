"""Our worker extension under the real NPUWorker: KV cache, sleep, weight sync.

Real torch-npu and vllm-ascend on a stand-in CANN: what runs is their code; the operators are reference versions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from toy_engine import TOLERANCE, Checkpoint, Engine

pytestmark = pytest.mark.engine


def kernel_addresses(engine: Engine) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in engine.model.named_parameters()}


def test_a_fresh_engine_answers_as_hugging_face_does(
    engine: Engine, checkpoints: list[Checkpoint], report: Any
) -> None:
    devices = {str(parameter.device) for parameter in engine.model.parameters()}
    assert devices == {"npu:0"}
    gap = checkpoints[0].gap(engine.answers())
    report("fresh load", gap)
    assert gap < TOLERANCE


def test_kv_cache_is_freed_and_comes_back(engine: Engine, checkpoints: list[Checkpoint], report: Any) -> None:
    before = engine.answers()
    held = engine.call("ascend_safe_memory")["kv_bytes"]
    free_before = torch.npu.mem_get_info()[0]
    freed = engine.call("free_cache_engine")
    assert freed["kv_release"] == "sleep"
    assert freed["changed"]
    assert (freed["bytes_before"], freed["bytes_after"]) == (held, 0)
    given_back = torch.npu.mem_get_info()[0] - free_before
    assert given_back >= 0.99 * held
    assert not engine.call("free_cache_engine")["changed"]
    made = engine.call("init_cache_engine")
    assert made["changed"]
    assert made["bytes_after"] == held
    assert not engine.call("init_cache_engine")["changed"]
    assert engine.answers() == before
    report(f"free and init by sleep ({given_back >> 20} MiB of {held >> 20})", checkpoints[0].gap(before))


@pytest.mark.parametrize("level", [1, 2])
def test_each_sleep_level(
    level: int, engine: Engine, checkpoints: list[Checkpoint], synced: Callable[[Checkpoint], Any], report: Any
) -> None:
    synced(checkpoints[0])
    before = engine.answers()
    engine.llm.sleep(level=level)
    engine.llm.wake_up(tags=["weights"])
    engine.call("ascend_safe_restore_kernel_format")
    if level == 2:
        synced(checkpoints[0])  # level 2 discards the weights
    engine.llm.wake_up(tags=["kv_cache"])
    engine.call("ascend_safe_restore_kernel_format")
    after = engine.answers()
    report(f"sleep {level} and wake-up", checkpoints[0].gap(after))
    assert after == before


def test_three_syncs_of_changing_weights(
    engine: Engine, checkpoints: list[Checkpoint], synced: Callable[[Checkpoint], Any], report: Any
) -> None:
    addresses = kernel_addresses(engine)
    for number in (1, 2, 3):
        engine.llm.sleep(level=1)
        engine.llm.wake_up(tags=["weights"])
        summary = synced(checkpoints[number])
        assert summary["tensors"] == len(checkpoints[number].tensors())
        engine.llm.wake_up(tags=["kv_cache"])
        engine.call("ascend_safe_restore_kernel_format")
        gap = checkpoints[number].gap(engine.answers())
        report(f"sync {number}", gap)
        assert gap < TOLERANCE
    assert kernel_addresses(engine) == addresses
    synced(checkpoints[0])
    assert checkpoints[0].gap(engine.answers()) < TOLERANCE
