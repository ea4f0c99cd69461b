"""Run the demo on every stack, on a CPU and where there is one on the emulated NPU, and write a table of what came.

    python recipes/grpo_tiny_cpu/all_stacks.py [--steps 6] [--only STACK ...] [--control] [--table]

Each run is `make demo` or `make npu-demo` with that STACK, which set their environments up themselves.  After each,
outputs/all-stacks.json and outputs/all-stacks.md are written again from every summary.json that lies in outputs/: what
was run by hand is in the table too, and `--only` leaves the other rows as they are.  `--control` runs verl's stock
rollout on each as well; its failures are its result.  `--table` runs nothing.

Exit code 0: every run of ours trained.  1: one did not.  2: bad arguments.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    # pytest brings the same, and so does pip, whose import turns setuptools' distutils off.
    tomllib = importlib.import_module("tomli" if importlib.util.find_spec("tomli") else "pip._vendor.tomli")

ROOT = Path(__file__).resolve().parents[2]
OUTPUTS = ROOT / "outputs"
CONTROL_SECONDS = 420
"""After which the stock rollout is given up: where its engine dies in a weight sync, the trainer waits for ever."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    table = tomllib.loads((ROOT / "requirements" / "stacks.toml").read_text(encoding="utf-8"))["stack"]
    parser = argparse.ArgumentParser(description="Run the demo on every stack of requirements/stacks.toml.")
    parser.add_argument("--steps", type=int, default=6, help="training steps of each run (default 6)")
    parser.add_argument("--only", nargs="+", metavar="STACK", choices=list(table), default=list(table))
    parser.add_argument("--control", action="store_true", help="run verl's stock rollout on each as well")
    parser.add_argument("--table", action="store_true", help="run nothing, write the table of what has run")
    options = parser.parse_args(arguments)
    failed = []
    for target, stack, control in [] if options.table else planned(options, table):
        name = folder(target, stack, control)
        (OUTPUTS / name / "summary.json").unlink(missing_ok=True)
        words = ["make", target, f"STACK={stack}", f"STEPS={options.steps}"]
        if control:
            words.append(f"DEMO_ARGS=--rollout vllm --timeout {CONTROL_SECONDS} --out outputs/{name}")
        print(f"== {name}", flush=True)
        status = subprocess.run(words, cwd=ROOT, check=False).returncode
        if status and not control:
            failed.append(name)
        write(list(summaries(table)))
    rows = list(summaries(table))
    write(rows)
    print(markdown(rows))
    if failed:
        print(
            f"all_stacks: these did not train: {', '.join(failed)}; the log is outputs/NAME/train.log", file=sys.stderr
        )
    return 1 if failed else 0


def planned(options: argparse.Namespace, table: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """The runs: make's target, the stack, and whether it is the control."""
    for stack in options.only:
        for target in ("demo", "npu-demo") if "emulator" in table[stack] else ("demo",):
            yield target, stack, False
            if options.control:
                yield target, stack, True


def folder(target: str, stack: str, control: bool) -> str:
    """The folder in outputs/ of a run, as the Makefile names it."""
    return f"{'npu-' if target == 'npu-demo' else ''}{stack}{'-stock' if control else ''}"


def summaries(table: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The summary of every run that has one, with its stack and the device that it was on."""
    for stack in table:
        for target, device in (("demo", "CPU"), ("npu-demo", "emulated NPU")):
            for control in (False, True):
                file = OUTPUTS / folder(target, stack, control) / "summary.json"
                if file.exists():
                    yield {"stack": stack, "device": device, **json.loads(file.read_text(encoding="utf-8"))}


def write(rows: list[dict[str, Any]]) -> None:
    """Write the table, for programs and for people."""
    OUTPUTS.mkdir(exist_ok=True)
    (OUTPUTS / "all-stacks.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    (OUTPUTS / "all-stacks.md").write_text(markdown(rows) + "\n", encoding="utf-8")


COLUMNS = (
    *("stack", "on", "Python", "rollout", "set-up, s", "first step after, s", "steps", "reward", "smallest Pearson"),
    *("freed, MiB", "KV cache restored, MiB", "weight syncs", "date", "problem"),
)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table for people."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(cells(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """One run; - is what was not seen.  Where the engine has sleep mode, what was freed has the weights in it."""
    first, last = row["reward_first"], row["reward_last"]
    freed = row["kv_bytes_freed"] if row["sleep_bytes_freed"] is None else row["sleep_bytes_freed"]
    return (
        row["stack"],
        row["device"],
        row["versions"]["python"],
        row["rollout"],
        number(row["set_up_seconds"], 0),
        number(row["seconds_to_first_step"], 0),
        str(row["steps"]),
        "-" if first is None else f"{first:.3f} to {last:.3f}",
        number(row["pearson_min"], 4),
        number(freed, 0, 2**20),
        number(row["kv_bytes_restored"], 0, 2**20),
        row["sync_paths"] or "-",
        row["date"],
        (row["problem"] or "").replace("|", r"\|"),
    )


def number(value: float | None, digits: int, unit: int = 1) -> str:
    """A measured number in a unit."""
    return "-" if value is None else f"{value / unit:.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
