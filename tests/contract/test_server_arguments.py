"""What the policy decided, in the arguments that verl's server hands to vLLM."""

from __future__ import annotations

from typing import Any

import pytest

from verl_ascend_rollout.platforms.detect import planned
from verl_ascend_rollout.policy.engine_args import EngineRequest, ModelFacts, decide

A2 = planned("npu", "A2", {"vllm": "0.18.0", "vllm-ascend": "0.18.0"})
NEWER = planned("npu", "A2", {"vllm": "0.28.0", "vllm-ascend": "0.28.0rc1"})
CUDA = planned("cuda", versions={"vllm": "0.28.0"})
MOE = ModelFacts(layers=24, experts=60)


@pytest.mark.parametrize(
    ("facts", "engine_kwargs", "becomes"),
    [
        (
            A2,
            {"enforce_eager": None, "max_loras": 2},
            {
                "compilation_config": {
                    "cudagraph_mode": "FULL_DECODE_ONLY",
                    "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 192, 256],
                },
                "max_loras": 2,
            },
        ),
        (
            A2,
            {"compilation_config": '{"cudagraph_capture_sizes": [4], "level": 3}', "enable_sleep_mode": True},
            {"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [4], "level": 3}},
        ),
        (
            NEWER,
            {"additional_config": {"refresh": True}},
            {
                "compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"},
                "additional_config": {"weight_nz_mode": 0, "enable_fused_mc2": 0, "refresh": True},
            },
        ),
        (CUDA, {"enforce_eager": True}, {"compilation_config": {"cudagraph_mode": "NONE"}}),
    ],
)
def test_decisions_become_arguments(facts: Any, engine_kwargs: dict[str, Any], becomes: dict[str, Any]) -> None:
    from verl_ascend_rollout.integration.server import AscendSafeHttpServer

    server = object.__new__(AscendSafeHttpServer)
    server.config = None
    server._decisions = decide(facts, EngineRequest(model=MOE, engine_kwargs=engine_kwargs))
    arguments = dict(engine_kwargs)
    server._preprocess_engine_kwargs(arguments)
    assert arguments == becomes


def test_a_toys_kv_cache_on_a_cpu_is_an_argument() -> None:
    from verl_ascend_rollout.integration.server import AscendSafeHttpServer

    server = object.__new__(AscendSafeHttpServer)
    server.config = None
    toy = ModelFacts(layers=2, experts=0, head_size=32, kv_bytes_per_token=1024, positions=512)
    server._decisions = decide(planned("cpu", versions={"vllm": "0.28.0"}), EngineRequest(model=toy))
    arguments: dict[str, Any] = {}
    server._preprocess_engine_kwargs(arguments)
    assert arguments["kv_cache_memory_bytes"] == 129 * 2**20
