"""A copy of the weights of the last sync in host memory, from which an engine that is made again takes them.

The trainer's worker writes it while it sends, so it is whole also where the engine dies in the middle.  It is a memfd:
nothing of it has a name, and it ends with the last process that holds it.  What lies where goes by message
(`Snapshot`), with a checksum of each tensor: a reader takes nothing that it cannot prove.
"""

from __future__ import annotations

import math
import mmap
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from verl_ascend_rollout.transport.messages import ProtocolError, TransportError
from verl_ascend_rollout.transport.tensors import DTYPES, NAMES, RunningChecksum, aligned

BUCKET_BYTES = 16 * 2**20
"""How much a reader hands over at once; the next tensor may go beyond."""


@dataclass(frozen=True)
class Snapshot:
    """A set of weights, whole.

    Attributes:
        path: of the memory, below /proc; as long as the process that holds it lives.
        sync: the number of the weight sync that brought them.
        bytes: of all tensors.
        seconds: that writing them took.
        tensors: name, dtype, shape, offset and checksum of each, in the order of the sync.
    """

    path: str
    sync: int
    bytes: int
    seconds: float
    tensors: list[tuple[str, str, list[int], int, int]]

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    def read(self, device: torch.device) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """Yield the tensors, a bucket at a time.  On a CPU they are the memory itself: read only.

        Raises:
            ProtocolError: a tensor is not what was written.
            TransportError: the memory is gone.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                mapped = mmap.mmap(descriptor, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
            finally:
                os.close(descriptor)
        except (OSError, ValueError) as error:
            raise TransportError(f"The snapshot of weight sync {self.sync} cannot be read: {error}") from None
        with warnings.catch_warnings():
            # That it cannot be written to is what is wanted.
            warnings.simplefilter("ignore", UserWarning)
            memory, checksum = torch.frombuffer(mapped, dtype=torch.uint8), RunningChecksum()
        bucket: list[tuple[str, torch.Tensor]] = []
        held = 0
        for name, dtype, shape, offset, expected in self.tensors:
            size = math.prod(shape) * DTYPES[dtype].itemsize
            piece = memory[offset : offset + size]
            checksum.add(piece)
            if checksum.end_tensor() != expected:
                raise ProtocolError(
                    f"{name} in the snapshot of weight sync {self.sync} is not what was written: its checksum differs"
                )
            bucket.append((name, piece.view(DTYPES[dtype]).view(shape).to(device)))
            held += size
            if held >= BUCKET_BYTES:
                yield bucket
                bucket, held = [], 0
        if bucket:
            yield bucket


class SnapshotWriter:
    """Writes one snapshot after the other into the same memory."""

    def __init__(self) -> None:
        """Make the memory, which is empty."""
        self._descriptor = os.memfd_create("ascend_safe_snapshot", os.MFD_CLOEXEC)
        self.begin(0)

    def begin(self, sync: int) -> None:
        """Begin anew: what was written before is no snapshot any more."""
        self._sync = sync
        self._end = self._bytes = 0
        self._seconds = 0.0
        self._checksum = RunningChecksum()
        self._tensors: list[tuple[str, str, list[int], int, int]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, of any shape and strides and on any device.

        Raises:
            TransportError: there is no memory for it.
        """
        started = time.perf_counter()
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8).cpu()
        offset, size = aligned(self._end), flat.numel()
        written, data = 0, flat.numpy().data
        try:
            while written < size:
                written += os.pwrite(self._descriptor, data[written:], offset + written)
        except OSError as error:
            raise TransportError(
                f"There is no memory for the snapshot of the weights, which on_engine_death=restart takes: "
                f"{self._bytes + written} bytes were to be had, then: {error.strerror}"
            ) from None
        self._checksum.add(flat)
        checksum = self._checksum.end_tensor()
        self._tensors.append((name, NAMES[tensor.dtype], list(tensor.shape), offset, checksum))
        self._end, self._bytes = offset + size, self._bytes + size
        self._seconds += time.perf_counter() - started

    def finish(self) -> Snapshot:
        """Return what was written since `begin`: all of one weight sync."""
        path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        return Snapshot(path, self._sync, self._bytes, self._seconds, self._tensors)
