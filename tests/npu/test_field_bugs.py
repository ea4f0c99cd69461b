"""Bugs of the field, each on the stock code as published and then on ours.

`BUGS` says in which releases of vllm-ascend each is there; a test fails where the table and the release disagree, so
that a bug that is fixed, or comes back, shows.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from toy_engine import TOLERANCE, Checkpoint, Engine

pytestmark = pytest.mark.engine

HERE = Path(__file__).resolve().parent
RELEASE = ".".join(str(part) for part in Version(importlib.metadata.version("vllm-ascend")).release[:2])

BUGS = {
    # NPUWorker.wake_up puts the experts into checkpoint form (#5915, #11548; removed by #13012).
    "wake-up transpose": {"0.13", "0.18", "0.23"},
    # The processed experts are new parameters without `weight_loader` (verl#3840; kept since #13337).
    "lost weight_loader": {"0.11", "0.13", "0.18", "0.23"},
}


def has(bug: str) -> bool:
    return RELEASE in BUGS[bug]


def test_wake_up_transpose(
    engine: Engine, checkpoints: list[Checkpoint], synced: Callable[[Checkpoint], Any], report: Any
) -> None:
    synced(checkpoints[0])
    before = engine.answers()
    engine.llm.sleep(level=1)
    engine.llm.wake_up()
    left = [name for name, weight in expert_weights(engine).items() if not weight.is_contiguous()]
    assert bool(left) == has("wake-up transpose")
    if left:
        # The stock engine goes on with these weights and dies in its first grouped matmul, which is called here by
        # itself on them: the shared engine would not survive it.
        layer = next(module for module in engine.model.modules() if hasattr(module, "w13_weight"))
        with pytest.raises(ValueError, match="columns against"):
            first_matmul(engine, layer.w13_weight.data)
    settled = engine.call("ascend_safe_restore_kernel_format")
    assert sorted(settled) == sorted(left)
    if left:
        assert first_matmul(engine, layer.w13_weight.data).shape[1] == layer.w13_weight.shape[2]
    after = engine.answers()
    report("wake-up without a load, after settling", checkpoints[0].gap(after))
    assert after == before


def test_lost_weight_loader(
    engine: Engine, checkpoints: list[Checkpoint], synced: Callable[[Checkpoint], Any], report: Any
) -> None:
    synced(checkpoints[0])
    _as_the_release_leaves_them(engine)
    new = checkpoints[1]
    stock = AttributeError if has("lost weight_loader") else RuntimeError
    message = "weight_loader" if has("lost weight_loader") else "size"
    with pytest.raises(stock, match=message):
        # vLLM's own way to load new weights into a live engine (its RLHF example, and verl where nothing is patched).
        engine.model.load_weights(iter(new.tensors()))
    synced(new)
    gap = new.gap(engine.answers())
    report("second load where the stock one is refused", gap)
    assert gap < TOLERANCE
    synced(checkpoints[0])


def test_stale_router(tmp_path: Path, report: Any) -> None:
    """A plain load of the router passes without a word; the engine goes on with its old fp32 copy.

    From 0.28 on for every router inside the experts' layer; in 0.23 for DeepSeek-V4 only.
    """
    found = in_a_process_of_its_own("stale_router", tmp_path)
    if not found["has_fp32_copy"]:
        assert Version(RELEASE) < Version("0.28")
        report("stale fp32 router", "no such copy in this release")
        return
    assert found["stock_copy_is_stale"]
    assert found["stock_gap"] > TOLERANCE
    assert not found["our_copy_is_stale"]
    assert found["our_gap"] < TOLERANCE
    report("Qwen3-MoE, plain load of the router (stock)", f"{found['stock_gap']:.4f} (silently wrong)")
    report("Qwen3-MoE, our sync", found["our_gap"])


def test_nz_layout_stops_the_stock_wake_up_and_is_refused_by_our_policy(tmp_path: Path) -> None:
    found = in_a_process_of_its_own("nz", tmp_path)
    assert "FRACTAL_NZ mode is enabled" in found["stock"]
    assert "cannot work in sleep mode, where wake_up refuses weights in NZ layout" in found["policy"]
    # Where the policy was not asked (another launcher), the sync itself refuses.  0.11 leaves bf16 weights in ND.
    assert found["weights_in_nz"] == (RELEASE != "0.11")
    assert ("is no view of the checkpoint's" in found["sync"]) == found["weights_in_nz"]


def test_expandable_segments_stop_the_stock_engine_and_are_refused_by_our_policy(tmp_path: Path) -> None:
    found = in_a_process_of_its_own("expandable_segments", tmp_path)
    assert "xpandable" in found["stock"]
    assert "allocator refuses expandable segments" in found["policy"]


def first_matmul(engine: Engine, weight: torch.Tensor) -> torch.Tensor:
    """The experts' first product, one token for each expert, as vllm-ascend's ops/fused_moe/moe_mlp.py calls it."""
    import torch_npu

    experts = weight.shape[0]
    hidden = engine.worker.vllm_config.model_config.hf_text_config.hidden_size
    tokens = torch.ones(experts, hidden, dtype=weight.dtype, device=weight.device)
    counts = torch.ones(experts, dtype=torch.int64, device=weight.device)
    product: torch.Tensor = torch_npu.npu_grouped_matmul(
        x=[tokens], weight=[weight], split_item=2, group_list_type=1, group_type=0, group_list=counts
    )[0]
    return product


def expert_weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {
        name: parameter.data
        for name, parameter in engine.model.named_parameters()
        if name.endswith(("w13_weight", "w2_weight"))
    }


def _as_the_release_leaves_them(engine: Engine) -> None:
    """Expert parameters as this release's own processing makes them: what we gave back to them is taken away."""
    method = next(m for m in engine.model.modules() if hasattr(m, "w13_weight")).quant_method
    # `replace_parameter` keeps what hangs on a parameter; `torch.nn.Parameter(...)` does not.
    if "replace_parameter" in inspect.getsource(type(method).process_weights_after_loading):
        return
    for module in engine.model.modules():
        for name in ("w13_weight", "w2_weight"):
            if hasattr(module, name):
                setattr(module, name, torch.nn.Parameter(getattr(module, name).data, requires_grad=False))


def in_a_process_of_its_own(case: str, folder: Path, script: str = "field_bug_cases.py") -> dict[str, Any]:
    """Run a case that needs an engine of its own; what it found."""
    out = folder / "found.json"
    done = subprocess.run(
        [sys.executable, str(HERE / script), case, str(folder), str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        # Device memory of its own: the engine of the other tests holds some of the same emulated NPU.
        env={**os.environ, "FAKE_CANN_RUN": case},
    )
    assert out.exists(), done.stdout[-1000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found
