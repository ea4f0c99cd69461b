"""`AscendSafeServerAdapter`: the trainer worker's side, which sends weights and asks for release and resume."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import time
from collections.abc import Generator
from typing import Any

import torch
from verl.workers.rollout.vllm_rollout.vllm_rollout import ServerAdapter

from verl_ascend_rollout import ROLLOUT_NAME, compat, events
from verl_ascend_rollout.options import AscendSafeOptions
from verl_ascend_rollout.trainer.weight_sender import (
    MAX_BUCKET_BYTES,
    WatchfulWeightSender,
    drain,
    has_own_transport,
    send_all,
)
from verl_ascend_rollout.transport.messages import PeerFailedError, TransportError
from verl_ascend_rollout.transport.sender import WeightSender

SYNC_METHOD = "update_weights_from_ipc"

FAILURE_SECONDS = 30.0
"""How long a worker that broke off may take to say why."""


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
        self._options = AscendSafeOptions.from_rollout(self.config)
        self._events = self._options.events
        self._syncs = 0

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
            TransportError: the weights did not reach the rollout worker; with the reason.
            Exception: what made the receiving worker fail, instead of a wait without end.
        """
        if wire_format != "named_tensors":
            await super().update_weights(weights, global_steps=global_steps, wire_format=wire_format, **kwargs)
            return
        started = time.perf_counter()
        if self._has_own_transport(kwargs):
            moved = await self._send_by_shared_memory(weights, kwargs)
        else:
            moved = {}
            await self._send_by_verl(weights, kwargs)
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
                detail={"global_steps": global_steps, "replica": self.replica_rank, "rank": self.rollout_rank, **moved},
            ),
            self._events,
        )

    # ----------------------------------------------------------------------------------------------------------------

    def _workers(self) -> int:
        """How many worker processes this replica's engine has."""
        config = self.config
        return int(config.tensor_model_parallel_size * config.pipeline_model_parallel_size * config.data_parallel_size)

    def _has_own_transport(self, kwargs: dict[str, Any]) -> bool:
        return has_own_transport(
            use_shm=self.use_shm,
            rollout_workers=self._workers(),
            # verl's adapter asks the same of the environment.
            workers_on_a_node=int(os.environ["RAY_LOCAL_WORLD_SIZE"]),
            peft_config=kwargs.get("peft_config"),
            base_sync_done=bool(kwargs.get("base_sync_done", False)),
        )

    async def _send_by_shared_memory(self, weights: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """One sender for all workers of the engine; the other ranks of the trainer only help to make the weights.

        Returns:
            What was moved, for the event.
        """
        if not self._has_server:
            await drain(weights)
            return {}
        timeout = self._options.sync_timeout
        megabytes = int(self.config.checkpoint_engine.update_weights_bucket_megabytes)
        self._syncs += 1
        receiver = None
        try:
            with WeightSender(
                receivers=self._workers(),
                bucket_bytes=min(megabytes << 20, MAX_BUCKET_BYTES),
                checksums=self._options.verify == "always" or (self._options.verify == "first" and self._syncs == 1),
                timeout=timeout,
            ) as sender:
                receiver = await self._execute_method(
                    SYNC_METHOD,
                    non_block=True,
                    kwargs={**kwargs, "use_shm": True, "rendezvous": sender.folder, "timeout": timeout},
                )
                moved = await send_all(sender, weights, receiver)
        except Exception as error:
            if receiver is None:
                raise
            reason = await _failure_of(receiver, min(timeout, FAILURE_SECONDS))
            await self._doubt_weights(error)
            # A worker that failed says so on the connection as well, in fewer words.
            if isinstance(error, PeerFailedError) and reason is not None:
                raise reason from error
            raise
        try:
            # The worker has all weights, and processes the last of them.
            await asyncio.wait_for(receiver, timeout)
        except asyncio.TimeoutError:
            stuck = TransportError(f"The rollout worker has all weights and has not finished loading for {timeout:g} s")
            await self._doubt_weights(stuck)
            raise stuck from None
        return dataclasses.asdict(moved)

    async def _send_by_verl(self, weights: Any, kwargs: dict[str, Any]) -> None:
        receiver = await self._execute_method(SYNC_METHOD, non_block=True, kwargs={**kwargs, "use_shm": self.use_shm})
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
                await self._doubt_weights(error)
            raise
        if receiver is not None:
            await receiver

    async def _doubt_weights(self, error: Exception) -> None:
        # A server that is gone generates nothing anyway.
        with contextlib.suppress(Exception):
            await self.server_handle.doubt_weights.remote(str(error))


async def _failure_of(receiver: Any, timeout: float) -> Exception | None:
    """The error with which the receiving call ends; `None` where it ends without, or not in time."""
    try:
        await asyncio.wait_for(receiver, timeout)
    except asyncio.TimeoutError:
        return None
    except Exception as error:
        return error
    return None
