"""What a stream of weights is made of: named tensors, some of them slices of a layer's merged experts.

A slice goes through a bucket that does not hold all experts.  A tensor larger than a bucket would be put together again
by the receiver, in a buffer of its size: more than a plain copy of it, and on a device memory that nobody has planned
for.  A slice of whole experts is loaded from the bucket.
"""

from __future__ import annotations

import re

import torch

NamedTensor = tuple[str, torch.Tensor]
"""A weight on its way, with the name that the stream has for it; several are `weights`, from trainer to parameter."""

_SLICE = re.compile(r"(?P<name>.+)\[(?P<first>\d+):(?P<stop>\d+)\]")


def slice_name(name: str, first: int, stop: int) -> str:
    """Return the name under which the experts from `first` up to `stop` of the merged tensor `name` travel."""
    return f"{name}[{first}:{stop}]"


def parse_slice_name(name: str) -> tuple[str, int, int] | None:
    """Return the merged tensor's name, the first expert and the one after the last; `None` for the name of a whole
    tensor."""
    found = _SLICE.fullmatch(name)
    return (found["name"], int(found["first"]), int(found["stop"])) if found else None
