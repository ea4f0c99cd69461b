"""Sending weights without waiting for a receiver that has already failed.

Where the platform has no device IPC, weights go through our own transport (`verl_ascend_rollout.transport`), from the
trainer worker that calls the rollout engine to each of the engine's workers.

Where it has, they go through verl's, whose sender waits for the receiver's answer after each bucket, without a limit
and inside the event loop (verl 0.9.1, bucketed_weight_transfer.py:142).  When the worker dies of the bucket, nobody
answers: the job hangs, and the error that says why is never shown.

In both, the wait is cut into slices, and between them Ray is asked whether the receiving call has ended.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import ray
import torch
import zmq
from verl.utils.device import get_device_name
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

from verl_ascend_rollout.options import KEY
from verl_ascend_rollout.transport.messages import WhileWaiting
from verl_ascend_rollout.transport.rendezvous import on_node
from verl_ascend_rollout.transport.sender import WeightSender
from verl_ascend_rollout.transport.snapshot import SnapshotWriter
from verl_ascend_rollout.transport.tensors import Summary

SLICE_MILLISECONDS = 500

MAX_BUCKET_BYTES = 16 * 2**20
"""What a bucket of our transport has at most.  No tensor has to fit, and two small ones stay in the processor's cache
between the writer and the reader: 3 GiB took 1.2 times a plain copy with 16 MiB and 2.3 times with 64 MiB; 1 GiB, where
the first touch of new memory counts as well, 1.3 and 1.5 times, and 1.9 times with 256 MiB (two cores of a cloud
machine, one thread a process, plain copy 3.0 to 4.7 GB/s)."""


class ReceiverGoneError(RuntimeError):
    """The worker that should receive the weights ended the call without having received them all."""


def has_own_transport(use_shm: bool, peft_config: Any, base_sync_done: bool) -> bool:
    """Whether a weight sync goes through our transport; every rank comes to the same answer by itself.

    Not where verl's works on device memory (`use_shm` is false); nor for adapters alone and for platforms that load by
    verl's own sequence, whose receiver is inside verl.
    """
    adapter_only = bool(peft_config) and base_sync_done
    return use_shm and not adapter_only and get_device_name() in ("cpu", "npu")


def verls_handle_on(node: str, handle: str) -> str:
    """Return verl's ZeroMQ address with the node in it: two nodes with one /tmp would meet at verl's own (verl 0.9.1,
    vllm_rollout.py:151), and the workers of one take the weights' memory for that of the other.

    Args:
        node: Ray's id of it.
        handle: `ipc:///tmp/....sock`.
    """
    return on_node(handle.removesuffix(".sock"), node) + ".sock"


def ended(receiver: Any) -> WhileWaiting:
    """For a waiting sender: why the receiving call has ended, as soon as it has; never, where `receiver` is `None`."""

    def reason() -> Exception | None:
        if receiver is None or not ray.wait([receiver], timeout=0)[0]:
            return None
        try:
            ray.get(receiver)
        except Exception as error:
            # The call's own error is the one to show.
            return error
        return ReceiverGoneError(
            "The rollout worker ended its weight sync before all weights had been sent; see its log"
        )

    return reason


async def send_all(sender: WeightSender, weights: Any, receiver: Any) -> Summary:
    """Send (name, tensor) pairs, from an iterator or an asynchronous one.

    Args:
        sender: whose name the receivers have been told.
        weights: the pairs.
        receiver: the Ray reference of the receiving call; `None` on a node from which it is not made.

    Raises:
        ValueError: a name came twice, or a dtype that weights do not have.
        TransportError: a receiver failed, ended, or stands still.
        Exception: whatever the iterator raised, or the receiving call.
    """
    from verl.workers.rollout.utils import ensure_async_iterator

    sender.connect(ended(receiver))
    async for name, tensor in ensure_async_iterator(weights):
        sender.send(name, tensor)
    return sender.finish()


async def recorded(weights: Any, writer: SnapshotWriter) -> AsyncIterator[tuple[str, torch.Tensor]]:
    """Yield the (name, tensor) pairs, each when it is in the snapshot."""
    from verl.workers.rollout.utils import ensure_async_iterator

    async for name, tensor in ensure_async_iterator(weights):
        writer.add(name, tensor)
        yield name, tensor


async def drain(weights: Any) -> None:
    """Take part in making the weights, which all ranks of a trainer do together, where another rank sends them."""
    from verl.workers.rollout.utils import ensure_async_iterator

    async for _ in ensure_async_iterator(weights):
        pass


class _WatchfulSocket:
    """A ZeroMQ socket whose `send_pyobj` and `recv` end when the receiving call has ended, or nobody answers."""

    def __init__(self, socket: Any, receiver: Any, timeout: float) -> None:
        self._socket = socket
        self._receiver = receiver
        self._timeout = timeout

    def send_pyobj(self, message: Any) -> None:
        # Blocks as long as nobody has connected: for ever, if the worker died first.
        self._wait_for(zmq.POLLOUT)
        self._socket.send_pyobj(message)

    def recv(self) -> Any:
        self._wait_for(zmq.POLLIN)
        return self._socket.recv()

    def _wait_for(self, event: int) -> None:
        deadline = time.monotonic() + self._timeout
        while not self._socket.poll(SLICE_MILLISECONDS, event):
            if self._receiver is None or not ray.wait([self._receiver], timeout=0)[0]:
                if time.monotonic() > deadline:
                    raise ReceiverGoneError(
                        f"The rollout worker has taken no weights for {self._timeout:g} s ({KEY}.sync_timeout); see "
                        "its log"
                    )
                continue
            # The call is over: its own error is the one to show.
            ray.get(self._receiver)
            if not self._socket.poll(SLICE_MILLISECONDS, event):
                raise ReceiverGoneError(
                    "The rollout worker ended its weight sync before all weights had been sent; see its log"
                )

    def close(self) -> None:
        # What was not delivered to a dead receiver must not keep the process alive.
        self._socket.close(linger=0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


class WatchfulWeightSender(BucketedWeightSender):
    """verl's sender, which stops when the receiver has, and counts.

    Attributes:
        tensors, bytes: what was sent so far.
    """

    def __init__(self, *args: Any, timeout: float, receiver: Any = None, **kwargs: Any) -> None:
        """See verl's `BucketedWeightSender`.

        Args:
            timeout: seconds that the receiver may take to come, or for one bucket.
            receiver: the Ray reference of the receiving call; `None` on ranks that did not start it.
        """
        super().__init__(*args, **kwargs)
        self._receiver = receiver
        self._timeout = timeout
        self.tensors = 0
        self.bytes = 0

    async def async_send_weights(self, weights: Any) -> None:
        """Send (name, tensor) pairs, from an iterator or an asynchronous one.

        Raises:
            ValueError: a name came twice.  In one bucket the second tensor would take the first one's place unseen.
            Exception: whatever the iterator raised.  The receiver is told that the stream has ended before that, or
                it would wait for the next bucket for ever.
        """
        failures: list[Exception] = []
        await super().async_send_weights(self._until_it_fails(weights, failures))
        if failures:
            raise failures[0]

    def _init_socket(self) -> None:
        self.socket: Any
        super()._init_socket()
        if isinstance(self.socket, zmq.Socket):
            self.socket = _WatchfulSocket(self.socket, self._receiver, self._timeout)

    def _init_buffer(self) -> None:
        """Both sides have the buffer and the connection then: their names go, which a kill would leave behind."""
        super()._init_buffer()
        if self.zmq_handle.startswith("ipc://"):
            Path(self.zmq_handle.removeprefix("ipc://")).unlink(missing_ok=True)
        if self.shm is not None:
            self.shm.unlink()
            # What verl does at the end, and would fail at.
            self.shm.unlink = lambda: None

    async def _until_it_fails(self, weights: Any, failures: list[Exception]) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """Return the stream up to its end or its first failure, which is noted."""
        from verl.workers.rollout.utils import ensure_async_iterator

        sent = set()
        try:
            async for name, tensor in ensure_async_iterator(weights):
                if name in sent:
                    raise ValueError(
                        f"The trainer's weights hold {name} more than once: nothing says which one is right"
                    )
                sent.add(name)
                self.tensors += 1
                self.bytes += tensor.nbytes
                yield name, tensor
        except Exception as error:
            failures.append(error)
