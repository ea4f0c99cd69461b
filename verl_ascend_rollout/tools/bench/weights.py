"""`ascend-safe bench weights`: what a weight sync costs, beside a plain copy of the same bytes and beside the others.

One real engine on this machine, with a Qwen2-MoE of a geometry that the user names, and one set of random weights
beside it.  No transport is in these figures: the weights lie in the worker's memory, as in a transport's bucket.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from verl_ascend_rollout import __version__
from verl_ascend_rollout.platforms.detect import detect
from verl_ascend_rollout.tools.arguments import UsageError
from verl_ascend_rollout.tools.bench import engine as engines
from verl_ascend_rollout.tools.bench import table
from verl_ascend_rollout.tools.bench.table import BenchError, Column
from verl_ascend_rollout.tools.toy_model import Geometry, scaled_to

WIDTHS = ("hidden", "moe_intermediate", "shared_intermediate", "vocabulary")
"""Fields of `Geometry` that the command line may set."""

KV_BYTES = 64 << 20
PROMPT = list(range(5, 37))

MOST_BYTES = 4 << 30
"""What is taken by itself: two layers of Qwen1.5-MoE with all of its vocabulary are 3.4 GiB."""

COPIES = 5
"""Sets of weights that have to fit: the engine's, the source, the plain copy's target, and room for the others."""

COLUMNS = (
    Column("path", "path"),
    Column("tensors", "tensors", ","),
    Column("copies", "copies", ","),
    Column("seconds", "seconds", ".3f"),
    Column("gb_per_second", "GB/s", ".2f"),
    Column("ratio", "x plain copy", ".2f"),
    Column("peak_extra_bytes", "peak extra MiB", ".0f", 1 / 2**20),
)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, and write what was asked for.

    Raises:
        BenchError: the weights do not fit.
        UsageError: a file cannot be written, or no such model can be that small.
    """
    size = int(arguments.gib * 2**30) if arguments.gib else None
    geometry = fitting_geometry(size, arguments.layers, arguments.experts)
    widths = {name: getattr(arguments, name) for name in WIDTHS if getattr(arguments, name) is not None}
    if arguments.threads:
        # vLLM takes all processors but one by itself (0.28, v1/worker/cpu_worker.py).
        processors = sorted(os.sched_getaffinity(0))[: arguments.threads]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, processors))
    report(*measure(dataclasses.replace(geometry, **widths), arguments.repeats), arguments)


def fitting_geometry(size: int | None, layers: int | None, experts: int) -> Geometry:
    """Qwen1.5-MoE with as many layers as fit into memory, or with widths that are scaled to `size` bytes.

    Args:
        size: bytes; with it, the widths follow and the layers do not.
        layers: how many; by default those that fit, or with a size those of Qwen1.5-MoE.
        experts: of each layer.

    Raises:
        BenchError: it does not fit into this machine's memory.
        UsageError: no model of so many layers and experts is that small.
    """
    available = int(psutil.virtual_memory().available)
    if size is None:
        room = min(MOST_BYTES, available // COPIES)
        depths = [layers] if layers else range(Geometry.layers, 0, -1)
        deep = (dataclasses.replace(Geometry(), layers=depth, experts=experts) for depth in depths)
        geometry = next(found for found in deep if found.bytes() <= room or found.layers == (layers or 1))
    else:
        try:
            geometry = scaled_to(size, layers or Geometry.layers, experts)
        except ValueError as error:
            raise UsageError(f"{error}: ask for fewer with --layers or --experts, or for more with --gib") from None
    wanted = size or geometry.bytes()
    if wanted * COPIES > available:
        raise BenchError(
            f"{wanted / 2**30:.2f} GiB of weights are wanted {COPIES} times, and {available / 2**30:.2f} GiB of memory "
            "are available: ask for less with --gib"
        )
    return geometry


def measure(geometry: Geometry, repeats: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Start the engine and measure `repeats` syncs of each kind, each right after a plain copy; the median counts.

    Returns:
        The rows (`path`, `tensors`, `copies`, `seconds`, `gb_per_second`, `ratio`, `peak_extra_bytes`, `error`), and
        the facts beside them.
    """
    with tempfile.TemporaryDirectory(prefix="ascend-safe-bench-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(geometry.config()), encoding="utf-8")
        print(f"starting an engine of {geometry.bytes() / 2**30:.2f} GiB", file=sys.stderr)
        engine = engines.start(folder, KV_BYTES, max_model_len=geometry.positions)
        configuration = {"kv_release": "keep", "weight_path": "by_layout", "verify": "first"}
        engine.collective_rpc("ascend_safe_configure", kwargs=configuration)

        def call(method: str, *arguments: Any) -> Any:
            return engines.call(engine, method, *arguments)

        made = call("bench_prepare", list(geometry.tensors(merged=True)))
        # In the order in which the rows are shown; those of verl and vLLM come last, since they leave the engine wrong.
        plain = call("bench_load", "plain_copy", repeats)
        measured: dict[str, Any] = {"plain_copy": plain, "verl": {}, "vllm_reload": {}}
        for kind, merged in (("", False), ("_merged", True)):
            measured[f"ours_first{kind}"] = call("bench_load", "ours_first", repeats, merged)
            always = call("bench_load", "ours_later", repeats, merged, "always")
            measured[f"ours_later{kind}"] = call("bench_load", "ours_later", repeats, merged)
        ours = _answer(engine)
        for path, times in (("vllm_reload", repeats), ("verl", 1)):
            found = measured[path] = call("bench_load", path, times)
            if found["error"] is None and _answer(engine) != ours:
                found["error"] = "none was raised, and the engine answers differently than after our sync"
    rows = [row(path, found, made["bytes"]) for path, found in measured.items()]
    facts = {
        "verl_ascend_rollout": __version__,
        "versions": detect().versions,
        "geometry": dataclasses.asdict(geometry),
        **made,
        "verify_always": row("ours_later_merged", always, made["bytes"]),
    }
    return rows, facts


def report(rows: list[dict[str, Any]], facts: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Show the rows, and write and draw them where that is asked for."""
    title = (
        f"Weight sync of {facts['bytes'] / 2**30:.2f} GiB in {facts['tensors']} tensors "
        f"({facts['device']}, {facts['threads']} threads)"
    )
    table.show(title, COLUMNS, rows)
    for found in rows:
        if found["error"] is not None:
            print(f"{found['path']}: {found['error']}")
    always = facts["verify_always"]
    if always["ratio"] is not None:
        print(f"with verify: always a later sync takes {always['seconds']:.3f} s, {always['ratio']:.2f} x plain copy")
    bars = {found["path"]: found["ratio"] for found in rows if found["ratio"] is not None}
    table.write(arguments, rows, facts, title, "times a plain copy of the same bytes", bars, floor=1.0)


def row(path: str, found: dict[str, Any], size: int) -> dict[str, Any]:
    """Return a row of what was measured of `size` bytes."""
    seconds = found["seconds"]
    speed = size / seconds / 1e9 if seconds else None
    counts = {name: found.get(name) for name in ("tensors", "copies")}
    rest = {name: found[name] for name in ("ratio", "peak_extra_bytes", "error")}
    return {"path": path, **counts, "seconds": seconds, "gb_per_second": speed, **rest}


def _answer(engine: Any) -> Any:
    """Generate greedy tokens and their log-probs for one prompt."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=8, detokenize=False, ignore_eos=True, logprobs=0)
    (output,) = engine.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    return tokens, [step[token].logprob for token, step in zip(tokens, completion.logprobs, strict=True)]
