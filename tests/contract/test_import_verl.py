"""Contract: verl loads us by itself, through its entry points, as soon as anybody imports it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys


def test_importing_verl_registers_and_says_so_once() -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("VERL_USE_", "ASCEND_SAFE_"))}
    with subprocess.Popen(
        [sys.executable, "-c", "import verl"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ
    ) as process:
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert output.count("ascend_safe") == 1, output
    (line,) = [line for line in output.splitlines() if "ascend_safe" in line]
    version = re.escape(importlib.metadata.version("verl"))
    assert re.match(
        rf"INFO:.*:verl_ascend_rollout \S+ registered in process {process.pid} \(python -c\) with verl {version}: "
        r".*rollout ascend_safe",
        line,
    ), line
