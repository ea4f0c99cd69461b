"""The form of the weight streams of Megatron trainers: names in their order, dtypes and shapes.

    python megatron_stream.py

records them again, in `megatron_streams.json`, from what `megatron_trainer.py` makes of each model with one and two
tensor and expert parallel ranks.  Needs megatron-core and mbridge: `make megatron`.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from checkpoint_pair import Tensors, make_pair
from families import BY_NAME
from loaded_model import NamedTensor

HERE = Path(__file__).resolve().parent
RECORD = HERE / "megatron_streams.json"
TRAINERS = tuple((family, tp, ep) for family in ("qwen3_moe", "qwen2_moe") for tp in (1, 2) for ep in (1, 2))
"""Model, tensor parallel ranks, expert parallel ranks."""

Form = list[str]
"""A line for each tensor of a stream: name, dtype, shape."""


def form(stream: list[NamedTensor]) -> Form:
    """The form of a stream."""
    return [f"{name} {str(t.dtype).removeprefix('torch.')} {'x'.join(map(str, t.shape))}" for name, t in stream]


def rebuilt(lines: Form, tensors: Tensors) -> list[NamedTensor]:
    """A stream of a form, with the values of a checkpoint."""
    stream = []
    for line in lines:
        name, dtype, shape = line.split()
        stream.append((name, tensors[name].to(getattr(torch, dtype)).reshape([int(size) for size in shape.split("x")])))
    return stream


def recorded(family: str, tp: int, ep: int) -> Form:
    """The form of the stream of one trainer."""
    streams = json.loads(RECORD.read_text())["streams"]
    return next(stream["tensors"] for stream in streams if _title(family, tp, ep) in stream["trainers"])


def trained(checkpoint: Path, tp: int, ep: int) -> list[NamedTensor]:
    """The stream of a Megatron trainer that has loaded a checkpoint.

    Raises:
        RuntimeError: the trainer failed; with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "stream.pt"
        command = [sys.executable, str(HERE / "megatron_trainer.py"), str(checkpoint), str(out)]
        done = subprocess.run([*command, "--tp", str(tp), "--ep", str(ep)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        return list(torch.load(out))


def _title(family: str, tp: int, ep: int) -> str:
    return f"{family} tp={tp} ep={ep}"


def main() -> None:
    streams: list[dict[str, list[str]]] = []
    with tempfile.TemporaryDirectory() as folder:
        pairs = {family: make_pair(BY_NAME[family], Path(folder) / family) for family, _, _ in TRAINERS}
        for family, tp, ep in TRAINERS:
            lines = form(trained(pairs[family].a.folder, tp, ep))
            same = next((stream for stream in streams if stream["tensors"] == lines), None)
            if same is None:
                same = {"trainers": [], "tensors": lines}
                streams.append(same)
            same["trainers"].append(_title(family, tp, ep))
    versions = {name: importlib.metadata.version(name) for name in ("megatron-core", "mbridge", "verl")}
    RECORD.write_text(json.dumps({"made by": versions, "streams": streams}, indent=1) + "\n")


if __name__ == "__main__":
    main()
