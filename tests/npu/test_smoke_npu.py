"""`ascend-safe smoke` as a user runs it, on the emulated NPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from verl_ascend_rollout.tools.report import read
from verl_ascend_rollout.tools.smoke.measured import Smoke

pytestmark = pytest.mark.engine

SECONDS = 500


def test_the_toy_passes_every_check_and_the_stand_in_is_named(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "verl_ascend_rollout.tools.smoke",
        "--tiny",
        "--max-tokens",
        "16",
        "--repeats",
        "1",
    ]
    done = subprocess.run(
        [*command, "--out", str(tmp_path), "--timeout", str(SECONDS)],
        capture_output=True,
        text=True,
        timeout=SECONDS + 60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    report = read(tmp_path / "smoke.json")
    verdicts = {check.name: check.verdict for check in report.checks}
    assert verdicts.pop("log.warnings") in ("pass", "warn")
    assert set(verdicts.values()) == {"pass"}, done.stdout
    assert {"kv-cache.free-init", "weights.reload", "sleep.wake", "output.reference"} < set(verdicts)
    facts = Smoke.of(report)
    assert facts.platform is not None and facts.engine is not None
    assert facts.platform.name == "npu"
    assert facts.platform.stand_in == "a stand-in CANN (fake_cann, on host memory)"
    assert facts.engine.moe_backend is not None and facts.engine.moe_backend.startswith("Ascend")
    assert report.title.startswith("vLLM inference verification") and facts.platform.stand_in in report.title
    assert "on an Ascend NPU" not in report.title
    markdown = (tmp_path / "smoke.md").read_text()
    assert "**No Ascend hardware was used.**" in markdown
    assert facts.platform.stand_in in done.stdout
