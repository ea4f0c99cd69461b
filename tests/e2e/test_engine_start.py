"""A GRPO job whose engine vLLM does not start, for a reason that only the engine's process finds."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest
from killed_engine import job, processes

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

TOO_SMALL = "actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_memory_bytes=4096"


def test_the_last_line_of_a_job_is_why_its_engine_did_not_start(tmp_path: Path) -> None:
    with job(tmp_path / "run", TOO_SMALL, PYTHON=sys.executable, STEPS="1") as running:
        code = running.process.wait(timeout=600)
        lines = running.log.read_text().splitlines()
        time.sleep(3)
        left = processes(running.out)
    print("\n".join(lines[-3:]))
    assert code == 1
    # vLLM 0.28, v1/core/kv_cache_utils.py, in its EngineCore; what it raises in the server is "See root cause above".
    assert re.fullmatch(
        r"ascend_safe: The rollout engine of replica 0 did not start: ValueError: .*max seq len.*; "
        r"what vLLM logged is in /\S+ on \S+",
        lines[-1],
    )
    assert not left
