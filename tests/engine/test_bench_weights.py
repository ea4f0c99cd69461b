"""`ascend-safe bench weights` on a real engine, as a user runs it, at a size that takes a minute."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine


def test_every_path_is_measured_in_one_run(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "verl_ascend_rollout.tools.cli",
        "bench",
        "weights",
        "--layers",
        "2",
        "--experts",
        "8",
    ]
    files = ["--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "rows.png")]
    done = subprocess.run(
        [*command, "--gib", "0.02", "--repeats", "2", *files], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stdout + done.stderr
    rows = {row["path"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    ours = ["ours_first", "ours_later", "ours_first_merged", "ours_later_merged"]
    assert list(rows) == ["plain_copy", "verl", "vllm_reload", *ours]
    assert rows["ours_later"]["tensors"] == rows["ours_later"]["copies"] == 2 * (2 + 7 + 2 + 3 + 8 * 3) + 3
    assert rows["ours_later_merged"]["tensors"] == rows["ours_later_merged"]["copies"] == 2 * (2 + 7 + 2 + 3 + 2) + 3
    for path in ("plain_copy", *ours):
        assert rows[path]["error"] is None
        assert rows[path]["seconds"] > 0
        assert rows[path]["peak_extra_bytes"] >= 0
    # On a CPU: verl's sequence breaks off, and vLLM's reload leaves the experts unpacked.
    assert rows["verl"]["error"]
    assert "answers differently" in rows["vllm_reload"]["error"]
    assert (tmp_path / "rows.png").stat().st_size > 1000
