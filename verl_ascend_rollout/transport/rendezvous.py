"""Where a sender and its receivers meet: a Unix socket in a folder that only their user can enter.

The folder has a name that cannot be guessed, which reaches the receivers with the call that asks them to receive.  It
is locked (flock) by the sender as long as it lives, so that another sender can tell a folder in use from one that a
killed process left, also where they do not see each other's process ids (containers that share a temporary folder).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import socket
import stat
import struct
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from verl_ascend_rollout.transport.messages import PeerSilentError, TransportError, WhileWaiting

PREFIX = "ascend_safe_weights-"
SOCKET = "socket"
_CREDENTIALS = struct.Struct("3i")


class Credentials(NamedTuple):
    """Who is at the other end of a Unix socket, by the kernel's word (SO_PEERCRED, unix(7))."""

    pid: int
    uid: int
    gid: int


class Listener:
    """A socket that receivers connect to.  Close it as soon as all have: then nothing is left that has a name."""

    def __init__(self, base: str | None = None) -> None:
        """Make the folder and listen.

        Args:
            base: the folder in which to make it; the system's temporary folder by default.

        Raises:
            TransportError: the folder or the socket could not be made.
        """
        base = base or tempfile.gettempdir()
        remove_leftovers(base)
        try:
            self.folder, self._folder_descriptor = _make_locked_folder(base)
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.bind(_address(self._folder_descriptor))
            self._socket.listen(64)
            self._socket.settimeout(0.1)
        except OSError as error:
            self.close()
            raise TransportError(f"No socket for the weight sync could be made in {base}: {error.strerror}") from error

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
        """Remove the socket and its folder.  A second call does nothing."""
        if hasattr(self, "_socket"):
            self._socket.close()
        if hasattr(self, "_folder_descriptor"):
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._folder_descriptor)
            del self._folder_descriptor


def connect(folder: str) -> tuple[socket.socket, Credentials]:
    """Connect to the sender that listens in `folder`.

    Raises:
        TransportError: nobody listens there, or the folder or the listener is not this user's alone.
    """
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
                raise TransportError(f"The folder {folder} of the weight sync is open to other users: nothing is taken")
            connected.connect(_address(descriptor))
        finally:
            os.close(descriptor)
        credentials = credentials_of(connected)
        if credentials.uid != os.geteuid():
            raise TransportError(f"User {credentials.uid} listens in {folder}, not this one: nothing is taken")
    except OSError as error:
        connected.close()
        raise TransportError(
            f"The trainer that announced this weight sync no longer listens in {folder}: {error.strerror}"
        ) from error
    except BaseException:
        connected.close()
        raise
    return connected, credentials


def remove_leftovers(base: str) -> list[str]:
    """Remove this user's folders in `base` whose sender has ended; their paths.  Never raises."""
    removed = []
    with contextlib.suppress(OSError):
        for folder in Path(base).glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError):
                descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    if os.fstat(descriptor).st_uid != os.geteuid():
                        continue
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
                    removed.append(str(folder))
                finally:
                    os.close(descriptor)
    return removed


def credentials_of(connected: socket.socket) -> Credentials:
    """The peer's process, user and group."""
    return Credentials(
        *_CREDENTIALS.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    )


def _make_locked_folder(base: str) -> tuple[str, int]:
    """A new folder of mode 0700, and the descriptor that holds its lock."""
    while True:
        folder = os.path.join(base, PREFIX + secrets.token_hex(16))
        os.mkdir(folder, 0o700)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Between the first and the last line another sender could take it for a leftover.
        if os.path.exists(folder):
            return folder, descriptor
        os.close(descriptor)


def _address(folder_descriptor: int) -> str:
    """The socket's path by way of the open folder: an address has room for 107 bytes only (unix(7))."""
    return f"/proc/self/fd/{folder_descriptor}/{SOCKET}"
