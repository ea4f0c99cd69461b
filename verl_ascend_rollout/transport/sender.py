"""The sending side: one stream of tensors to every receiver on this host."""

from __future__ import annotations

import contextlib
import select
import time
from types import TracebackType

import torch

from verl_ascend_rollout.transport import rendezvous
from verl_ascend_rollout.transport.messages import (
    MAX_PIECES,
    VERSION,
    Bucket,
    Connection,
    Done,
    End,
    Hello,
    Loaded,
    Piece,
    TransportError,
    WhileWaiting,
    broken,
    wait_for,
)
from verl_ascend_rollout.transport.segment import Segment
from verl_ascend_rollout.transport.tensors import ALIGNMENT, NAMES, RunningChecksum, Summary, aligned

BUCKETS = 2
"""One is filled while the other is loaded."""


class WeightSender:
    """Sends one set of weights.  A context manager: on an exception the receivers are told why it ended.

        with WeightSender(receivers=2, bucket_bytes=64 * 2**20) as sender:
            ask_two_processes_to_receive(sender.name)
            sender.connect()
            for name, tensor in weights:
                sender.send(name, tensor)
            summary = sender.finish()

    Memory: two buckets, shared with all receivers, and for a tensor that is larger than a bucket and not contiguous a
    contiguous copy of it.
    """

    def __init__(
        self,
        *,
        receivers: int,
        bucket_bytes: int,
        checksums: bool = False,
        timeout: float = 600.0,
        name: str | None = None,
    ) -> None:
        """Make the buckets and listen.

        Args:
            receivers: how many processes will connect.
            bucket_bytes: the size of each of the two buckets; rounded up to a multiple of 64.
            checksums: send a checksum with each tensor, which the receivers then verify.
            timeout: seconds that a receiver may take to connect, or to load one bucket.
            name: by which receivers find this sender; by default one that nobody can guess.

        Raises:
            TransportError: no room for the buckets, or the name is taken.
            ValueError: no receivers, or no bytes.
        """
        if receivers < 1 or bucket_bytes < 1:
            raise ValueError(f"A weight sync takes receivers and a bucket, not {receivers} and {bucket_bytes} bytes")
        self._bucket_bytes = aligned(bucket_bytes)
        self._segment = Segment(BUCKETS * self._bucket_bytes)
        try:
            self._listener = rendezvous.Listener(name)
        except BaseException:
            self._segment.close()
            raise
        self._expected = receivers
        self._timeout = timeout
        self._while_waiting: WhileWaiting | None = None
        self._connections: list[Connection] = []
        # The last bucket that each receiver has loaded.
        self._loaded: dict[Connection, int] = {}
        self._checksum = RunningChecksum() if checksums else None
        self._names: set[str] = set()
        self._bytes = 0
        self._number = 0
        self._used = 0
        self._pieces: list[Piece] = []
        self._writable = False
        self._started = time.perf_counter()

    @property
    def name(self) -> str:
        """By which receivers find this sender."""
        return self._listener.name

    def __enter__(self) -> WeightSender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._break_off(str(error) or type(error).__name__)
        self.close()

    def connect(self, while_waiting: WhileWaiting | None = None) -> None:
        """Wait for all receivers, and agree on the buckets with each.  Afterwards the name is free.

        Args:
            while_waiting: asked now and in every later wait; see `messages.WhileWaiting`.

        Raises:
            TransportError: one did not come in time, has another version, or failed.
            Exception: what `while_waiting` gave as the reason to stop.
        """
        self._while_waiting = while_waiting
        deadline = time.monotonic() + self._timeout
        try:
            while len(self._connections) < self._expected:
                connected, credentials = self._listener.accept(deadline, self._while_waiting)
                peer = f"the rollout worker (process {credentials.pid})"
                self._connections.append(Connection(connected, peer, self._timeout, self._while_waiting))
        finally:
            self._listener.close()
        hello = Hello(VERSION, BUCKETS, self._bucket_bytes, self._checksum is not None)
        for connection in self._connections:
            connection.send(hello, self._segment.descriptor)
        for connection in self._connections:
            rank = connection.receive_ready().rank
            connection.peer = connection.peer.replace("worker (", f"worker of rank {rank} (")
            self._loaded[connection] = -1
        self._started = time.perf_counter()

    def send(self, name: str, tensor: torch.Tensor) -> None:
        """Send one tensor, of any shape and strides and on any device; on return it may be changed or freed.

        Raises:
            ValueError: the name came before, or the dtype is none that weights have.
            TransportError: a receiver failed, ended, or stands still.
            Exception: what `while_waiting` gave as the reason to stop.
        """
        if name in self._names:
            raise ValueError(f"The trainer's weights hold {name} more than once: nothing says which one is right")
        dtype = NAMES.get(tensor.dtype)
        if dtype is None:
            raise ValueError(f"{name} has the dtype {tensor.dtype}, which weights cannot have in a weight sync")
        self._names.add(name)
        tensor = tensor.detach()
        size = tensor.numel() * tensor.element_size()
        self._bytes += size
        if size <= self._bucket_bytes:
            # In one piece, so that the receiver needs no copy to put it together.
            if aligned(self._used) + size > self._bucket_bytes:
                self._hand_over()
            offset = self._room_for(size)
            self._at(offset, size).view(tensor.dtype).view(tensor.shape).copy_(tensor)
            self._add(Piece(name, dtype, list(tensor.shape), 0, offset, size, self._take_checksum(offset, size, True)))
            return
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        start = 0
        while start < size:
            count = min(size - start, self._bucket_bytes - aligned(self._used))
            offset = self._room_for(count)
            self._at(offset, count).copy_(flat[start : start + count])
            checksum = self._take_checksum(offset, count, start + count == size)
            self._add(Piece(name, dtype, list(tensor.shape), start, offset, count, checksum))
            start += count

    def finish(self) -> Summary:
        """Send what is left and wait until every receiver has loaded all of it.

        Raises:
            TransportError: a receiver failed, ended, or stands still.
            Exception: what `while_waiting` gave as the reason to stop.
        """
        if self._pieces:
            self._hand_over()
        checksum = self._checksum.of_all() if self._checksum is not None else None
        for connection in self._connections:
            connection.send(End(len(self._names), self._bytes, checksum))
        self._wait_until_loaded(self._number - 1)
        for connection in self._connections:
            connection.receive(Done)
        return Summary(
            tensors=len(self._names),
            bytes=self._bytes,
            seconds=time.perf_counter() - self._started,
            checksum=None if checksum is None else f"{checksum:016x}",
        )

    def close(self) -> None:
        """Let go of everything.  A second call does nothing."""
        self._listener.close()
        for connection in self._connections:
            connection.close()
        self._connections = []
        self._segment.close()

    # ----------------------------------------------------------------------------------------------------------------

    def _room_for(self, size: int) -> int:
        """Find where in the bucket the next piece of `size` bytes goes; wait until the bucket is free."""
        if not self._writable:
            self._wait_until_loaded(self._number - BUCKETS)
            self._writable = True
        offset = aligned(self._used)
        self._segment.reserve(self._position(offset + size))
        return offset

    def _position(self, offset: int) -> int:
        """Return where an offset in the current bucket is in the segment."""
        return self._number % BUCKETS * self._bucket_bytes + offset

    def _at(self, offset: int, size: int) -> torch.Tensor:
        position = self._position(offset)
        return self._segment.bytes[position : position + size]

    def _take_checksum(self, offset: int, size: int, is_last: bool) -> int | None:
        if self._checksum is None:
            return None
        self._checksum.add(self._at(offset, size))
        return self._checksum.end_tensor() if is_last else None

    def _add(self, piece: Piece) -> None:
        self._pieces.append(piece)
        self._used = piece.offset + piece.size
        if len(self._pieces) >= MAX_PIECES or aligned(self._used) + ALIGNMENT > self._bucket_bytes:
            self._hand_over()

    def _hand_over(self) -> None:
        """Tell the receivers that the current bucket is full, and turn to the next."""
        bucket = Bucket(self._number, self._pieces)
        for connection in self._connections:
            connection.send(bucket)
        self._number += 1
        self._used = 0
        self._pieces = []
        self._writable = False

    def _wait_until_loaded(self, number: int) -> None:
        """Wait until every receiver has loaded the buckets up to `number`."""
        deadline = time.monotonic() + self._timeout
        while True:
            behind = [connection for connection in self._connections if self._loaded[connection] < number]
            if not behind:
                return
            for connection in wait_for(behind, select.POLLIN, deadline, self._while_waiting):
                loaded = connection.receive(Loaded).number
                if loaded != self._loaded[connection] + 1 or loaded >= self._number:
                    raise connection.malformed(
                        f"bucket {loaded} is reported as loaded after bucket {self._loaded[connection]}"
                    )
                self._loaded[connection] = loaded

    def _break_off(self, reason: str) -> None:
        for connection in self._connections:
            # A receiver that does not read now is told by the end of the connection.
            connection.timeout = 1.0
            with contextlib.suppress(TransportError, OSError):
                connection.send(broken(reason))
