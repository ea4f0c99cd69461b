"""`ascend-safe bench kv`: how long giving the KV cache back takes, and taking it again, by each rung that works here.

Each engine (with sleep mode where the platform has it, and without) runs in a process of its own, with weights that are
made up: only shapes matter.  The floor is measured between the rungs' own steps in the same process: tensors of the
same sizes, allocated and touched, and let go of again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from verl_ascend_rollout.bench import table
from verl_ascend_rollout.bench.arguments import gib, positive
from verl_ascend_rollout.bench.table import BenchError, Column
from verl_ascend_rollout.platforms.detect import detect
from verl_ascend_rollout.policy import Wishes, decide

ENGINE_SECONDS = 1800
"""For one engine to start and be measured."""

FLOOR, ENGINE = "floor", "engine_sleep"

COLUMNS = (
    Column("rung", "rung"),
    Column("engine", "engine"),
    Column("step", "step"),
    Column("seconds", "median ms", ".1f", 1000),
    Column("slowest_seconds", "slowest ms", ".1f", 1000),
    Column("bytes", "KV cache MiB", ".0f", 2**-20),
    Column("system_bytes", "by the system MiB", ".0f", 2**-20),
    Column("ratio_to_floor", "to floor", ".2f"),
)


@dataclass(frozen=True)
class Geometry:
    """The shape of a KV cache: what a block of it takes, and how much there is.

    Attributes:
        layers: attention layers.
        kv_heads: key and value heads of a layer.
        head_size: elements of a head.
        block_size: tokens in a block.
    """

    layers: int
    kv_heads: int
    head_size: int
    block_size: int

    def config(self) -> dict[str, Any]:
        """The configuration of a Llama of that shape, as Hugging Face writes it; all else is as small as can be."""
        hidden = self.kv_heads * self.head_size
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.kv_heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "vocab_size": 256,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


def add_parser(benches: Any) -> None:
    """Add `kv`."""
    parser = benches.add_parser(
        "kv",
        help="give the KV cache back and take it again, by each rung that works here",
        description="Start vLLM on a model with made-up weights and time each way that works here to give the KV "
        "cache's memory back and to take it again, beside allocating and touching as many bytes (the floor).",
    )
    parser.set_defaults(parser=parser)
    parser.add_argument("--model", metavar="PATH", help="a checkpoint folder; only its config.json is used")
    parser.add_argument("--layers", type=positive, metavar="N", help="attention layers of a made-up model (4)")
    parser.add_argument("--kv-heads", type=positive, metavar="N", help="its key and value heads (2)")
    parser.add_argument("--head-size", type=positive, metavar="N", help="elements of one of its heads (64)")
    parser.add_argument("--block-size", type=positive, default=32, metavar="N", help="tokens in a block (32)")
    parser.add_argument("--gib", type=gib, default=1.0, metavar="X", help="size of the KV cache in GiB (1)")
    parser.add_argument("--repeats", type=positive, default=9, metavar="N", help="times each step is measured (9)")
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw the times; the ending says the format (.png, .svg)")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, and write what was asked for.

    Raises:
        BenchError: an engine did not start, or a file cannot be written.
    """
    shape = (arguments.layers, arguments.kv_heads, arguments.head_size)
    if arguments.model is not None and any(shape):
        arguments.parser.error("--model has a shape of its own: leave out --layers, --kv-heads and --head-size")
    if arguments.model is not None and not (Path(arguments.model) / "config.json").is_file():
        raise BenchError(f"{arguments.model} has no config.json: say --model with a checkpoint's folder")
    geometry = Geometry(arguments.layers or 4, arguments.kv_heads or 2, arguments.head_size or 64, arguments.block_size)
    facts = detect()
    chosen = decide(facts, Wishes(enforce_eager=True, environ=dict(os.environ)))
    engines = [True, False] if chosen["enable_sleep_mode"].value else [False]
    with tempfile.TemporaryDirectory(prefix="ascend-safe-bench-") as folder:
        model = arguments.model
        if model is None:
            model = folder
            (Path(folder) / "config.json").write_text(json.dumps(geometry.config()))
        measured = []
        for sleep_mode in engines:
            decisions = decide(
                facts, Wishes(enforce_eager=True, enable_sleep_mode=sleep_mode, environ=dict(os.environ))
            )
            specification = {
                "model": str(model),
                "bytes": int(arguments.gib * 2**30),
                "block_size": arguments.block_size,
                "repeats": arguments.repeats,
                "sleep_mode": sleep_mode,
                "additional_config": decisions.additional_config,
            }
            measured.append(_engine(folder, specification, decisions.environment))
    rows = [row for engine in measured for row in _rows(engine)]
    first = measured[0]
    title = (
        f"KV cache of {first['kv_bytes'] / 2**20:.0f} MiB on {facts.name}, median of {arguments.repeats}; "
        f"chosen here: {first['chosen']}"
    )
    table.show(title, COLUMNS, rows)
    for sentence in dict.fromkeys(sentence for engine in measured for sentence in engine["obstacles"]):
        print(f"not here: {sentence}")
    if arguments.json:
        about = {
            "platform": facts.name,
            "versions": facts.versions,
            "chosen": first["chosen"],
            "kv_bytes": first["kv_bytes"],
            "repeats": arguments.repeats,
            "geometry": asdict(geometry) if arguments.model is None else {"model": arguments.model},
            "obstacles": [engine["obstacles"] for engine in measured],
        }
        table.write_json(arguments.json, rows, about)
    if arguments.plot:
        several = len(engines) > 1  # then each has a floor of its own
        bars = {
            f"{row['rung']} {row['step']}" + (f" ({row['engine']})" if several else ""): row["seconds"] * 1000
            for row in rows
        }
        table.plot(arguments.plot, title, "milliseconds", bars, None)


def _engine(folder: str, specification: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """Measure one engine in a process of its own."""
    asked, answered = Path(folder) / "asked.json", Path(folder) / "answered.json"
    asked.write_text(json.dumps(specification))
    answered.unlink(missing_ok=True)
    command = [sys.executable, "-m", "verl_ascend_rollout.bench.kv_engine", str(asked), str(answered)]
    try:
        done = subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=ENGINE_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"vLLM was not done after {ENGINE_SECONDS} s: try fewer --repeats or less --gib") from None
    if done.returncode or not answered.exists():
        last = next(
            (line for line in reversed(done.stderr.splitlines()) if "Error" in line), done.stderr.strip()[-300:]
        )
        raise BenchError(f"vLLM did not start on {specification['model']}: {last.strip()}")
    found: dict[str, Any] = json.loads(answered.read_text())
    return found


def _rows(engine: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a rung and step: medians, and the ratio to the floor's median of the same step in the same process."""
    floors = {step: median(_values(engine, FLOOR, step, "seconds")) for step in ("free", "init")}
    rows = []
    for rung in engine["rungs"]:
        for step in ("free", "init"):
            seconds = _values(engine, rung, step, "seconds")
            rows.append(
                {
                    "rung": rung,
                    "step": step,
                    "seconds": median(seconds),
                    "slowest_seconds": max(seconds),
                    "bytes": int(median(_values(engine, rung, step, "bytes"))),
                    "system_bytes": int(median(_values(engine, rung, step, "system_bytes"))),
                    "ratio_to_floor": median(seconds) / floors[step],
                    "engine": "sleep mode" if engine["sleep_mode"] else "no sleep mode",
                }
            )
    return rows


def _values(engine: dict[str, Any], rung: str, step: str, key: str) -> Sequence[float]:
    return [sample[key] for sample in engine["samples"] if (sample["rung"], sample["step"]) == (rung, step)]
