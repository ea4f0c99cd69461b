"""Sending weights without waiting for a receiver that has already failed.

verl's sender waits for the receiver's answer after each bucket, without a limit and inside the event loop (verl 0.9.1,
bucketed_weight_transfer.py:142).  When the worker dies of the bucket, nobody answers: the job hangs, and the error that
says why is never shown.  Here the wait is cut into slices, and between them Ray is asked whether the receiving call has
ended.
"""

from __future__ import annotations

from typing import Any

import ray
import zmq
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

SLICE_MILLISECONDS = 500


class ReceiverGoneError(RuntimeError):
    """The worker that should receive the weights ended the call without having received them all."""


class _WatchfulSocket:
    """A ZeroMQ socket whose `recv` ends when the receiving call has ended."""

    def __init__(self, socket: Any, receiver: Any) -> None:
        self._socket = socket
        self._receiver = receiver

    def recv(self) -> Any:
        while not self._socket.poll(SLICE_MILLISECONDS):
            if not ray.wait([self._receiver], timeout=0)[0]:
                continue
            # The call is over: its own error is the one to show.
            ray.get(self._receiver)
            if not self._socket.poll(SLICE_MILLISECONDS):
                raise ReceiverGoneError(
                    "The rollout worker ended its weight sync before all weights had been sent; see its log"
                )
        return self._socket.recv()

    def close(self) -> None:
        # What was not delivered to a dead receiver must not keep the process alive.
        self._socket.close(linger=0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


class WatchfulWeightSender(BucketedWeightSender):
    """verl's sender, which stops when the receiver has."""

    def __init__(self, *args: Any, receiver: Any = None, **kwargs: Any) -> None:
        """See verl's `BucketedWeightSender`.

        Args:
            receiver: the Ray reference of the receiving call; `None` on ranks that did not start it, which wait as
                verl's sender does.
        """
        super().__init__(*args, **kwargs)
        self._receiver = receiver

    def _init_socket(self) -> None:
        super()._init_socket()
        if self._receiver is not None and isinstance(self.socket, zmq.Socket):
            self.socket = _WatchfulSocket(self.socket, self._receiver)
