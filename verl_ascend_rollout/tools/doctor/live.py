"""`--live`: what only an import can tell.

Each probe runs in a child process with a time limit, so that an import that crashes or hangs is a finding and not the
end of the doctor.  The last one starts an engine: `ascend-safe smoke` on its toy model.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from verl_ascend_rollout.tools.doctor.checks import failed, passed, tried
from verl_ascend_rollout.tools.report import Check

SECONDS = 180.0
"""How long one import may take: torch_npu and vLLM together take tens of seconds on a cold disk."""


class Probe(NamedTuple):
    """Something to run in a process of its own."""

    name: str  # of the check
    package: str  # the top-level package that it takes; without it the probe is left out
    program: str  # what `python -c` is given; what it prints last is shown
    seconds: float | None = None  # how long it may take; `None`: as long as an import


PROBES: list[Probe] = [
    Probe("live.torch", "torch", "import torch; print('torch', torch.__version__)"),
    Probe(
        "live.torch_npu",
        "torch_npu",
        "import torch, torch_npu; print('torch_npu', torch_npu.__version__, 'devices', torch.npu.device_count())",
    ),
    Probe("live.vllm", "vllm", "from vllm import LLM, SamplingParams; import vllm; print('vllm', vllm.__version__)"),
    Probe("live.vllm_ascend", "vllm_ascend", "import vllm_ascend; print('vllm_ascend')"),
    Probe("live.verl", "verl", "import verl; print('verl', verl.__version__)"),
    Probe(
        "live.registered",
        "verl",
        "import verl; from verl_ascend_rollout.integration.registration import registered; "
        "print('registered:', '; '.join(registered)); raise SystemExit(not registered)",
    ),
    # Its own time limit ends first, and with it everything that it started.
    Probe(
        "live.smoke",
        "vllm",
        "import sys, tempfile; from verl_ascend_rollout.tools.smoke.__main__ import main; sys.stderr = sys.stdout\n"
        "with tempfile.TemporaryDirectory() as out: status = main(['--tiny', '--timeout', '540', '--out', out])\n"
        "raise SystemExit(status)",
        600.0,
    ),
]


def check_live(packages: Mapping[str, Path], cwd: Path, seconds: float = SECONDS) -> Iterator[Check]:
    """Run the probes whose package is there."""
    for probe in PROBES:
        if probe.package in packages:
            yield _run(probe, cwd, probe.seconds or seconds)


def _run(probe: Probe, cwd: Path, seconds: float) -> Check:
    started, command = time.perf_counter(), [sys.executable, "-c", probe.program]
    try:
        answer = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        advice = "an import that waits is often one for a device that another process holds, or for a network folder"
        check = failed(probe.name, f"did not end within {seconds:.0f} s", advice, tried(probe.program))
    else:
        lines = (answer.stdout if answer.returncode == 0 else answer.stderr or answer.stdout).strip().splitlines()
        last = lines[-1] if lines else "nothing was printed"
        how = f"ended with signal {-answer.returncode}" if answer.returncode < 0 else "failed"
        advice = f"run it to see all of it: python -c {probe.program!r}"
        check = failed(probe.name, f"{how}: {last}", advice, *map(tried, lines[-4:]))
        if answer.returncode == 0:
            check = passed(probe.name, last, tried(probe.program))
    return replace(check, seconds=time.perf_counter() - started)
