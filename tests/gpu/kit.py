#!/usr/bin/env python3
"""The GPU kit: this project's checks on a bare machine with one Hopper GPU, within minutes.

    kit.py fetch --wheels DIR [--small] [--part-mib N] [--have NAME ...]    on a machine with a network
    kit.py run [--wheels DIR] [--out DIR] [--minutes 12] [--only STEP ...]   on the machine with the GPU
    kit.py run --rehearse                                                    on a CPU, as far as a CPU goes

The machine has Linux on x86-64, Python 3.12, torch 2.11.0 (CUDA 13) and transformers 5; `fetch` makes a folder with
vLLM 0.24.0, verl 0.9.1 and what they need beside.  Bring the folder there, in one piece or part by part, and this
repository.  Without --wheels, `run` takes the Python that it is started with as it is.

Each step runs in a process of its own with a time limit of its own; OUT/summary.json is written after each, and each
has its log.  Exit status: 0, all passed (a rehearsal: all that there is on a CPU); 1, a step failed, or there was no
time left for it; 2, a usage error.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import kit_steps
import kit_wheels
from kit_steps import Context, Step
from kit_wheels import MIB, KitError

HOPPER = 90
BRING_SECONDS = 240
REHEARSAL_FACTOR = 8
"""By how much slower than a GPU machine two cores may be."""

SIGTERM_SECONDS = 10.0
"""How long a step that is out of time may take to end by itself."""

ORPHAN_SECONDS = 5.0
"""How long a process that a step left may take to end, after each signal."""

PASSED, FAILED, TIMED_OUT, NOT_RUN, LEFT_OUT = "passed", "failed", "timed out", "not run", "left out"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        return status
    except KitError as error:
        print(f"kit.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"kit.py: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    fetch = commands.add_parser("fetch", help="make the folder of wheels; needs a network and pip")
    fetch.set_defaults(run=_fetch)
    fetch.add_argument("--wheels", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    fetch.add_argument(
        "--small",
        action="store_true",
        help="compress further, and keep of vLLM's device code only what a Hopper GPU takes; minutes",
    )
    fetch.add_argument("--part-mib", type=_count, metavar="N", help="sort it into folders of at most N MiB each")
    fetch.add_argument(
        "--have", nargs="*", default=[], metavar="NAME", help="packages that the machine has already, and keeps"
    )
    bring = commands.add_parser("bring", help="only install the wheels, into --venv")
    bring.set_defaults(run=_bring)
    bring.add_argument("--wheels", type=Path, required=True, metavar="DIR")
    bring.add_argument("--venv", type=Path, required=True, metavar="DIR", help="is made anew")
    run = commands.add_parser("run", help="run the checks")
    run.set_defaults(run=_run)
    run.add_argument("--wheels", type=Path, metavar="DIR", help="the folder that fetch made; its parts may lie in it")
    run.add_argument("--out", type=Path, default=Path("outputs/gpu-kit"), metavar="DIR", help="for all output")
    run.add_argument("--minutes", type=_minutes, metavar="N", help="for everything (12; a rehearsal: no limit)")
    run.add_argument("--rehearse", action="store_true", help="on this machine's CPU, as far as that goes")
    names = [step.name for step in kit_steps.steps(Context(Path(sys.executable), Path(), False))]
    for option, meaning in (("only", "run nothing else"), ("skip", "leave out")):
        run.add_argument(
            f"--{option}", nargs="+", default=[], choices=names, metavar="STEP", help=f"{meaning}: {', '.join(names)}"
        )
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of MiB from 2 on")
    return int(text)


def _minutes(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes above 0")
    return number


def _fetch(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    part = arguments.part_mib * MIB if arguments.part_mib else None
    wheels = kit_wheels.fetch(arguments.wheels, arguments.have, HOPPER if arguments.small else None, part)
    parts = len(list(arguments.wheels.glob("part-*")))
    for wheel in sorted(wheels, key=lambda one: -one.bytes)[:8]:
        print(f"{wheel.bytes / MIB:8.1f} MiB  {wheel.name}")
    total = sum(wheel.bytes for wheel in wheels) / MIB
    where = f"{parts} parts in {arguments.wheels}" if parts else str(arguments.wheels)
    print(f"{total:8.1f} MiB  {len(wheels)} wheels: {where}, in {time.monotonic() - started:.0f} s")
    return 0


def _bring(arguments: argparse.Namespace) -> int:
    kit_wheels.check_machine()
    wheels = kit_wheels.gather(arguments.wheels, arguments.venv.with_name(f"{arguments.venv.name}-joined"))
    print(kit_wheels.install(wheels, arguments.venv))
    return 0


# --------------------------------------------------------------------------------------------------------------------
# run


def _run(arguments: argparse.Namespace) -> int:
    if not arguments.rehearse and not a_gpu_is_here():
        raise KitError("the driver (libcuda.so.1) shows no GPU here: run this on a machine with one, or say --rehearse")
    if arguments.wheels is not None:
        kit_wheels.check_machine()
        if not any(arguments.wheels.rglob(kit_wheels.LIST)):
            raise KitError(f"--wheels {arguments.wheels}: no {kit_wheels.LIST} is there; make the folder with fetch")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    context = Context(Path(sys.executable), out, arguments.rehearse)
    context.environment = kit_steps.environment(arguments.rehearse, os.environ)
    limit = arguments.minutes * 60 if arguments.minutes else None if arguments.rehearse else 720.0
    run = Run(context, limit)
    become_subreaper()
    try:
        if arguments.wheels is not None:
            run.bring(arguments.wheels)
        for step in kit_steps.steps(context):
            if (not arguments.only or step.name in arguments.only) and step.name not in arguments.skip:
                run.step(step)
    except KeyboardInterrupt:
        print("kit.py: stopped; what was found so far is kept", file=sys.stderr)
        run.stopped = True
    finally:
        end_descendants()
        run.write()
    print("\n".join(run.lines()))
    return run.status()


class Run:
    """The outcomes so far, on disk after each."""

    def __init__(self, context: Context, limit: float | None) -> None:
        self.context, self.limit = context, limit
        self.started = time.monotonic()
        self.outcomes: list[dict[str, Any]] = []
        self.stopped = False

    def left(self) -> float:
        return float("inf") if self.limit is None else self.limit - (time.monotonic() - self.started)

    def bring(self, wheels: Path) -> None:
        """Install the wheels, and go on with the Python that has them; a rehearsal goes on with its own."""
        venv = self.context.out / "venv"
        kit = str(Path(__file__).resolve())
        command = [sys.executable, kit, "bring", "--wheels", str(wheels.resolve()), "--venv", str(venv)]
        done = self.step(Step("bring", BRING_SECONDS, lambda context, seconds: command))
        if done["outcome"] == PASSED:
            self.context.brought = venv / "bin" / "python"
        if self.context.brought and not self.context.rehearse:
            self.context.python = self.context.brought
            self.context.environment["PATH"] = kit_steps.path_with(self.context.python)

    def step(self, step: Step) -> dict[str, Any]:
        """Run one step to its end or its limit, and note what came of it."""
        seconds = step.seconds * (REHEARSAL_FACTOR if self.context.rehearse else 1)
        outcome: dict[str, Any] = {"step": step.name, "limit": round(min(seconds, self.left()), 1), "seconds": 0.0}
        failed_to_bring = self.outcomes and self.outcomes[0]["step"] == "bring" and not self.context.brought
        if failed_to_bring and not self.context.rehearse:
            outcome.update(outcome=NOT_RUN, error="the wheels could not be installed")
        elif reason := step.left_out(self.context):
            outcome.update(outcome=LEFT_OUT, error=reason)
        elif self.left() < 10:
            outcome.update(outcome=NOT_RUN, error="no time was left")
        else:
            print(
                f"[{time.monotonic() - self.started:6.1f} s] {step.name}: at most {outcome['limit']:.0f} s", flush=True
            )
            self._supervise(step, outcome)
        self.outcomes.append(outcome)
        self.write()
        return outcome

    def _supervise(self, step: Step, outcome: dict[str, Any]) -> None:
        folder = self.context.place(step.name)
        log = folder / "log.txt"
        command = step.command(self.context, int(outcome["limit"]))
        started = time.monotonic()
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=self.context.environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                process.wait(outcome["limit"])
                outcome["outcome"] = PASSED if process.returncode == 0 else FAILED
            except subprocess.TimeoutExpired:
                outcome["outcome"] = TIMED_OUT
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(SIGTERM_SECONDS)
            finally:
                # An engine that outlives its step would hold the memory that the next one needs.
                outcome["ended"] = end_descendants()
        outcome["seconds"] = round(time.monotonic() - started, 1)
        outcome["log"] = str(log.relative_to(self.context.out))
        outcome["figures"] = figures = step.figures(folder)
        problem = figures.pop("error", None)
        if outcome["outcome"] == PASSED and problem:
            outcome["outcome"] = FAILED
        if outcome["outcome"] != PASSED:
            outcome["error"] = problem or (kit_steps.last_lines(log, 1) or ["it printed nothing"])[0]
            print("\n".join(f"    {line}" for line in kit_steps.last_lines(log)), flush=True)
        print(f"    {outcome['outcome']} after {outcome['seconds']} s", flush=True)

    def status(self) -> int:
        good = all(outcome["outcome"] in (PASSED, LEFT_OUT) for outcome in self.outcomes)
        return 0 if good and not self.stopped else 1

    def write(self) -> None:
        stack = next((one.get("figures", {}) for one in self.outcomes if one["step"] == "stack"), {})
        summary = {
            "rehearsal": self.context.rehearse,
            "seconds": round(time.monotonic() - self.started, 1),
            "limit": self.limit,
            "stack": stack,
            "status": self.status(),
            "steps": self.outcomes,
        }
        scratch = self.context.out / "summary.json.new"
        scratch.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        scratch.replace(self.context.out / "summary.json")

    def lines(self) -> list[str]:
        """The summary for a reader."""
        stack = next((one.get("figures", {}) for one in self.outcomes if one["step"] == "stack"), {})
        names = ("vllm", "verl", "torch", "transformers", "python")
        versions = ", ".join(f"{name} {stack.get(name)}" for name in names if stack.get(name))
        where = "rehearsal on a CPU" if self.context.rehearse else stack.get("device") or "no GPU was seen"
        lines = ["", f"GPU kit, {where}: {versions}", ""]
        for outcome in self.outcomes:
            seconds = f"{outcome['seconds']:7.1f} s of {outcome['limit']:5.0f}"
            said = outcome.get("error") or _brief(outcome.get("figures", {}))
            lines.append(f"{outcome['step']:<18} {outcome['outcome']:<12} {seconds}  {said[:160]}")
        counts = {
            word: sum(one["outcome"] == word for one in self.outcomes)
            for word in (PASSED, FAILED, TIMED_OUT, NOT_RUN, LEFT_OUT)
        }
        said = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
        lines.append(
            f"\n{said or 'nothing was run'} in "
            f"{time.monotonic() - self.started:.0f} s; {self.context.out / 'summary.json'}"
        )
        return lines


def _brief(figures: dict[str, Any]) -> str:
    """The plain figures of a step in one line."""
    shown = []
    for name, value in figures.items():
        if isinstance(value, float):
            shown.append(f"{name} {value:.4g}")
        elif isinstance(value, int | str) and not isinstance(value, bool):
            shown.append(f"{name} {value}")
        elif isinstance(value, dict) and isinstance(value.get("seconds"), float):
            shown.append(
                f"{name} {value['seconds']:.3g} s" + (f" ({value['ratio']:.2f}x)" if value.get("ratio") else "")
            )
    return ", ".join(shown)


# --------------------------------------------------------------------------------------------------------------------
# the machine and its processes


def a_gpu_is_here() -> bool:
    """Whether CUDA's driver shows a device to this process."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def become_subreaper() -> None:
    """Make every orphan below this process its own child (prctl, Linux), so that none outlives its step unseen."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def descendants() -> list[int]:
    """The living processes below this one, from /proc: psutil may not be there."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError, ValueError, IndexError):
                state, parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
                if state != "Z":
                    children.setdefault(int(parent), []).append(int(entry.name))
    found, ahead = [], [os.getpid()]
    while ahead:
        below = children.get(ahead.pop(), [])
        found += below
        ahead += below
    return found


def end_descendants() -> int:
    """End every process below this one: those that are left after a moment by SIGTERM, then by SIGKILL.

    Returns:
        How many did not end by themselves.
    """
    deadline = time.monotonic() + 2
    while descendants() and time.monotonic() < deadline:
        time.sleep(0.1)
    left = descendants()
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in descendants():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        deadline = time.monotonic() + ORPHAN_SECONDS
        while descendants() and time.monotonic() < deadline:
            time.sleep(0.1)
    # Orphans that became ours are ours to bury.
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return len(left)


if __name__ == "__main__":
    sys.exit(main())
