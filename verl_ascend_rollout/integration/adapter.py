"""`AscendSafeServerAdapter`: the trainer worker's side, which sends weights and asks for release and resume."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Generator
from typing import Any

import ray
import torch
from verl.workers.rollout.vllm_rollout.vllm_rollout import ServerAdapter

from verl_ascend_rollout import ROLLOUT_NAME, events
from verl_ascend_rollout.engine.death import EngineDiedError
from verl_ascend_rollout.engine.metrics import SYNC_METHOD
from verl_ascend_rollout.integration.expert_stream import ExpertStream
from verl_ascend_rollout.integration.patch import assert_intact
from verl_ascend_rollout.integration.weight_sender import (
    MAX_BUCKET_BYTES,
    WatchfulWeightSender,
    drain,
    has_own_transport,
    recorded,
    send_all,
    verls_handle_on,
)
from verl_ascend_rollout.options import KEY, AscendSafeOptions, OptionError
from verl_ascend_rollout.transport.messages import PeerFailedError, TransportError
from verl_ascend_rollout.transport.rendezvous import on_node
from verl_ascend_rollout.transport.sender import WeightSender
from verl_ascend_rollout.transport.snapshot import SnapshotWriter

logger = logging.getLogger("verl_ascend_rollout.trainer")

FAILURE_SECONDS = 30.0
"""How long a worker that broke off may take to say why."""

NO_SNAPSHOT = (
    "the weights of this job do not go through this plug-in's shared memory on one node, where a copy of them is kept"
)


class AscendSafeServerAdapter(ServerAdapter):
    """verl's adapter, which finds our server, and does not wait for a receiver that has failed."""

    server_handle: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See verl's `ServerAdapter`.

        Raises:
            DriftError: verl has drifted away from something that we rely on.
            OptionError: an unknown option of ours, or a bad value.
        """
        assert_intact()
        super().__init__(*args, **kwargs)
        self._options = AscendSafeOptions.from_rollout(self.config)
        self._events = self._options.events
        self._node = ray.get_runtime_context().get_node_id()
        self.zmq_handle: str = verls_handle_on(self._node, self.zmq_handle)
        self._syncs = 0
        self._experts: str | None = None
        self._snapshot = SnapshotWriter() if self._options.on_engine_death == "restart" else None

    def _get_server_name_prefix(self) -> str:
        return f"{ROLLOUT_NAME}_"

    def _ensure_server_handle(self) -> bool:
        """Return whether this worker is the one that speaks with its replica's server, once it can."""
        if hasattr(ServerAdapter, "_ensure_server_handle"):
            return bool(super()._ensure_server_handle())
        # verl 0.7.1 asks for it where it calls, by a name without the rollout's (vllm_rollout.py:131-134).
        if self.rollout_rank == 0 and self.server_handle is None:
            self.server_handle = ray.get_actor(f"vllm_server_{self.replica_rank}_{self.node_rank}")
        return bool(self.rollout_rank == 0)

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
        on_one_node = self._workers() == self._workers_here()
        if self._snapshot is not None and not (on_one_node and self._has_own_transport(kwargs)):
            raise OptionError(f"{KEY}.on_engine_death=restart is not possible: {NO_SNAPSHOT}; set it to stop")
        if self._has_own_transport(kwargs):
            moved = await self._send_by_shared_memory(weights, kwargs)
        else:
            moved = await self._send_by_verl(weights, kwargs)
        # Blocks that were computed with the old weights must not answer for the new ones.
        if self._ensure_server_handle():
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

    def _workers_here(self) -> int:
        """How many of them the node of this rank has: as many as trainer workers, which verl's adapter takes from the
        same variable."""
        return min(self._workers(), int(os.environ["RAY_LOCAL_WORLD_SIZE"]))

    def _bucket_bytes(self) -> int:
        return int(self.config.checkpoint_engine.update_weights_bucket_megabytes) << 20

    def _has_own_transport(self, kwargs: dict[str, Any]) -> bool:
        return has_own_transport(
            use_shm=self.use_shm,
            peft_config=kwargs.get("peft_config"),
            base_sync_done=bool(kwargs.get("base_sync_done", False)),
        )

    async def _as_the_workers_take_it(self, weights: Any, kwargs: dict[str, Any], bucket_bytes: int) -> Any:
        """Return the stream with experts merged, where verl is about to take them apart and no worker needs that.

        A sync of LoRA's stays as verl sends it.

        Args:
            weights: what verl gave.
            kwargs: of `update_weights`.
            bucket_bytes: the most that one tensor of experts may have.
        """
        if not isinstance(weights, ExpertStream) or kwargs.get("peft_config"):
            return weights
        if self._experts is None:
            self._experts = await self._ask_for_experts()
        if self._experts == "apart":
            return weights
        return weights.merged(bucket_bytes, slices=self._experts == "slices")

    async def _ask_for_experts(self) -> str:
        """How this replica's workers take a layer's experts: `apart`, `whole`, or `slices` where whole is too large.

        `apart` where nobody says: all workers take that, on every weight path.
        """
        try:
            if self._ensure_server_handle():
                server = self.server_handle
            else:
                # Such a rank sends as well, to workers of its own node; the server of the first has the engine.
                server = ray.get_actor(f"{self._get_server_name_prefix()}server_{self.replica_rank}_0")
            explained = await asyncio.wait_for(server.explain.remote(), self._options.sync_timeout)
            forms = {worker["experts"] for worker in explained["workers"]}
        except Exception as error:
            logger.warning(
                "Experts are sent one by one, since the server of replica %d did not say how its workers take them: %r",
                self.replica_rank,
                error,
            )
            return "apart"
        return str(forms.pop()) if forms in ({"whole"}, {"slices"}) else "apart"

    async def _send_by_shared_memory(self, weights: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """One sender a node, for the engine's workers there; the trainer's other ranks only help to make the weights.

        Returns:
            What was moved, for the event.
        """
        has_server = self._ensure_server_handle()
        if not has_server and (self._workers() == self._workers_here() or self.rollout_rank % self._workers_here()):
            await drain(weights)
            return {}
        timeout = self._options.sync_timeout
        bucket_bytes = min(self._bucket_bytes(), MAX_BUCKET_BYTES)
        weights = await self._as_the_workers_take_it(weights, kwargs, bucket_bytes)
        self._syncs += 1
        # The same on all nodes of an engine, whose ranks count alike; of prefill and decode each has its own.
        engine = self.rollout_rank if has_server else 0
        name = f"{ray.get_runtime_context().get_job_id()}-{self.replica_rank}-{engine}-{self._syncs}"
        if self._snapshot is not None:
            self._snapshot.begin(self._syncs)
            weights = recorded(weights, self._snapshot)
        receiver = None
        try:
            with WeightSender(
                receivers=self._workers_here(),
                bucket_bytes=bucket_bytes,
                checksums=self._options.verify == "always" or (self._options.verify == "first" and self._syncs == 1),
                timeout=timeout,
                name=on_node(name, self._node),
            ) as sender:
                receiver = await self._execute_method(
                    SYNC_METHOD,
                    non_block=True,
                    kwargs={**kwargs, "use_shm": True, "rendezvous": name, "timeout": timeout},
                )
                moved = await send_all(sender, weights, receiver)
        except Exception as error:
            if receiver is None:
                raise
            reason = await _failure_of(receiver, min(timeout, FAILURE_SECONDS))
            if self._snapshot is not None and isinstance(reason, EngineDiedError):
                # The engine that is made again takes them from the snapshot, once it is whole.
                await drain(weights)
                return await self._keep_snapshot(self._snapshot)
            await self._mark_weights_stale(error)
            # A worker that failed says so on the connection as well, in fewer words.
            if isinstance(error, PeerFailedError) and reason is not None:
                raise reason from error
            raise
        if receiver is None:
            return dataclasses.asdict(moved)
        try:
            await self._wait_for_the_load(receiver, timeout)
        except EngineDiedError:
            if self._snapshot is None:
                raise
        kept = {} if self._snapshot is None else await self._keep_snapshot(self._snapshot)
        return {**dataclasses.asdict(moved), **kept}

    async def _keep_snapshot(self, writer: SnapshotWriter) -> dict[str, Any]:
        """Hand the snapshot of this sync to the server, which returns when it has an engine with these weights."""
        snapshot = writer.finish()
        await self.server_handle.keep_snapshot.remote(snapshot.as_dict())
        return {"snapshot_bytes": snapshot.bytes, "snapshot_seconds": snapshot.seconds}

    async def _send_by_verl(self, weights: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Each rank to the worker that it shares a device with.

        Returns:
            What was moved, for the event.
        """
        # A larger one goes around the bucket, by a handle of its own, or not at all (verl 0.9.1,
        # bucketed_weight_transfer.py:122).
        weights = await self._as_the_workers_take_it(weights, kwargs, self._bucket_bytes())
        receiver = await self._execute_method(SYNC_METHOD, non_block=True, kwargs={**kwargs, "use_shm": self.use_shm})
        sender = WatchfulWeightSender(
            zmq_handle=self.zmq_handle,
            bucket_size_mb=self.config.checkpoint_engine.update_weights_bucket_megabytes,
            use_shm=self.use_shm,
            timeout=self._options.sync_timeout,
            receiver=receiver,
        )
        try:
            await sender.async_send_weights(weights)
        except Exception as error:
            # The sender's error is the cause; but the server must know before anyone goes on, and the worker may have
            # taken the end of the stream for the end of the weights.
            if receiver is not None:
                # Of several workers the others may wait for ranks that have not failed.
                await _failure_of(receiver, min(self._options.sync_timeout, FAILURE_SECONDS))
                await self._mark_weights_stale(error)
            raise
        if receiver is not None:
            await self._wait_for_the_load(receiver, self._options.sync_timeout)
        return {"tensors": sender.tensors, "bytes": sender.bytes}

    async def _wait_for_the_load(self, receiver: Any, timeout: float) -> None:
        """Wait for the workers, which have all weights of this rank, and process the last of them.

        Raises:
            TransportError: they have not finished after `timeout` seconds.
        """
        try:
            await asyncio.wait_for(receiver, timeout)
        except asyncio.TimeoutError:
            stuck = TransportError(f"The rollout worker has all weights and has not finished loading for {timeout:g} s")
            await self._mark_weights_stale(stuck)
            raise stuck from None

    async def _mark_weights_stale(self, error: Exception) -> None:
        # A server that is gone generates nothing anyway.
        with contextlib.suppress(Exception):
            await self.server_handle.mark_weights_stale.remote(str(error))


async def _failure_of(receiver: Any, timeout: float) -> Exception | None:
    """Return the error with which the receiving call ends; `None` where it ends without, or not in time."""
    try:
        await asyncio.wait_for(receiver, timeout)
    except asyncio.TimeoutError:
        return None
    except Exception as error:
        return error
    return None
