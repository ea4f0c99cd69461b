"""`--live`: what only an import can tell.

Each probe runs in a child process with a time limit, so that an import that crashes or hangs is a finding and not the
end of the doctor.  The last one starts an engine: `ascend-safe smoke` on its toy model.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from verl_ascend_rollout.report import Check, Evidence

SECONDS = 180.0
"""How long one import may take: torch_npu and vLLM together take tens of seconds on a cold disk."""


@dataclass(frozen=True)
class Probe:
    """Something to run in a process of its own.

    Attributes:
        name: of the check.
        package: the top-level package that it takes; without it the probe is left out.
        program: what `python -c` is given; what it prints last is shown.
        seconds: how long it may take; `None`: as long as an import.
    """

    name: str
    package: str
    program: str
    seconds: float | None = None


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
        "import verl; from verl_ascend_rollout import plugin; print('registered:', '; '.join(plugin._registered)); "
        "raise SystemExit(not plugin._registered)",
    ),
    # Its own time limit ends first, and with it everything that it started.
    Probe(
        "live.smoke",
        "vllm",
        "import sys, tempfile; from verl_ascend_rollout.smoke import main; sys.stderr = sys.stdout\n"
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
    started = time.perf_counter()
    try:
        answer = subprocess.run(
            [sys.executable, "-c", probe.program],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return Check(
            probe.name,
            "fail",
            f"did not end within {seconds:.0f} s",
            (Evidence("probe", probe.program),),
            risk="high",
            advice="an import that waits is often one for a device that another process holds, or for a network folder",
            seconds=time.perf_counter() - started,
        )
    took = time.perf_counter() - started
    lines = (answer.stdout if answer.returncode == 0 else answer.stderr or answer.stdout).strip().splitlines()
    last = lines[-1] if lines else "nothing was printed"
    if answer.returncode == 0:
        return Check(probe.name, "pass", last, (Evidence("probe", probe.program),), risk="high", seconds=took)
    how = f"ended with signal {-answer.returncode}" if answer.returncode < 0 else "failed"
    return Check(
        probe.name,
        "fail",
        f"{how}: {last}",
        tuple(Evidence("probe", line) for line in lines[-4:]),
        risk="high",
        advice=f"run it to see all of it: python -c {probe.program!r}",
        seconds=took,
    )
