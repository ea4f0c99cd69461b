"""Cases of test_field_bugs.py that need an engine of their own:  field_bug_cases.py CASE FOLDER OUT.json"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch_npu
from toy_engine import EXTENSION, Checkpoint, Engine, make_checkpoint, make_llm, make_qwen3_checkpoint

from verl_ascend_rollout.platforms.detect import detect
from verl_ascend_rollout.policy import engine_args

FRACTAL_NZ = 29
"""aclFormat (CANN, acl_base.h)."""


def stale_router(folder: Path) -> dict[str, Any]:
    old, new = (make_qwen3_checkpoint(folder / f"model{seed}", seed) for seed in (0, 1))
    engine = ours(old)
    gates = [module for name, module in engine.model.named_modules() if name.endswith("mlp.gate")]

    def stale() -> bool:
        return not all(torch.equal(gate.weight_fp32.data, gate.weight.data.float()) for gate in gates)

    if not any(hasattr(gate, "weight_fp32") for gate in gates):
        return {"has_fp32_copy": False}
    # Router and attention only: for these a plain load passes in every release.
    router = [(name, tensor) for name, tensor in new.tensors() if name.endswith("mlp.gate.weight")]
    engine.model.load_weights(iter(router))
    found: dict[str, Any] = {"has_fp32_copy": True, "stock_copy_is_stale": stale()}
    mixed = mixture(old, dict(router))
    found["stock_gap"] = mixed.gap(engine.answers())
    engine.call("ascend_safe_reload_from_disk", str(new.path))
    found["our_copy_is_stale"] = stale()
    found["our_gap"] = new.gap(engine.answers())
    return found


def mixture(base: Checkpoint, changed: dict[str, torch.Tensor]) -> Checkpoint:
    """The base checkpoint's reference with some tensors replaced: what the engine should have become."""
    state = base.reference.state_dict()
    with torch.no_grad():
        for name, tensor in changed.items():
            state[name].copy_(tensor)
    return base


def nz(folder: Path) -> dict[str, Any]:
    os.environ["VLLM_ASCEND_ENABLE_NZ"] = "2"
    checkpoint = make_checkpoint(folder / "model", 0)
    engine = ours(checkpoint, additional_config={"weight_nz_mode": 2})
    found: dict[str, Any] = {"policy": refusal({"VLLM_ASCEND_ENABLE_NZ": "2"}, {"weight_nz_mode": 2})}
    formats = {torch_npu.get_npu_format(parameter.data) for parameter in engine.model.parameters()}
    found["weights_in_nz"] = FRACTAL_NZ in formats
    found["sync"] = message_of(lambda: engine.call("ascend_safe_reload_from_disk", str(checkpoint.path)))
    engine.llm.sleep(level=1)
    found["stock"] = message_of(lambda: engine.llm.wake_up(tags=["weights"]))
    return found


def expandable_segments(folder: Path) -> dict[str, Any]:
    setting = "expandable_segments:True"
    os.environ["PYTORCH_NPU_ALLOC_CONF"] = setting
    checkpoint = make_checkpoint(folder / "model", 0)
    return {
        "policy": refusal({"PYTORCH_NPU_ALLOC_CONF": setting}),
        "stock": message_of(lambda: make_llm(checkpoint.path)),
    }


def ours(checkpoint: Checkpoint, **changes: Any) -> Engine:
    engine = Engine(make_llm(checkpoint.path, worker_extension_cls=EXTENSION, **changes))
    engine.call("ascend_safe_configure", kv_release="auto", weight_path="by_layout", verify="always")
    return engine


def refusal(environ: dict[str, str], additional_config: dict[str, Any] | None = None) -> str:
    """What the policy says to such an environment, and to such settings of vllm-ascend."""
    request = engine_args.EngineRequest(environ=environ, engine_kwargs={"additional_config": additional_config or {}})
    return message_of(lambda: engine_args.decide(detect({"VERL_PLATFORM": "npu"}), request))


def message_of(action: Any) -> str:
    """The message of the error that an action raises; empty where it raises none."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


CASES = {case.__name__: case for case in (stale_router, nz, expandable_segments)}


if __name__ == "__main__":
    case, folder, out = sys.argv[1:]
    found = CASES[case](Path(folder))
    Path(out).write_text(json.dumps(found))
    # The engine's own end takes seconds, and there is nothing to keep.
    sys.stdout.flush()
    os._exit(0)
