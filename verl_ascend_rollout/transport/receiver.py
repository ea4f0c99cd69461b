"""The receiving side: what a worker of the rollout engine takes from the stream, checked before it is loaded."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from verl_ascend_rollout.transport import rendezvous
from verl_ascend_rollout.transport.messages import (
    VERSION,
    Bucket,
    Connection,
    Done,
    End,
    Hello,
    Loaded,
    Piece,
    ProtocolError,
    Ready,
    TransportError,
    broken,
)
from verl_ascend_rollout.transport.segment import map_read_only
from verl_ascend_rollout.transport.stream import NamedTensor
from verl_ascend_rollout.transport.tensors import ALIGNMENT, DTYPES, RunningChecksum, Summary

Load = Callable[[list[NamedTensor]], object]


def receive_weights(
    name: str,
    load: Load,
    *,
    rank: int = 0,
    device: torch.device | str = "cpu",
    copy: bool = True,
    timeout: float = 600.0,
) -> Summary:
    """Take one set of weights from the sender of that name.

    Memory beside what `load` keeps: with `copy` one bucket; and one buffer of the size of a tensor that is larger than
    a bucket, while it comes.

    Args:
        name: `WeightSender.name`.
        load: called for each bucket with its weights, in the order in which they were sent.  A tensor in
            several pieces comes with the bucket of its last piece.  The sender fills the other bucket meanwhile.
        rank: this worker's rank in its engine, for messages.
        device: where the tensors are handed over.
        copy: hand over tensors that own their memory.  Without it a tensor on the CPU may be a view of the bucket:
            valid until `load` returns, and read-only (writing to it ends the process).  On any other device the
            tensors of a bucket are parts of one copy of it.
        timeout: seconds that the sender may take to come, and to fill the next bucket.

    Returns:
        What came, and its checksum where the sender took any.

    Raises:
        ProtocolError: the stream is malformed, or a checksum differs.
        TransportError: the sender failed, ended, or stands still.
        Exception: whatever `load` raised, after the sender has been told.
    """
    connected, credentials = rendezvous.connect(name, timeout)
    connection = Connection(connected, f"the trainer (process {credentials.pid})", timeout)
    try:
        return _receive(connection, load, rank, torch.device(device), copy)
    except BaseException as error:
        connection.timeout = 1.0
        with contextlib.suppress(TransportError, OSError):
            connection.send(broken(f"{type(error).__name__}: {error}"))
        raise
    finally:
        connection.close()


def _receive(connection: Connection, load: Load, rank: int, device: torch.device, copy: bool) -> Summary:
    hello, descriptor = connection.receive_hello()
    try:
        memory = map_read_only(descriptor, hello.buckets * hello.bucket_bytes)
    finally:
        os.close(descriptor)
    connection.send(Ready(VERSION, rank))
    started = time.perf_counter()
    stream = _Stream(connection, hello, memory, device, copy)
    while True:
        message = connection.receive(Bucket, End)
        if isinstance(message, End):
            break
        _hand_over(load, stream.take(message))
        connection.send(Loaded(message.number))
    summary = stream.end(message, time.perf_counter() - started)
    connection.send(Done())
    return summary


def _hand_over(load: Load, weights: list[NamedTensor]) -> None:
    """In a function of its own, so that no variable here keeps the weights until the next bucket."""
    if weights:
        load(weights)


@dataclass
class _Unfinished:
    """A tensor that is larger than a bucket, as far as it has come."""

    first: Piece
    tensor: torch.Tensor
    filled: int


@dataclass
class _Stream:
    """What has come so far, and the checks of what comes next."""

    connection: Connection
    hello: Hello
    memory: torch.Tensor
    device: torch.device
    copy: bool
    number: int = 0
    names: set[str] = field(default_factory=set)
    bytes: int = 0
    unfinished: _Unfinished | None = None
    checksum: RunningChecksum = field(default_factory=RunningChecksum)

    def take(self, bucket: Bucket) -> list[NamedTensor]:
        """Return the tensors that are whole with this bucket; all pieces are checked before the first is copied."""
        if bucket.number != self.number:
            raise self.connection.malformed(f"bucket {bucket.number} came where bucket {self.number} was due")
        self._check_pieces(bucket.pieces)
        start = self.number % self.hello.buckets * self.hello.bucket_bytes
        used = max((piece.offset + piece.size for piece in bucket.pieces), default=0)
        memory = self.memory[start : start + used]
        # One transfer for the whole bucket: a small one for each expert would cost more than its bytes.
        arrived = memory.to(self.device)
        weights: list[NamedTensor] = []
        for piece in bucket.pieces:
            place = slice(piece.offset, piece.offset + piece.size)
            tensor = self._take_piece(piece, memory[place], arrived[place])
            if tensor is not None:
                weights.append((piece.name, tensor))
        self.number += 1
        return weights

    def end(self, end: End, seconds: float) -> Summary:
        """Compare what came with what the sender says it sent."""
        checksum = self.checksum.of_all() if self.hello.checksums else None
        if self.unfinished is not None:
            first, filled = self.unfinished.first, self.unfinished.filled
            raise self.connection.malformed(f"it ends after {filled} of the {_bytes_of(first)} bytes of {first.name}")
        if (end.tensors, end.bytes) != (len(self.names), self.bytes):
            raise self.connection.malformed(
                f"it ends with {end.tensors} tensors of {end.bytes} bytes, and {len(self.names)} of {self.bytes} bytes "
                "have come"
            )
        if end.checksum != checksum:
            raise self.connection.malformed("the checksum of all tensors differs from the sender's")
        return Summary(end.tensors, end.bytes, seconds, None if checksum is None else f"{checksum:016x}")

    def _check_pieces(self, pieces: list[Piece]) -> None:
        """Check every rule of a bucket's pieces, before anything is allocated or read for them."""
        position = 0
        begun, filled = (self.unfinished.first, self.unfinished.filled) if self.unfinished is not None else (None, 0)
        names = set()
        for piece in pieces:
            name, wrong = piece.name, None
            if piece.dtype not in DTYPES:
                wrong = f"has the unknown dtype {piece.dtype!r}"
            elif piece.offset % ALIGNMENT or piece.offset < position:
                wrong = f"starts at byte {piece.offset} of a bucket that is taken up to byte {position}, or not aligned"
            elif piece.offset + piece.size > self.hello.bucket_bytes:
                wrong = (
                    f"is said to lie at bytes {piece.offset} to {piece.offset + piece.size} of a bucket of "
                    f"{self.hello.bucket_bytes}"
                )
            elif begun is None and (name in self.names or name in names):
                wrong = "comes a second time"
            elif begun is None and piece.start != 0:
                wrong = f"starts with its byte {piece.start}"
            elif begun is not None and (name, piece.dtype, piece.shape) != (begun.name, begun.dtype, begun.shape):
                wrong = f"comes before {begun.name} is whole"
            elif begun is not None and piece.start != filled:
                wrong = f"goes on with its byte {piece.start} after byte {filled}"
            elif piece.start + piece.size > _bytes_of(piece):
                wrong = f"has {piece.start + piece.size} bytes for a {piece.dtype} of shape {piece.shape}"
            elif piece.size == 0 and _bytes_of(piece) > 0:
                wrong = "has an empty piece"
            elif (piece.checksum is not None) != (self.hello.checksums and _is_last(piece)):
                wrong = "has a checksum where none belongs, or none where one belongs"
            if wrong is not None:
                raise self.connection.malformed(f"{name} {wrong}")
            position = piece.offset + piece.size
            begun, filled = (None, 0) if _is_last(piece) else (piece, piece.start + piece.size)
            names.add(name)

    def _take_piece(self, piece: Piece, sent: torch.Tensor, arrived: torch.Tensor) -> torch.Tensor | None:
        """Return the tensor, when this piece makes it whole.

        Args:
            piece: which part of which tensor.
            sent: its bytes in the bucket.
            arrived: the same on the device that wants them; on a CPU, the bucket.
        """
        if self.hello.checksums:
            self.checksum.add(sent)
            if piece.checksum is not None and self.checksum.end_tensor() != piece.checksum:
                raise ProtocolError(
                    f"{piece.name} did not arrive as {self.connection.peer} sent it: its checksum differs"
                )
        if piece.start == 0 and _is_last(piece):
            tensor = arrived.clone() if self.copy and self.device.type == "cpu" else arrived
        else:
            if self.unfinished is None:
                self.unfinished = _Unfinished(piece, self._allocate(piece), 0)
            unfinished = self.unfinished
            unfinished.tensor[piece.start : piece.start + piece.size].copy_(arrived)
            unfinished.filled += piece.size
            if not _is_last(piece):
                return None
            tensor, self.unfinished = unfinished.tensor, None
        self.names.add(piece.name)
        self.bytes += _bytes_of(piece)
        return tensor.view(DTYPES[piece.dtype]).view(piece.shape)

    def _allocate(self, piece: Piece) -> torch.Tensor:
        size = _bytes_of(piece)
        try:
            return torch.empty(size, dtype=torch.uint8, device=self.device)
        except (RuntimeError, MemoryError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise TransportError(
                f"There is no memory for {piece.name}, which takes {size} bytes on {self.device}: {reason}"
            ) from None


def _bytes_of(piece: Piece) -> int:
    return math.prod(piece.shape) * DTYPES[piece.dtype].itemsize


def _is_last(piece: Piece) -> bool:
    return piece.start + piece.size == _bytes_of(piece)
