"""verl's weight sender, as ours subclasses it, waits for nobody without end."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from verl_ascend_rollout.options import AscendSafeOptions


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


@pytest.mark.parametrize("fails", [True, False])
def test_a_worker_that_waits_for_another_rank_is_not_waited_for_without_end(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verl's transport, an engine of two workers: of one rank's stream that ends early, the call to both never ends."""
    from verl_ascend_rollout.integration import adapter
    from verl_ascend_rollout.transport.messages import TransportError

    stale: list[str] = []

    class Sender:
        tensors = bytes = 0

        def __init__(self, **_: Any) -> None: ...

        async def async_send_weights(self, weights: Any) -> None:
            if fails:
                raise MemoryError("in the gather")

    class Rank(adapter.AscendSafeServerAdapter):
        def __init__(self) -> None:
            self.config = SimpleNamespace(checkpoint_engine=SimpleNamespace(update_weights_bucket_megabytes=1))
            self.zmq_handle, self.use_shm = "ipc:///nowhere", False
            self._options = AscendSafeOptions(sync_timeout=0.2)

        async def _as_the_workers_take_it(self, weights: Any, kwargs: Any, bucket_bytes: int) -> Any:
            return weights

        async def _execute_method(self, *_: Any, **__: Any) -> Any:
            return asyncio.Event().wait()

        async def _mark_weights_stale(self, error: Exception) -> None:
            stale.append(str(error))

    monkeypatch.setattr(adapter, "WatchfulWeightSender", Sender)
    with pytest.raises(
        (MemoryError, TransportError), match="in the gather" if fails else "not finished loading for 0.2 s"
    ):
        asyncio.run(asyncio.wait_for(Rank()._send_by_verl(iter(()), {}), 20))
    assert len(stale) == 1
