"""What both sides know of tensors: names of dtypes, alignment, checksums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import xxhash

ALIGNMENT = 64
"""Bytes: where a piece may start in a bucket.  A cache line, and a multiple of every dtype's size."""

_NAMES = (
    "bool",
    "uint8",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
)

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _NAMES if hasattr(torch, name)}
"""What weights are made of, by torch's name for it; float8_e8m0fnu since torch 2.7."""

NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Summary:
    """What a weight sync moved.

    Attributes:
        tensors: how many.
        bytes: of all of them.
        seconds: from the connection to the last tensor's arrival.
        checksum: xxh3-64 of the tensors' own checksums in the order of the stream, as 16 hexadecimal digits; `None`
            where none were taken.
    """

    tensors: int
    bytes: int
    seconds: float
    checksum: str | None


class RunningChecksum:
    """The checksums of a stream: of each tensor, whose bytes may come in several pieces, and of all of them.

    xxh3-64, because it is as fast as memory (measured on two cores of a cloud machine: 3.4 to 6.7 GB/s, where zlib's
    crc32 does 1.7 and a warm copy 4.2).  It finds accidents; it is no defence against somebody who wants a collision.
    """

    def __init__(self) -> None:
        self._all = xxhash.xxh3_64()
        self._tensor = xxhash.xxh3_64()

    def add(self, piece: torch.Tensor) -> None:
        """Take in a piece's bytes: a contiguous uint8 tensor on the CPU."""
        self._tensor.update(piece.numpy().data)

    def end_tensor(self) -> int:
        """Return the checksum of the tensor whose last piece was just taken in."""
        digest = int(self._tensor.intdigest())
        self._tensor.reset()
        self._all.update(digest.to_bytes(8, "big"))
        return digest

    def of_all(self) -> int:
        """Return the checksum of all tensors' checksums so far."""
        return int(self._all.intdigest())


def aligned(offset: int) -> int:
    """Return the first offset from `offset` on at which a piece may start."""
    return -(-offset // ALIGNMENT) * ALIGNMENT
