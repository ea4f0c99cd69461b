"""Routing replay (R3) against none: the same toy job twice, and how far trainer and rollout are apart in each.

    python recipes/routing_replay/ab.py [--steps 3] [--out outputs/r3] [--timeout 900] [--tp 2] [SETTING ...]

The toy is the demo's with six layers, experts that count (`norm_topk_prob`, large down projections), and weights that
are no longer small, so that a token that is routed otherwise has another probability.  Each run is the demo's run.sh
(recipes/grpo_tiny_cpu); its log, metrics and events are in OUT/without and OUT/with.  `--tp 2` trains on two devices,
and the engine is over both.

OUT/summary.json has, each as a list with a value for every step: `pearson_without`, `pearson_with` (of both sides'
probabilities of the generated tokens), `k3_kl_without`, `k3_kl_with`, `probs_diff_without`, `probs_diff_with` (the mean
difference of the probabilities), and `cells` (recorded tokens times layers) with `cells_that_differed` (in how many the
trainer's router would have picked other experts).  Also `seconds_per_step_without`, `seconds_per_step_with` (means, the
first step left out), `bytes_per_sample` of record in the trainer's batches, and `versions`.  OUT/routing_replay.png
shows the first four.

Exit code 0: with replay the two sides are closer at every step, by a factor of ten in k3 KL, and correlate to 0.995 or
more.  1: they do not, or a run failed; a sentence says which.  2: bad arguments.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from verl_ascend_rollout import events
from verl_ascend_rollout.tools import toy_checkpoint
from verl_ascend_rollout.tools.supervisor import supervise
from verl_ascend_rollout.tools.toy_model import Geometry

TINY = Path(__file__).resolve().parent.parent / "grpo_tiny_cpu"

GEOMETRY = Geometry(
    layers=6,
    hidden=64,
    head_size=32,
    moe_intermediate=32,
    shared_intermediate=128,
    vocabulary=toy_checkpoint.VOCABULARY,
    positions=256,
)
INIT_STD = 0.1
EXPERTS_SCALE = 4.0
LEARNING_RATE = 3e-4
"""A tenth of the demo's, with which the toy would soon say one thing only, on which both sides agree."""

TOP_K = 4
BYTES_OF_AN_EXPERT = 2
"""int16 (verl 0.9.1, experimental/agent_loop/agent_loop.py:131)."""

METRICS = {
    "pearson": "training/rollout_actor_probs_pearson_corr",
    "k3_kl": "rollout_corr/k3_kl",
    "probs_diff": "training/rollout_probs_diff_mean",
}
STEP_SECONDS = "timing_s/step"

PEARSON_WANTED = 0.995
K3_FACTOR = 10.0

ARMS = {"without": "False", "with": "True"}


def tiny(name: str) -> ModuleType:
    """Load a script of the tiny recipe, which is a folder and no package."""
    spec = importlib.util.spec_from_file_location(f"tiny_{name}", TINY / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def make_toy(folder: Path, seed: int = 0) -> None:
    """Write the toy whose routing counts, and the demo's data, to `folder`."""
    from safetensors.torch import load_file, save_file

    model = folder / "model"
    toy_checkpoint.write(model, GEOMETRY, seed, INIT_STD, rough=True)
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if ".experts." in name and "down_proj" in name:
            tensor *= EXPERTS_SCALE
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**config, "norm_topk_prob": True}, indent=2), encoding="utf-8")
    tiny("make_tiny").make_data(folder, seed, train=1024, val=16)


