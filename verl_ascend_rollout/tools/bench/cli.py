"""`ascend-safe bench …` at the prompt."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from verl_ascend_rollout import import_fix
from verl_ascend_rollout.tools import terminal
from verl_ascend_rollout.tools.arguments import check_outputs, file_name, gib, positive
from verl_ascend_rollout.tools.bench import kv, table, weights
from verl_ascend_rollout.tools.bench.table import BenchError


def add_parser(commands: Any) -> None:
    """Add `bench` and its sub-commands to the command line."""
    bench = commands.add_parser(
        "bench",
        help="what a weight sync or a KV cache's free and init cost here, beside the alternatives",
        description="Measure on a real engine, each path beside the others and beside the floor, in one run.",
    )
    what = bench.add_subparsers(metavar="WHAT", required=True)
    sync = what.add_parser(
        "weights",
        help="a full weight sync: plain copy, verl's sequence, vLLM's reload, ours",
        description="Load the same weights by each path into a real engine with a Qwen2-MoE of the geometry asked for: "
        "Qwen1.5-MoE's own widths and vocabulary, and as many of its layers as fit, if nothing is said.",
    )
    sync.add_argument("--layers", type=positive, metavar="N")
    sync.add_argument("--experts", type=positive, default=60, metavar="N")
    sync.add_argument("--gib", type=gib, metavar="X", help="size of the weights; widths are scaled down to it")
    exact = sync.add_argument_group("exact widths")
    for width in weights.WIDTHS:
        exact.add_argument(f"--{width.replace('_', '-')}", type=positive, metavar="N")
    sync.add_argument("--threads", type=positive, metavar="N", help="on a CPU: that the worker computes with")
    cache = what.add_parser(
        "kv",
        help="give the KV cache back and take it again, by each method that works here",
        description="Start vLLM on a model with made-up weights and time each way that works here to give the KV "
        "cache's memory back and to take it again, beside allocating and touching as many bytes (the floor).",
    )
    cache.add_argument(
        "--model", type=file_name, metavar="PATH", help="a checkpoint folder; only its config.json is used"
    )
    cache.add_argument("--gib", type=gib, default=1.0, metavar="X", help="size of the KV cache in GiB (1)")
    for parser, run, repeats in ((sync, weights.run, 5), (cache, kv.run, 9)):
        parser.set_defaults(run=_run, bench=run)
        parser.add_argument(
            "--repeats",
            type=positive,
            default=repeats,
            metavar="N",
            help=f"of each step; the median counts ({repeats})",
        )
        parser.add_argument("--json", type=file_name, metavar="FILE", help="write the rows as JSON")
        parser.add_argument(
            "--plot", type=file_name, metavar="FILE", help="draw them; the ending says the format (.png, .svg, .pdf)"
        )
        import_fix.add_option(parser)


def _run(arguments: argparse.Namespace) -> int:
    """Run a bench; the exit status: 0, or 1 where it could not be run to its end.

    Raises:
        UsageError: a file cannot be written, or would overwrite the model's configuration.
        ConfigError: the model has none that can be read.
    """
    model = getattr(arguments, "model", None)
    outputs = {"--json": arguments.json, "--plot": arguments.plot}
    check_outputs(outputs, [Path(model, "config.json")] if model is not None else ())
    try:
        table.check(arguments)
        import_fix.begin(arguments)
        arguments.bench(arguments)
    except (BenchError, import_fix.ImportFixError) as error:
        return terminal.fail(error, 1)
    return 0
