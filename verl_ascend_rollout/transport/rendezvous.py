"""Where a sender and its receivers meet: an abstract Unix socket, which has a name and no file (unix(7)).

It ends with its process, whatever ends that, so that a kill -9 leaves nothing; and a temporary folder that several
nodes share has no part in it.  The namespace is that of the network: nodes that share one, as Ray nodes on one machine
and containers on the host's network do, are told apart by the name, which has the node in it.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import struct
import time
from typing import NamedTuple

from verl_ascend_rollout.transport.messages import PeerSilentError, TransportError, WhileWaiting

PREFIX = "ascend_safe_weights-"
NODE_VARIABLE = "ASCEND_SAFE_NODE"
"""Which of Ray's nodes this is, for processes of the rollout engine, which are none of Ray's."""

_CREDENTIALS = struct.Struct("3i")
_POLL_SECONDS = 0.1


class Credentials(NamedTuple):
    """Who is at the other end of a Unix socket, by the kernel's word (SO_PEERCRED, unix(7))."""

    pid: int
    uid: int
    gid: int


def on_node(name: str, node: str) -> str:
    """Return the name on one node of what has `name` on several.

    Args:
        name: unique on a node, at most 60 bytes: an address has room for 107.
        node: Ray's id of the node: random, of which half the digits tell any two apart.
    """
    return f"{name}-{node[:24]}"


class Listener:
    """A socket that receivers connect to.  Close it as soon as all have."""

    def __init__(self, name: str | None = None) -> None:
        """Listen.

        Args:
            name: by which receivers find this sender; by default one that nobody can guess.

        Raises:
            TransportError: the name is taken.
        """
        self.name = name or secrets.token_hex(16)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.bind(_address(self.name))
            self._socket.listen(64)
        except OSError as error:
            self.close()
            raise TransportError(
                f"No socket for the weight sync could be made with the name {self.name}: {error.strerror or error}"
            ) from error
        self._socket.settimeout(_POLL_SECONDS)

    def accept(self, deadline: float, while_waiting: WhileWaiting | None = None) -> tuple[socket.socket, Credentials]:
        """Wait for the next receiver.  Connections of other users are dropped.

        Args:
            deadline: on the clock of `time.monotonic`.
            while_waiting: see `messages.WhileWaiting`.

        Raises:
            PeerSilentError: nobody came.
            Exception: what `while_waiting` gave as the reason to stop.
        """
        while True:
            try:
                connected, _ = self._socket.accept()
            except TimeoutError:
                reason = while_waiting() if while_waiting is not None else None
                if reason is not None:
                    raise reason from None
                if time.monotonic() >= deadline:
                    raise PeerSilentError("No rollout worker came to take the weights before the time-out") from None
                continue
            credentials = credentials_of(connected)
            if credentials.uid == os.geteuid():
                return connected, credentials
            connected.close()

    def close(self) -> None:
        """Stop listening; the name is free.  A second call does nothing."""
        self._socket.close()


def connect(name: str, timeout: float) -> tuple[socket.socket, Credentials]:
    """Connect to the sender of that name.

    Args:
        name: `Listener.name`.
        timeout: seconds to wait for it: of an engine on several nodes, the call comes from the first, and the trainer
            on another may not have come as far.

    Raises:
        TransportError: nobody listens, or another user does.
    """
    deadline = time.monotonic() + timeout
    while True:
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connected.connect(_address(name))
            credentials = credentials_of(connected)
        except OSError as error:
            connected.close()
            if error.errno != errno.ECONNREFUSED or time.monotonic() >= deadline:
                raise TransportError(
                    f"No trainer listens on this node for the weight sync {name}: {error.strerror or error}; it ended, "
                    "or has not come as far in time"
                ) from error
            time.sleep(_POLL_SECONDS)
            continue
        if credentials.uid == os.geteuid():
            return connected, credentials
        connected.close()
        raise TransportError(
            f"User {credentials.uid} listens for the weight sync {name}, not this one: nothing is taken"
        )


def credentials_of(connected: socket.socket) -> Credentials:
    """Return the peer's process, user and group."""
    return Credentials(
        *_CREDENTIALS.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    )


def _address(name: str) -> str:
    return f"\0{PREFIX}{name}"
