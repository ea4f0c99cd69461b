"""The messages of the weight transport, and the connection that carries them.

A message is four bytes of length, most significant first, and a msgpack map.  What does not decode into one of the
types below is refused with one sentence; nothing received is ever executed or unpickled.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, overload

import msgspec

VERSION = 1
"""Of the protocol.  Both sides come from one installation, unless a job's nodes or images are out of step."""

MAX_MESSAGE = 64 * 2**20
"""Bytes.  The longest message is a bucket's list of pieces: some 150 bytes each, and at most `MAX_PIECES`."""

MAX_PIECES = 10_000
"""How many pieces the sender puts into one bucket: tensors of no elements take no room in it."""

SLICE_SECONDS = 0.5
"""How often a waiting side looks whether waiting still makes sense."""

_HEADER = struct.Struct(">I")

WhileWaiting = Callable[[], "Exception | None"]
"""Asked every `SLICE_SECONDS` of a wait: why to stop waiting, or `None`."""


class TransportError(RuntimeError):
    """The weights did not arrive.  The message is one sentence that says why."""


class ProtocolError(TransportError):
    """A message that this protocol does not have, or not there."""


class PeerGoneError(TransportError):
    """The other process ended, or closed the connection, without a word."""


class PeerFailedError(TransportError):
    """The other process broke off and said why."""


class PeerSilentError(TransportError):
    """The other process is there and did not answer in time."""


_Size = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="hello"):
    """Sender's first message; the file descriptor of the buckets comes with it.

    Attributes:
        version: of the protocol.
        buckets: how many there are, one after the other from the start of the segment.
        bucket_bytes: the size of each.
        checksums: whether each tensor comes with a checksum.
    """

    version: int
    buckets: Annotated[int, msgspec.Meta(ge=1, le=64)]
    bucket_bytes: Annotated[int, msgspec.Meta(ge=1, le=2**48)]
    checksums: bool


class Ready(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="ready"):
    """Receiver's answer to `Hello`, with its rank in the engine, for messages."""

    version: int
    rank: _Size


class Piece(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A tensor, or a part of one that is larger than a bucket.

    Attributes:
        name: the tensor's.
        dtype: torch's name of it, without `torch.`.
        shape: of the whole tensor.
        start: the first byte of the tensor, in row-major order, that this piece brings.
        offset: where the piece starts in the bucket, in bytes.
        size: bytes of the piece.
        checksum: xxh3-64 of the whole tensor's bytes, with its last piece, where `Hello.checksums`; else `None`.
    """

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
    dtype: Annotated[str, msgspec.Meta(max_length=64)]
    shape: Annotated[list[_Size], msgspec.Meta(max_length=64)]
    start: _Size
    offset: _Size
    size: _Size
    checksum: Annotated[int, msgspec.Meta(ge=0)] | None = None


class Bucket(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="bucket"):
    """A bucket is filled: `number` counts from 0, and `number % Hello.buckets` says which one it is."""

    number: _Size
    pieces: list[Piece]


class Loaded(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="loaded"):
    """The receiver no longer needs what bucket `number` held."""

    number: _Size


class End(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="end"):
    """All weights have been sent: how many tensors, their bytes, and the checksum of their checksums in order."""

    tensors: _Size
    bytes: _Size
    checksum: Annotated[int, msgspec.Meta(ge=0)] | None = None


class Done(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="done"):
    """The receiver has taken all of it."""


class Broken(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="broken"):
    """The side that says it has failed, and why."""

    reason: str


def broken(reason: str) -> Broken:
    """Return a `Broken` that fits into one sentence, whatever the error's own text was."""
    return Broken(" ".join(reason.split())[:2000])


Message = Hello | Ready | Bucket | Loaded | End | Done | Broken

_First = TypeVar("_First", Hello, Ready, Bucket, Loaded, End, Done)
_Second = TypeVar("_Second", Bucket, End)


class _Greeting(msgspec.Struct):
    """What a first message of any version has, unless it is a `Broken`."""

    version: int | None = None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)
_greeting_decoder = msgspec.msgpack.Decoder(_Greeting)


