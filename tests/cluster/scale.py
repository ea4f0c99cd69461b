"""What moving weights on a node costs by tensors, bytes and workers: measured on this machine, with a model fitted.

    python tests/cluster/scale.py [--mib 128] [--json FILE]

A sender and N receivers of the real transport, in processes of their own; each copies its N-th of every tensor,
as a worker of TP N does.  Engines have no part in it: `ascend-safe bench weights` measures what loading costs a worker.
Nor has gathering the tensors, which is the trainer's, and gloo's here.

What counts is the processor time of each side's thread, which hardly depends on what else runs on the machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from verl_ascend_rollout.transport.receiver import NamedTensor, receive_weights
from verl_ascend_rollout.transport.sender import WeightSender

BUCKET_BYTES = 16 * 2**20
REPEATS = 3
TENSORS = 400
"""As many as a model of 24 layers with merged experts has; ten times as many are looked at beside them."""

CONTEXT = multiprocessing.get_context("spawn")


def receiver(rank: int, ranks: int, tensors: int, size: int, name: str, ready: Any, out: Any) -> None:
    """One worker: copies its part of every tensor, and says how long it took."""
    torch.set_num_threads(1)
    part = size // tensors // ranks
    kept = torch.zeros(part * tensors, dtype=torch.uint8)

    def load(weights: list[NamedTensor]) -> None:
        for weight, tensor in weights:
            number = int(weight.rpartition(".")[2])
            kept[number * part : (number + 1) * part].copy_(tensor[rank * part : (rank + 1) * part])

    for repeat in range(REPEATS + 1):
        ready.wait()
        used = time.thread_time()
        receive_weights(f"{name}-{repeat}", load, rank=rank, copy=False)
        out.put((repeat, time.thread_time() - used))
    assert int(kept[-1]) == (tensors - 1) % 251


def measure(ranks: int, tensors: int, size: int) -> dict[str, float]:
    """Return the least of the repeats after the first, in seconds, of the sender and of a receiver: what else runs here
    only adds."""
    out, ready = CONTEXT.Queue(), CONTEXT.Barrier(ranks + 1)
    name = f"scale-{time.monotonic_ns()}"
    workers = [
        CONTEXT.Process(target=receiver, args=(rank, ranks, tensors, size, name, ready, out)) for rank in range(ranks)
    ]
    for worker in workers:
        worker.start()
    weights = [torch.full((size // tensors,), number % 251, dtype=torch.uint8) for number in range(tensors)]
    sent = []
    for repeat in range(REPEATS + 1):
        ready.wait()
        with WeightSender(receivers=ranks, bucket_bytes=BUCKET_BYTES, name=f"{name}-{repeat}") as sender:
            sender.connect()
            used = time.thread_time()
            for number, tensor in enumerate(weights):
                sender.send(f"weight.{number}", tensor)
            sender.finish()
            sent.append(time.thread_time() - used)
    found = [out.get(timeout=300) for _ in range(ranks * (REPEATS + 1))]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    received = min(seconds for repeat, seconds in found if repeat)
    return {
        **{"ranks": ranks, "tensors": tensors, "gib": size / 2**30},
        **{"send": min(sent[1:]), "receive": received},
    }


def fit(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Fit `a + b tensors + c GiB + d tensors ranks + e GiB ranks` to each side: least squares, no term below zero."""
    terms = ("constant", "tensor", "gib", "tensor_rank", "gib_rank")
    table = numpy.array([[1, r["tensors"], r["gib"], r["tensors"] * r["ranks"], r["gib"] * r["ranks"]] for r in rows])
    models = {}
    for what in ("send", "receive"):
        values = numpy.array([row[what] for row in rows])
        found, kept = numpy.zeros(len(terms)), list(range(len(terms)))
        while True:
            # Relative errors count: the small runs would not matter otherwise.
            fitted = numpy.linalg.lstsq(table[:, kept] / values[:, None], numpy.ones(len(values)), rcond=None)[0]
            if fitted.min() >= 0:
                found[kept] = fitted
                break
            del kept[int(fitted.argmin())]
        worst = max(abs(table @ found / values - 1))
        models[what] = {**dict(zip(terms, map(float, found), strict=True)), "worst_relative_error": float(worst)}
    return models


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how moving weights on a node grows.")
    parser.add_argument("--mib", type=int, default=128, help="bytes of the larger set of weights")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # Else a thread that waits for the other counts as busy.
    torch.set_num_threads(1)
    rows = []
    for ranks in (1, 2, 4, 8):
        for tensors in (TENSORS, 10 * TENSORS):
            for mib in (options.mib // 4, options.mib):
                rows.append(measure(ranks, tensors, mib * 2**20))
                print("  ".join(f"{key} {value:.4g}" for key, value in rows[-1].items()), flush=True)
    models = fit(rows)
    for what, model in models.items():
        print(what, "  ".join(f"{term} {value:.3g}" for term, value in model.items()))
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "models": models}, indent=1))


if __name__ == "__main__":
    main()
