"""`AscendSafeServerAdapter`: the trainer worker's side, which sends weights and asks for release and resume."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from typing import Any

import torch
from verl.workers.rollout.vllm_rollout.vllm_rollout import ServerAdapter

from verl_ascend_rollout import ROLLOUT_NAME, compat, events
from verl_ascend_rollout.options import AscendSafeOptions
from verl_ascend_rollout.trainer.weight_sender import WatchfulWeightSender


class AscendSafeServerAdapter(ServerAdapter):
    """verl's adapter, which finds our server, and does not wait for a receiver that has failed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See verl's `ServerAdapter`.

        Raises:
            CompatError: verl has drifted away from something that we rely on.
            OptionError: an unknown option of ours, or a bad value.
        """
        compat.assert_intact()
        super().__init__(*args, **kwargs)
        self._events = AscendSafeOptions.from_rollout(self.config).events

    def _get_server_name_prefix(self) -> str:
        return f"{ROLLOUT_NAME}_"

    @torch.no_grad()
    async def update_weights(
        self,
        weights: Generator[tuple[str, torch.Tensor], None, None],
        global_steps: int | None = None,
        wire_format: str = "named_tensors",
        **kwargs: Any,
    ) -> None:
        """Send a full set of weights to the rollout engine.  Same arguments as verl's.

        Raises:
            Exception: what made the receiving worker fail, instead of a wait without end.
        """
        if wire_format != "named_tensors":
            await super().update_weights(weights, global_steps=global_steps, wire_format=wire_format, **kwargs)
            return
        started = time.perf_counter()
        receiver = await self._execute_method(
            "update_weights_from_ipc", non_block=True, kwargs={**kwargs, "use_shm": self.use_shm}
        )
        sender = WatchfulWeightSender(
            zmq_handle=self.zmq_handle,
            bucket_size_mb=self.config.checkpoint_engine.update_weights_bucket_megabytes,
            use_shm=self.use_shm,
            receiver=receiver,
        )
        try:
            await sender.async_send_weights(weights)
        except Exception as error:
            # The sender's error is the cause; but the server must know before anyone goes on, and the worker may have
            # taken the end of the stream for the end of the weights.
            if receiver is not None:
                with contextlib.suppress(Exception):
                    await receiver
                await self.server_handle.doubt_weights.remote(str(error))
            raise
        if receiver is not None:
            await receiver
        # Blocks that were computed with the old weights must not answer for the new ones.
        if self._has_server:
            await self.server_handle.clear_kv_cache.remote()
            if global_steps is not None:
                await self.server_handle.set_global_steps.remote(global_steps)
        events.emit(
            events.Event(
                step="sync",
                process="trainer",
                seconds=time.perf_counter() - started,
                detail={"global_steps": global_steps, "replica": self.replica_rank, "rank": self.rollout_rank},
            ),
            self._events,
        )
