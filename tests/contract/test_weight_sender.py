"""verl's weight sender, as ours subclasses it, waits for nobody without end."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
import torch


def test_a_sender_that_no_worker_comes_to_ends_with_a_sentence(tmp_path: Path) -> None:
    """On the further nodes of an engine nobody says that the worker is gone (`receiver` is None)."""
    from verl_ascend_rollout.integration.weight_sender import ReceiverGoneError, WatchfulWeightSender

    sender = WatchfulWeightSender(
        zmq_handle=f"ipc://{tmp_path}/socket", bucket_size_mb=1, use_shm=True, timeout=0.6, receiver=None
    )
    started = time.perf_counter()
    with pytest.raises(ReceiverGoneError, match=r"has taken no weights for 0\.6 s .*sync_timeout.*see its log"):
        asyncio.run(sender.async_send_weights(iter([("weight", torch.zeros(4))])))
    assert time.perf_counter() - started < 5
