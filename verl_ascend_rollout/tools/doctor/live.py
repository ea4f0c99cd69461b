"""`--live`: what only an import can tell.

Each probe runs in a child process with a time limit, so that an import that crashes or hangs is a finding and not the
end of the doctor.  The last one starts an engine: `ascend-safe smoke` on its toy model.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, NamedTuple

from verl_ascend_rollout.tools.doctor.checks import failed, passed, tried
from verl_ascend_rollout.tools.report import Check
from verl_ascend_rollout.tools.supervisor import TICK, Follower
from verl_ascend_rollout.tools.terminal import PHASE, Progress, console

SECONDS = 180.0
"""How long one import may take: torch_npu and vLLM together take tens of seconds on a cold disk."""

NOTHING = "nothing was printed"


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
    """Run the probes whose package is there, and say on standard error which one is at work."""
    progress = Progress(console(stderr=True))
    try:
        for probe in PROBES:
            if probe.package in packages:
                progress.phase(probe.name)
                yield _run(probe, cwd, probe.seconds or seconds, progress)
    finally:
        progress.close()


def _run(probe: Probe, cwd: Path, seconds: float, progress: Progress) -> Check:
    started, timed_out = time.perf_counter(), False
    command = [sys.executable, "-c", probe.program]
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as errors:
        following = Follower(Path(f"/dev/fd/{printed.fileno()}"))
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=printed, stderr=errors, cwd=cwd) as child:
            while not timed_out:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(TICK)
                    break
                for phase in filter(None, map(PHASE.match, following.read())):  # of smoke's
                    progress.phase(f"{probe.name}: {phase[1]}")
                progress.tick(seconds)
                timed_out = time.perf_counter() - started > seconds
            if timed_out:
                child.kill()
        said, complaints = (_lines(stream) for stream in (printed, errors))
    if timed_out:
        advice = "an import that waits is often one for a device that another process holds, or for a network folder"
        check = failed(probe.name, f"did not end within {seconds:.0f} s", advice, tried(probe.program))
    elif child.returncode == 0:
        check = passed(probe.name, said[-1] if said else NOTHING, tried(probe.program))
    else:
        lines = complaints or said or [NOTHING]
        how = f"ended with signal {-child.returncode}" if child.returncode < 0 else "failed"
        advice = f"run it to see all of it: python -c {probe.program!r}"
        check = failed(probe.name, f"{how}: {lines[-1]}", advice, *map(tried, lines[-4:]))
    return replace(check, seconds=time.perf_counter() - started)


def _lines(stream: IO[bytes]) -> list[str]:
    stream.seek(0)
    return stream.read().decode("utf-8", "replace").strip().splitlines()
