"""`ascend-safe bench …` at the prompt."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from verl_ascend_rollout import import_fix
from verl_ascend_rollout.bench import kv
from verl_ascend_rollout.bench.arguments import gib, positive
from verl_ascend_rollout.bench.table import BenchError


def add_parser(commands: Any) -> None:
    """Add `bench` and its sub-commands to the command line."""
    bench = commands.add_parser(
        "bench",
        help="what a weight sync or a KV cache's free and init cost here, beside the alternatives",
        description="Measure on a real engine, each path beside the others and beside the floor, in one run.",
    )
    bench.set_defaults(run=run)
    what = bench.add_subparsers(dest="bench", metavar="WHAT", required=True)
    _add_weights(what)
    kv.add_parser(what)
    for one in what.choices.values():
        import_fix.add_option(one)


def run(arguments: argparse.Namespace) -> int:
    """Run a bench.

    Returns:
        The exit status: 0, or 1 where the bench could not be run to its end.
    """
    try:
        import_fix.begin(arguments)
        if arguments.bench == "kv":
            kv.run(arguments)
        else:
            _run_weights(arguments)
    except (BenchError, import_fix.ImportFixError) as error:
        print(f"ascend-safe: {error}", file=sys.stderr)
        return 1
    return 0


def _add_weights(what: Any) -> None:
    weights = what.add_parser(
        "weights",
        help="a full weight sync: plain copy, verl's sequence, vLLM's reload, ours",
        description="Load the same weights by each path into a real engine with a Qwen2-MoE of the geometry asked for: "
        "Qwen1.5-MoE's 24 layers and 60 experts with widths scaled to the memory there is, if nothing is said.",
    )
    weights.add_argument("--layers", type=positive, default=24, metavar="N")
    weights.add_argument("--experts", type=positive, default=60, metavar="N")
    weights.add_argument("--gib", type=gib, metavar="X", help="size of the weights; widths follow")
    exact = weights.add_argument_group("exact widths, instead of --gib")
    for width in ("hidden", "moe-intermediate", "shared-intermediate", "vocabulary"):
        exact.add_argument(f"--{width}", type=positive, metavar="N")
    weights.add_argument(
        "--repeats",
        type=positive,
        default=5,
        metavar="N",
        help="syncs of each kind, each beside a plain copy; the median counts",
    )
    weights.add_argument("--json", metavar="FILE", help="write the rows as JSON")
    weights.add_argument("--plot", metavar="FILE", help="draw them")


def _run_weights(arguments: argparse.Namespace) -> None:
    import dataclasses

    from verl_ascend_rollout.bench import weights

    names = ("hidden", "moe_intermediate", "shared_intermediate", "vocabulary")
    widths = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    size = int(arguments.gib * 2**30) if arguments.gib else None
    geometry = weights.fitting_geometry(size, arguments.layers, arguments.experts)
    request = weights.Request(dataclasses.replace(geometry, **widths), arguments.repeats)
    rows, facts = weights.run(request)
    weights.report(rows, facts, arguments.json, arguments.plot)
