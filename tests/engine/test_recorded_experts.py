"""vLLM's records of routing with prefix caching and preemption: whole, and what transformers' routers pick."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engine_settings import ENGINE

pytestmark = pytest.mark.engine

BLOCKS = 14
"""Of 32 tokens: eight requests need four each."""

BYTES_OF_A_BLOCK = 32 * 2 * 2 * 64 * 2
"""Of the toy: tokens, layers, keys and values, width, bf16."""


def test_records_are_whole_and_right_where_the_prefix_cache_and_preemption_had_a_hand_in_them(
    checkpoints: tuple[Any, Any], tmp_path: Path
) -> None:
    shared = [5 + (7 * place) % 80 for place in range(70)]
    settings = {
        "engine": {
            **ENGINE,
            "kv_cache_memory_bytes": BLOCKS * BYTES_OF_A_BLOCK,
            "enable_return_routed_experts": True,
            "disable_log_stats": False,
        },
        "sampling": {"temperature": 1.0, "seed": 1, "max_tokens": 48, "ignore_eos": True, "detokenize": False},
        "prompts": [[*shared[: 70 - 9 * number], 10 + number] for number in range(8)],
    }
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    script, out = Path(__file__).with_name("routing_engine.py"), tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, str(script), str(checkpoints[0].path), str(tmp_path / "settings.json"), str(out)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["preemptions"] > 0 and found["cached_tokens"] > 0, found
    assert all(rows == prompt + answer - 1 for prompt, answer, rows in found["answers"]), found
    assert found["same"] > 0.95 * found["cells"], found