class Connection:
    """One end of a stream of messages.  Every wait ends: by the message, by the peer's end, or by the time-out."""

    def __init__(
        self, connected: socket.socket, peer: str, timeout: float, while_waiting: WhileWaiting | None = None
    ) -> None:
        """Take over a connected socket.

        Args:
            connected: a stream socket; closed with this connection.
            peer: who is at the other end, for messages: "the trainer (process 12)".
            timeout: seconds that one message may take, from the call to its last byte.
            while_waiting: see `WhileWaiting`.
        """
        self.peer = peer
        self.timeout = timeout
        self._socket = connected
        self._socket.setblocking(False)
        self._while_waiting = while_waiting

    def fileno(self) -> int:
        """Return the socket's file descriptor, for `select.poll`."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket.  A second call does nothing."""
        self._socket.close()

    def send(self, message: Message, descriptor: int | None = None) -> None:
        """Send one message, and with it a file descriptor.

        Raises:
            TransportError: it could not be delivered.  If the peer has said why it ended, that is the reason given.
        """
        body = _encoder.encode(message)
        if len(body) > MAX_MESSAGE:
            raise ProtocolError(f"A {type(message).__name__} of {len(body)} bytes is more than a message may have")
        remaining = memoryview(_HEADER.pack(len(body)) + body)
        deadline = time.monotonic() + self.timeout
        while remaining:
            try:
                if descriptor is not None:
                    sent, descriptor = socket.send_fds(self._socket, [remaining], [descriptor]), None
                else:
                    sent = self._socket.send(remaining)
                remaining = remaining[sent:]
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline)
            except OSError as error:
                raise self._why_closed(error) from None

    @overload
    def receive(self, expected: type[_First], /) -> _First: ...

    @overload
    def receive(self, expected: type[_First], or_else: type[_Second], /) -> _First | _Second: ...

    def receive(self, *expected: type[Any]) -> Any:
        """Wait for one message of the types that may come now.

        Raises:
            PeerFailedError: the peer said that it failed.
            PeerGoneError: the peer ended.
            PeerSilentError: nothing, or only a part of a message, came in time.
            ProtocolError: something else came.
        """
        return self._checked(self._read_message(time.monotonic() + self.timeout), expected)

    def receive_hello(self) -> tuple[Hello, int]:
        """Wait for the sender's first message; also the file descriptor that came with it, now the caller's.

        Raises:
            TransportError: see `receive`; and another version, or not one file descriptor.
        """
        deadline = time.monotonic() + self.timeout
        descriptors: list[int] = []
        try:
            message = self._read_message(deadline, greeting=True, descriptors=descriptors)
            hello: Hello = self._checked(message, (Hello,))
            if len(descriptors) != 1:
                raise self.malformed(f"its hello brings {len(descriptors)} file descriptors instead of one")
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        return hello, descriptors[0]

    def receive_ready(self) -> Ready:
        """Wait for a receiver's answer to the hello.

        Raises:
            TransportError: see `receive`; and another version.
        """
        ready: Ready = self._checked(self._read_message(time.monotonic() + self.timeout, greeting=True), (Ready,))
        return ready

    def malformed(self, what: str) -> ProtocolError:
        """Return the error for a message that cannot be right."""
        return ProtocolError(f"What {self.peer} sent is no weight stream of this protocol: {what}")

    def _checked(self, message: Message, expected: tuple[type[Any], ...]) -> Any:
        if isinstance(message, expected):
            return message
        if isinstance(message, Broken):
            raise PeerFailedError(f"The weight sync was broken off by {self.peer}: {message.reason}")
        names = " or ".join(kind.__name__ for kind in expected)
        raise self.malformed(f"a {type(message).__name__} came where only {names} can")

    def _read_message(self, deadline: float, greeting: bool = False, descriptors: list[int] | None = None) -> Message:
        (size,) = _HEADER.unpack(self._read(_HEADER.size, deadline, descriptors))
        if size > MAX_MESSAGE:
            raise self.malformed(f"a message of {size} bytes is announced, and the most is {MAX_MESSAGE}")
        body = self._read(size, deadline, descriptors)
        try:
            if greeting:
                # Before the rest is looked at, which may be another version's.
                version = _greeting_decoder.decode(body).version
                if version not in (VERSION, None):
                    raise self.malformed(
                        f"it speaks version {version} of the protocol and this process version {VERSION}; install one "
                        "release of verl-ascend-rollout everywhere"
                    )
            message: Message = _decoder.decode(body)
            return message
        except (msgspec.DecodeError, RecursionError) as error:
            raise self.malformed(f"a message does not decode ({error})") from None

    def _read(self, size: int, deadline: float, descriptors: list[int] | None) -> bytearray:
        received = bytearray(size)
        view = memoryview(received)
        while view:
            try:
                if descriptors is None:
                    count = self._socket.recv_into(view)
                else:
                    data, found, _, _ = socket.recv_fds(self._socket, len(view), 4, socket.MSG_CMSG_CLOEXEC)
                    descriptors.extend(found)
                    count = len(data)
                    view[:count] = data
            except BlockingIOError:
                self._wait(select.POLLIN, deadline)
                continue
            except OSError as error:
                raise self._gone(error.strerror) from None
            if not count:
                raise self._gone("the connection was closed")
            view = view[count:]
        return received

    def _wait(self, event: int, deadline: float) -> None:
        wait_for([self], event, deadline, self._while_waiting)

    def _why_closed(self, error: OSError) -> TransportError:
        """Return why a message could not be sent: what the peer said before it closed, or that it said nothing."""
        try:
            while True:
                message = self._read_message(time.monotonic())
                if isinstance(message, Broken):
                    return PeerFailedError(f"The weight sync was broken off by {self.peer}: {message.reason}")
        except TransportError:
            return self._gone(error.strerror)

    def _gone(self, why: str | None) -> PeerGoneError:
        return PeerGoneError(f"In the middle of the weight sync {self.peer} ended ({why}); its own log has the reason")


def wait_for(
    connections: list[Connection], event: int, deadline: float, while_waiting: WhileWaiting | None
) -> list[Connection]:
    """Wait until at least one connection can be read or written, or has ended; those.

    Args:
        connections: at least one.
        event: `select.POLLIN` or `select.POLLOUT`.
        deadline: on the clock of `time.monotonic`.
        while_waiting: see `WhileWaiting`.

    Raises:
        PeerSilentError: the deadline has passed.
        Exception: what `while_waiting` gave as the reason to stop.
    """
    poller = select.poll()
    for connection in connections:
        poller.register(connection, event)

    def ready(seconds: float) -> list[Connection]:
        found = {descriptor for descriptor, _ in poller.poll(max(0.0, seconds) * 1000)}
        return [connection for connection in connections if connection.fileno() in found]

    while True:
        found = ready(min(SLICE_SECONDS, deadline - time.monotonic()))
        if found:
            return found
        reason = while_waiting() if while_waiting is not None else None
        if reason is not None:
            # The last message may have come in between.
            found = ready(0)
            if found:
                return found
            raise reason
        if time.monotonic() >= deadline:
            who = " and ".join(connection.peer for connection in connections)
            raise PeerSilentError(
                f"In the middle of the weight sync nothing came from {who} for {connections[0].timeout:g} s: the "
                "process is there and stands still"
            )
