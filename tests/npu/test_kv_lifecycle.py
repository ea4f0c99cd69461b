"""Free, init and every order of calls on an emulated NPU, where sleep mode is vllm-ascend's own CaMem.

Real torch-npu and vllm-ascend on a stand-in CANN, whose ledger counts device memory.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_engine import Checkpoint, Engine

pytestmark = pytest.mark.engine

CYCLES = int(os.environ.get("ASCEND_SAFE_CYCLES", "40"))


def test_cycles_change_no_answer_and_leave_no_device_memory_behind(engine: Engine, report: Any) -> None:
    expected = engine.answers()
    held = engine.call("ascend_safe_memory")["kv_bytes"]
    used_free, used_made, free_seconds, init_seconds = [], [], [], []
    for cycle in range(1, CYCLES + 1):
        freed = engine.call("free_cache_engine")
        used_free.append(engine.call("ascend_safe_memory")["device_used"])
        made = engine.call("init_cache_engine")
        used_made.append(engine.call("ascend_safe_memory")["device_used"])
        assert (freed["kv_release"], freed["bytes_before"], freed["bytes_after"]) == ("sleep", held, 0)
        assert made["bytes_after"] == held
        free_seconds.append(freed["seconds"])
        init_seconds.append(made["seconds"])
        if cycle % max(2, CYCLES // 10) == 0:
            assert engine.answers() == expected, f"cycle {cycle}"
    given_back = [made - free for made, free in zip(used_made, used_free, strict=True)]
    assert min(given_back) >= 0.99 * held
    drift = (max(used_free) - min(used_free)) / statistics.median(used_free)
    report(
        f"{CYCLES} cycles by sleep, KV cache {held >> 20} MiB",
        f"given back at least {min(given_back) / held:.2%}, device memory after free flat within {drift:.3%}, "
        f"medians: free {statistics.median(free_seconds) * 1e3:.0f} ms, "
        f"init {statistics.median(init_seconds) * 1e3:.0f} ms",
    )
    assert drift < 0.01


def test_the_kv_only_release_is_not_there_and_the_probe_says_so(engine: Engine) -> None:
    """vllm-ascend up to 0.30 has no `discard` (vllm#44890): sleep is taken instead."""
    assert not hasattr(engine.worker, "discard")
    configured = engine.call("ascend_safe_configure", kv_release="auto", weight_path="by_layout", verify="always")
    assert configured["kv_release"] == "sleep"
    assert any("NPUWorker has no `discard`" in obstacle for obstacle in configured["obstacles"])


def test_direct_lets_go_of_what_ascends_attention_keeps(engine: Engine, report: Any) -> None:
    """The trap: `impl.key_cache` is filled at the first forward pass and never looked at again."""
    from verl_ascend_rollout.worker import kv_cache, kv_references

    runner = engine.worker.model_runner
    before = engine.answers()
    layers = [layer for layer in kv_references.layers(runner).values() if hasattr(layer, "impl")]  # type: ignore[union-attr]
    assert layers and all(layer.impl.key_cache is not None for layer in layers), "the trap is there"
    assert kv_cache.probe(engine.worker, "reallocate").method == "reallocate"
    held = kv_cache.kv_bytes(engine.worker)
    for _ in range(3):
        used = torch.npu.mem_get_info()[0]
        freed = kv_cache.free(engine.worker, "reallocate")
        given_back = torch.npu.mem_get_info()[0] - used
        assert freed.bytes_after == 0
        assert all(layer.impl.key_cache is None for layer in layers)
        made = kv_cache.init(engine.worker, "reallocate")
        assert made.bytes_after == held
        engine.llm.reset_prefix_cache()
        assert engine.answers() == before
    report(f"reallocate, KV cache {held >> 20} MiB in sleep mode's pool", f"{given_back >> 20} MiB given back")


@pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="this stack has no verl: see stacks.toml")
def test_every_order_with_requests_in_flight(checkpoints: list[Checkpoint], tmp_path: Path, report: Any) -> None:
    from fake_npu import toolkit

    environment = {
        **os.environ,
        **toolkit.environment(),
        "VERL_PLATFORM": "npu",
        "FAKE_CANN_DEVICES": "1",
        # Device memory of its own, beside the shared engine's.
        "FAKE_CANN_RUN": "test_kv_lifecycle",
    }
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_ASCEND_ENABLE_NZ"):
        environment.pop(name, None)  # set for the engine in this process; a job must not need them
    script = Path(__file__).resolve().parents[1] / "kv_server.py"
    done = subprocess.run(
        [sys.executable, str(script), str(checkpoints[0].path), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=560,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["kv_release"] == "sleep"
    assert [then for _, then, _ in found["orders"]] == [expected for _, _, expected in found["orders"]]
    assert found["same after orders"]
    for seed, ends in found["storms"].items():
        report(f"storm on an emulated NPU, seed {seed}", f"{ends['completed']} completed, {ends['aborted']} aborted")
        assert ends["completed"] > 0
