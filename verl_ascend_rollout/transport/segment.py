"""The shared memory that the buckets are in: a memfd, which has no name and ends with the last process that has it.

A memfd is not bounded by the size of /dev/shm, which is 64 MiB in a container unless somebody raised it; it counts as
memory of the processes (memfd_create(2)).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import warnings

import psutil
import torch

from verl_ascend_rollout.transport.messages import ProtocolError, TransportError

F_SEAL_FUTURE_WRITE = 0x0010
"""linux/fcntl.h, since Linux 5.1: no new writable mapping.  Python 3.12 has no name for it."""

STRIDE = 16 * 2**20
"""Bytes of memory that are asked for at once, just before their use: a small model needs little of large buckets."""

_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class Segment:
    """The sender's side: memory that it writes and others read."""

    def __init__(self, size: int) -> None:
        """Make a segment of `size` bytes, which takes memory only as it is used.

        Raises:
            TransportError: there is not that much memory, or the system refuses; with the numbers.
        """
        self.size = size
        self._reserved = 0
        available = int(psutil.virtual_memory().available)
        if size > available:
            raise TransportError(_no_room(size, f"{_mib(available)} of memory are available"))
        self.descriptor = os.memfd_create("ascend_safe_weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.descriptor, size)
            self.map = mmap.mmap(self.descriptor, size, flags=mmap.MAP_SHARED)
            # Nobody can make it smaller under a reader (a SIGBUS) or write into it from now on.
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SIZE_SEALS)
            _seal_against_writing(self.descriptor)
        except OSError as error:
            self.close()
            raise TransportError(_no_room(size, error.strerror or str(error))) from error
        self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)

    def reserve(self, end: int) -> None:
        """Make sure that the first `end` bytes have memory: writing to them would otherwise end the process.

        Raises:
            TransportError: there is no memory for them; with the numbers.
        """
        while self._reserved < end:
            stride = min(STRIDE, self.size - self._reserved)
            try:
                os.posix_fallocate(self.descriptor, self._reserved, stride)
            except OSError as error:
                raise TransportError(
                    _no_room(self.size, f"{_mib(self._reserved)} were to be had, then: {error.strerror}")
                ) from error
            self._reserved += stride

    def close(self) -> None:
        """Let go of the memory; it is free when the readers have, too.  A second call does nothing."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
        # Not `map.close()`: the tensor over it would point nowhere.
        for name in ("bytes", "map"):
            self.__dict__.pop(name, None)


def map_read_only(descriptor: int, size: int) -> torch.Tensor:
    """Return a receiver's view of a segment: `size` bytes as uint8, to be read only (writing ends the process).

    Args:
        descriptor: the segment's; may be closed afterwards.

    Raises:
        ProtocolError: it is no sealed segment of that size, so that reading it could end this process.
    """
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        length = os.fstat(descriptor).st_size
        if seals & _SIZE_SEALS != _SIZE_SEALS or length != size:
            raise ProtocolError(
                f"The weight buckets are {length} bytes, {'' if seals & _SIZE_SEALS == _SIZE_SEALS else 'not '}sealed, "
                f"and should be {size} bytes, sealed"
            )
        mapped = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    except OSError as error:
        raise ProtocolError(f"The weight buckets cannot be mapped: {error.strerror}") from error
    with warnings.catch_warnings():
        # torch has no read-only tensors, and says so.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapped, dtype=torch.uint8)


def _seal_against_writing(descriptor: int) -> None:
    try:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
    except OSError:
        # Linux before 5.1 (EINVAL): the receivers map it read-only anyway.
        return


def _no_room(size: int, why: str) -> str:
    return (
        f"There is no room for the weight buckets: they take up to {_mib(size)} and {why}; lower "
        "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes"
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"
