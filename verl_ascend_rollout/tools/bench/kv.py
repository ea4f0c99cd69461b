"""`ascend-safe bench kv`: how long giving the KV cache back takes, and taking it again, by each method that works here.

Each engine (with sleep mode where the platform has it, and without) runs in a process of its own, with weights that are
made up: only shapes matter.  The floor is measured between the methods' own steps in the same process: tensors of the
same sizes, allocated and touched, and let go of again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from verl_ascend_rollout.engine.causes import root_error
from verl_ascend_rollout.platforms.detect import detect
from verl_ascend_rollout.policy.engine_args import EngineRequest, decide
from verl_ascend_rollout.policy.job_config import ConfigError, read_model_config
from verl_ascend_rollout.tools.bench import engine as engines
from verl_ascend_rollout.tools.bench import table
from verl_ascend_rollout.tools.bench.table import BenchError, Column
from verl_ascend_rollout.tools.supervisor import supervise
from verl_ascend_rollout.tools.toy_model import Geometry

ENGINE_SECONDS = 1800
"""For one engine to start and be measured."""

MADE_UP = Geometry(layers=4, experts=4, hidden=128, moe_intermediate=64, shared_intermediate=64, vocabulary=256)

FLOOR, ENGINE = "floor", "engine_sleep"
STEPS = ("free", "init")

COLUMNS = (
    Column("rung", "method"),
    Column("engine", "engine"),
    Column("step", "step"),
    Column("seconds", "median ms", ".1f", 1000),
    Column("slowest_seconds", "slowest ms", ".1f", 1000),
    Column("bytes", "KV cache MiB", ".0f", 2**-20),
    Column("system_bytes", "by the system MiB", ".0f", 2**-20),
    Column("ratio_to_floor", "to floor", ".2f"),
)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, and write what was asked for.

    Raises:
        BenchError: an engine did not start.
        ConfigError: the model has no configuration that can be read.
        UsageError: a file cannot be written.
    """
    model = arguments.model
    if model is not None:
        try:
            read_model_config(Path(model))
        except ConfigError as error:
            raise ConfigError(f"--model {error}") from None
    facts = detect()
    request = EngineRequest(enforce_eager=True, environ=dict(os.environ))
    several = bool(decide(facts, request)["enable_sleep_mode"].value)
    measured = []
    with tempfile.TemporaryDirectory(prefix="ascend-safe-bench-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MADE_UP.config()))
        for sleep_mode in (True, False) if several else (False,):
            decisions = decide(facts, dataclasses.replace(request, enable_sleep_mode=sleep_mode))
            asked = {
                "model": str(model or folder),
                "bytes": int(arguments.gib * 2**30),
                "repeats": arguments.repeats,
                "sleep_mode": sleep_mode,
                "additional_config": decisions.additional_config,
            }
            measured.append(_engine(folder, asked, decisions.environment))
    rows = [row for engine in measured for row in _rows(engine)]
    chosen, size = measured[0]["chosen"], measured[0]["kv_bytes"]
    median_of = f"median of {arguments.repeats}; chosen here: {chosen}"
    title = f"KV cache of {size / 2**20:.0f} MiB on {facts.name}, {median_of}"
    table.show(title, COLUMNS, rows)
    for sentence in dict.fromkeys(sentence for engine in measured for sentence in engine["obstacles"]):
        print(f"not here: {sentence}")
    about = {
        "platform": facts.name,
        "versions": facts.versions,
        "chosen": chosen,
        "kv_bytes": size,
        "repeats": arguments.repeats,
        "geometry": {"model": model} if model else vars(MADE_UP),
        "obstacles": [engine["obstacles"] for engine in measured],
    }
    bars = {
        # Of several engines each has a floor of its own.
        f"{row['rung']} {row['step']}" + (f" ({row['engine']})" if several else ""): row["seconds"] * 1000
        for row in rows
    }
    table.write(arguments, rows, about, title, "milliseconds", bars)


def _engine(folder: str, asked: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """Measure one engine in a process of its own.

    Raises:
        BenchError: it did not come to its end.
    """
    answer, log = Path(folder) / "answered.json", Path(folder) / "engine.log"
    answer.unlink(missing_ok=True)
    log.write_bytes(b"")
    command = [sys.executable, "-m", "verl_ascend_rollout.tools.bench.kv", json.dumps(asked), str(answer)]
    ended = supervise(command, log, environment, ENGINE_SECONDS)
    if ended.signal:
        raise BenchError("stopped")
    if ended.timed_out:
        raise BenchError(f"vLLM was not done after {ENGINE_SECONDS} s: try fewer --repeats or less --gib")
    if not ended.well or not answer.exists():
        printed = log.read_text(errors="replace")
        told = root_error(printed.splitlines()) or printed.strip()[-300:] or f"its process ended with {ended.status}"
        raise BenchError(f"vLLM did not start on {asked['model']}: {told}")
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def _rows(engine: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row a method and step: medians, and the ratio to the floor's median of the same step and process."""

    def values(rung: str, step: str, key: str) -> list[float]:
        return [sample[key] for sample in engine["samples"] if (sample["rung"], sample["step"]) == (rung, step)]

    return [
        {
            "rung": rung,
            "step": step,
            "seconds": median(seconds := values(rung, step, "seconds")),
            "slowest_seconds": max(seconds),
            "bytes": int(median(values(rung, step, "bytes"))),
            "system_bytes": int(median(values(rung, step, "system_bytes"))),
            "ratio_to_floor": median(seconds) / median(values(FLOOR, step, "seconds")),
            "engine": "sleep mode" if engine["sleep_mode"] else "no sleep mode",
        }
        for rung in engine["rungs"]
        for step in STEPS
    ]


def measure(asked: dict[str, Any]) -> dict[str, Any]:
    """Start an engine in this process, and return what `_rows` takes."""
    sleeps = asked["sleep_mode"]
    extra = {"additional_config": asked["additional_config"], "enable_sleep_mode": sleeps}
    extra = {name: value for name, value in extra.items() if value}
    llm = engines.start(asked["model"], asked["bytes"], max_model_len=256, max_num_batched_tokens=256, **extra)
    found = engines.call(llm, "bench_kv_methods")
    # Dropped, they would go back to sleep mode's pool, and new ones would not come from it.
    rungs = [rung for rung in found["rungs"] if not (sleeps and rung == "reallocate")]
    samples = []
    engines.call(llm, "bench_kv_floor")  # the first pass pays for what is done once
    for _ in range(asked["repeats"]):
        samples += engines.call(llm, "bench_kv_floor")
        for rung in rungs:
            samples += engines.call(llm, "bench_kv_cycle", rung)
        if sleeps:  # vLLM's own: the weights go and come as well
            for step, act in zip(STEPS, (lambda: llm.sleep(level=1), llm.wake_up), strict=True):
                before, started = engines.call(llm, "bench_system_bytes"), time.perf_counter()
                act()
                seconds = time.perf_counter() - started
                moved = abs(engines.call(llm, "bench_system_bytes") - before)
                samples.append(sample(ENGINE, step, seconds, moved, moved))
    return {**found, "rungs": [FLOOR, *rungs, *[ENGINE] * sleeps], "samples": samples, "sleep_mode": sleeps}


def sample(rung: str, step: str, seconds: float, size: int, system: int) -> dict[str, Any]:
    """Return what was measured once; sizes in bytes, by our count and by the system's."""
    return {"rung": rung, "step": step, "seconds": seconds, "bytes": size, "system_bytes": system}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(measure(json.loads(sys.argv[1]))))