def summarise(out: Path, versions: Mapping[str, str | None]) -> dict[str, Any]:
    """Return the content of summary.json, of what both runs have written; see the module's docstring."""
    summary: dict[str, Any] = {}
    demo = tiny("demo")
    for arm in ARMS:
        steps = demo.read_steps((out / arm / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        for name, metric in METRICS.items():
            summary[f"{name}_{arm}"] = [step.value(metric) for step in steps]
        later = [step.value(STEP_SECONDS) for step in steps[1:]]
        summary[f"seconds_per_step_{arm}"] = round(sum(later) / len(later), 2) if later else None
    passes = log_prob_passes(events.read(out / "with" / "events.jsonl"))
    summary["cells"] = [one["cells"] for one in passes]
    summary["cells_that_differed"] = [one["differed"] for one in passes]
    samples, tokens = (sum(one[name] for one in passes) for name in ("sequences", "all_tokens"))
    summary["bytes_per_sample"] = round(tokens * GEOMETRY.layers * TOP_K * BYTES_OF_AN_EXPERT / samples)
    return {**summary, "versions": dict(versions)}


def log_prob_passes(seen: Iterable[Mapping[str, Any]]) -> list[dict[str, int]]:
    """Return what each step's log-probability pass found: sums over the trainer's ranks, of which each has written."""
    ranks: dict[int, list[dict[str, int]]] = {}
    for event in seen:
        found = event.get("detail") or {}
        if event["step"] == "routing" and found["pass"] == "log_prob":
            counts = {name: int(found[name]) for name in ("cells", "differed", "sequences")}
            counts["all_tokens"] = int(found["tokens"] + found["native"])
            ranks.setdefault(event["pid"], []).append(counts)
    return [{name: sum(one[name] for one in step) for name in step[0]} for step in zip(*ranks.values(), strict=False)]


def verdict(summary: Mapping[str, Any], steps: int) -> str | None:
    """Say in one sentence what is not as it should be; `None` where all is."""
    for name in ("pearson_without", "pearson_with", "k3_kl_without", "k3_kl_with", "cells"):
        if len(summary[name]) != steps or None in summary[name]:
            return f"{name} is {summary[name]}, and {steps} steps should each have a value"
    pairs = zip(summary["cells"], summary["cells_that_differed"], strict=True)
    if not all(0 < differed < cells for cells, differed in pairs):
        return f"of {summary['cells']} cells {summary['cells_that_differed']} differed: the toy shows nothing"
    for number, (pearson, kl, before) in enumerate(
        zip(summary["pearson_with"], summary["k3_kl_with"], summary["k3_kl_without"], strict=True), start=1
    ):
        if pearson < PEARSON_WANTED:
            return f"with replay the probabilities correlate to {pearson:.4f} at step {number}, below {PEARSON_WANTED}"
        if kl * K3_FACTOR > before:
            return f"at step {number} the k3 KL is {kl:.6f} with replay and {before:.6f} without: a tenth is wanted"
    return None


def plot(summary: Mapping[str, Any], file: Path) -> None:
    """Draw correlation and KL of both runs to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(ncols=2, figsize=(9, 3.5), layout="constrained")
    for axis, name, label in zip(axes, ("pearson", "k3_kl"), ("Pearson, probabilities", "k3 KL"), strict=True):
        for arm, color in zip(ARMS, ("tab:orange", "tab:blue"), strict=True):
            values = summary[f"{name}_{arm}"]
            axis.plot(range(1, len(values) + 1), values, marker="o", color=color, label=f"{arm} replay")
        axis.set(xlabel="step", title=f"{label}, trainer against rollout")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
    axes[1].set_yscale("log")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a toy mixture of experts with and without routing replay.")
    parser.add_argument("--steps", type=int, default=3, help="training steps of each run, 2 to 128 (default 3)")
    parser.add_argument("--out", type=Path, default=Path("outputs/r3"), help="folder for all output")
    parser.add_argument("--timeout", type=float, default=900, help="seconds after which to give a run up (default 900)")
    parser.add_argument("--tp", type=int, choices=(1, 2), default=1, help="devices, and the engine's tensor parallel")
    parser.add_argument("settings", nargs="*", metavar="SETTING", help="for verl, as on its own command line")
    options = parser.parse_args(arguments)
    if not 2 <= options.steps <= 128:
        parser.error(f"--steps {options.steps}: it must be 2 to 128")
    if options.timeout <= 0:
        parser.error(f"--timeout {options.timeout}: it must be more than 0 seconds")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out}: no folder can be made there ({error.strerror})")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    out = options.out.resolve()
    for name in ("summary.json", "routing_replay.png"):
        (out / name).unlink(missing_ok=True)
    for name in ("toy", *ARMS):
        shutil.rmtree(out / name, ignore_errors=True)
    os.environ.pop("RAY_ADDRESS", None)
    make_toy(out / "toy")
    demo = tiny("demo")
    for arm, replayed in ARMS.items():
        folder = out / arm
        folder.mkdir()
        log = folder / "train.log"
        print(f"{options.steps} steps {arm} routing replay; log: {log}", flush=True)
        settings = [
            f"actor_rollout_ref.rollout.enable_rollout_routing_replay={replayed}",
            f"actor_rollout_ref.actor.optim.lr={LEARNING_RATE}",
            *options.settings,
        ]
        variables = {
            "PYTHONUNBUFFERED": "1",
            "PYTHON": sys.executable,
            "OUT": str(folder),
            "TOY": str(out / "toy"),
            "STEPS": str(options.steps),
            "DEVICES": str(options.tp),
            "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl"),
        }
        ended = supervise(["bash", str(TINY / "run.sh"), *settings], log, variables, options.timeout)
        if ended.signal:
            print("ab: stopped; everything that it had started was ended", file=sys.stderr)
            return 130
        if not ended.well:
            said = log.read_text(encoding="utf-8", errors="replace")
            print("\n".join(demo.log_tail(said)), file=sys.stderr)
            print(f"ab: the run {arm} replay failed: {demo.last_error(said) or 'see above'}; {log}", file=sys.stderr)
            return 1
    summary = summarise(out, demo.versions())
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    for name, value in summary.items():
        print(f"  {name:28}{value}")
    try:
        plot(summary, out / "routing_replay.png")
        drawn = "and routing_replay.png"
    except ImportError:
        drawn = "(no picture: pip install matplotlib)"
    print(f"  written                     {out / 'summary.json'} {drawn}")
    problem = verdict(summary, options.steps)
    if problem:
        print(f"ab: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
