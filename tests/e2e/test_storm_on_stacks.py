"""Sleep, wake-up, abort, resume and sync in every order on the real verl and vLLM of older stacks, under requests: each
ends, with the tokens that it has alone.  What the classes of each verl do by themselves is tested with every change
(`test_generations`); this takes minutes a stack.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(1200)]

ROOT = Path(__file__).resolve().parents[2]
STACKS = ("verl0.9.0-vllm0.23", "verl0.8.0-vllm0.18", "verl0.7.1-vllm0.13", "verl0.7.1-vllm0.11")


@pytest.mark.parametrize("stack", STACKS)
def test_any_order_with_requests_in_flight(
    stack: str, load_recipe: Callable[[str], Any], tmp_path: Path, record_property: Any
) -> None:
    python = ROOT / f".venv-{stack}" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"the stack is not here: make .venv-{stack}/.ready")
    load_recipe("make_tiny").make_model(tmp_path / "model", 0)
    # Before 0.22 a CPU's vLLM takes its KV cache from that variable alone, in GiB.
    environment = {**os.environ, "VERL_PLATFORM": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [python, ROOT / "tests" / "kv_server.py", tmp_path / "model", tmp_path],
        capture_output=True,
        text=True,
        timeout=1100,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert stack.startswith(f"verl{found['versions']['verl']}-")
    assert [then for _, then, _ in found["orders"]] == [expected for _, _, expected in found["orders"]]
    assert found["same after orders"]
    assert all(ends["completed"] > 0 for ends in found["storms"].values())
    line = f"storm on {stack}: {found['storms']}, by {found['kv_release']}"
    record_property("measured", line)
    print(line)
