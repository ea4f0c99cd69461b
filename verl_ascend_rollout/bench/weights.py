"""`ascend-safe bench weights`: what a weight sync costs, beside a plain copy of the same bytes and beside the others.

One real engine on this machine, with a Qwen2-MoE of a geometry that the user names, and one set of random weights
beside it.  No transport is in these figures: the weights lie in the worker's memory, as in a transport's bucket.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from verl_ascend_rollout import __version__
from verl_ascend_rollout.bench.table import BenchError, Column, plot, show, write_json
from verl_ascend_rollout.platforms.detect import detect
from verl_ascend_rollout.toy_model import Geometry, scaled_to

WORKER = "verl_ascend_rollout.bench.worker.BenchWorker"

KV_BYTES = 64 << 20
PROMPT = list(range(5, 37))

MOST_BYTES = 2 << 30
COPIES = 5
"""Sets of weights that have to fit: the engine's, the source, the plain copy's target, and room for the others."""

COLUMNS = (
    Column("path", "path"),
    Column("seconds", "seconds", ".3f"),
    Column("gb_per_second", "GB/s", ".2f"),
    Column("ratio", "x plain copy", ".2f"),
    Column("peak_extra_bytes", "peak extra MiB", ".0f", 1 / 2**20),
    Column("error", "what went wrong"),
)


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        geometry: of the model.
        repeats: how many syncs of each kind, each right after a plain copy; the median counts.
    """

    geometry: Geometry
    repeats: int = 5


def fitting_geometry(size: int | None, layers: int, experts: int) -> Geometry:
    """Qwen1.5-MoE with its widths scaled to `size` bytes, or to what fits in this machine's memory.

    Raises:
        BenchError: it does not fit.
    """
    available = int(psutil.virtual_memory().available)
    size = size or min(MOST_BYTES, available // COPIES)
    if size * COPIES > available:
        raise BenchError(
            f"{size / 2**30:.2f} GiB of weights are wanted {COPIES} times, and {available / 2**30:.2f} GiB of memory "
            "are available: ask for less with --gib"
        )
    try:
        return scaled_to(size, layers, experts)
    except ValueError as error:
        raise BenchError(f"{error}: ask for fewer with --layers or --experts, or for more with --gib") from None


def run(request: Request) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Start the engine and measure.

    Returns:
        The rows (`path`, `seconds`, `gb_per_second`, `ratio`, `peak_extra_bytes`, `error`), and the facts beside them.
    """
    with _engine(request.geometry) as engine:

        def call(method: str, *arguments: Any) -> Any:
            return engine.collective_rpc(method, args=arguments)[0]

        made = call("bench_prepare", [(name, list(shape)) for name, shape in request.geometry.tensors()])
        plain = call("bench_plain_copy", request.repeats)
        first = call("bench_ours_first", request.repeats)
        always = call("bench_ours_later", request.repeats, "always")
        later = call("bench_ours_later", request.repeats, "first")
        ours = _answer(engine)
        stock = call("bench_vllm_reload", request.repeats)
        if stock["error"] is None and _answer(engine) != ours:
            stock["error"] = "none was raised, and the engine answers differently than after our sync"
        verl = call("bench_verl", 1)
        if verl["error"] is None and _answer(engine) != ours:
            verl["error"] = "none was raised, and the engine answers differently than after our sync"

    measured = {"plain_copy": plain, "verl": verl, "vllm_reload": stock, "ours_first": first, "ours_later": later}
    rows = [_row(path, found, made["bytes"]) for path, found in measured.items()]
    facts = {
        "verl_ascend_rollout": __version__,
        "versions": detect().versions,
        "geometry": dataclasses.asdict(request.geometry),
        **made,
        "verify_always": _row("ours_later", always, made["bytes"]),
    }
    return rows, facts


def report(rows: list[dict[str, Any]], facts: dict[str, Any], json_file: str | None, picture: str | None) -> None:
    """Show the rows, and write and draw them where that is asked for.

    Raises:
        BenchError: a file cannot be written.
    """
    title = (
        f"Weight sync of {facts['bytes'] / 2**30:.2f} GiB in {facts['tensors']} tensors "
        f"({facts['device']}, {facts['threads']} threads)"
    )
    show(title, COLUMNS, rows)
    always = facts["verify_always"]
    if always["ratio"] is not None:
        print(f"with verify: always a later sync takes {always['seconds']:.3f} s, {always['ratio']:.2f} x plain copy")
    if json_file:
        write_json(json_file, rows, facts)
    if picture:
        plot(
            picture,
            title,
            "times a plain copy of the same bytes",
            {row["path"]: row["ratio"] for row in rows if row["ratio"] is not None},
            floor=1.0,
        )


def _row(path: str, found: dict[str, Any], size: int) -> dict[str, Any]:
    seconds = found["seconds"]
    return {
        "path": path,
        "seconds": seconds,
        "gb_per_second": size / seconds / 1e9 if seconds else None,
        "ratio": found["ratio"],
        "peak_extra_bytes": found["peak_extra_bytes"],
        "error": found["error"],
    }


@contextlib.contextmanager
def _engine(geometry: Geometry) -> Iterator[Any]:
    """A real engine with random weights, that ends with the block."""
    # What vLLM and its processes print belongs to nobody who reads a table.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("ASCEND_SAFE_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_ASCEND_ENABLE_NZ", "0")
    with tempfile.TemporaryDirectory(prefix="ascend-safe-bench-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(geometry.config()), encoding="utf-8")
        print(f"starting an engine of {geometry.bytes() / 2**30:.2f} GiB", file=sys.stderr)
        from vllm import LLM

        engine = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=geometry.positions,
            max_num_seqs=4,
            kv_cache_memory_bytes=KV_BYTES,
            worker_extension_cls=WORKER,
            enable_prefix_caching=False,
        )
        try:
            engine.collective_rpc(
                "ascend_safe_configure", kwargs={"kv_rung": "keep", "weight_path": "by_layout", "verify": "first"}
            )
            yield engine
        finally:
            del engine


def _answer(engine: Any) -> Any:
    """Greedy tokens and their log-probs for one prompt."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=8, detokenize=False, ignore_eos=True, logprobs=0)
    (output,) = engine.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    return tokens, [step[token].logprob for token, step in zip(tokens, completion.logprobs, strict=True)]
