"""verl's FSDP engine, which replays the rollout's routing (R3) where a job of ours asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from verl_ascend_rollout import ROLLOUT_NAME
from verl_ascend_rollout.integration.patch import Patch, patch_of

PATCHES: list[Patch] = []

ENGINE = "verl.workers.engine.fsdp.transformer_impl"


@patch_of(PATCHES, "verl.workers.engine_workers:ActorRolloutRefWorker.__init__", "self", "config", required=False)
def mark_passes(original: Callable[..., None], self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
    """Let the worker mark the passes in which routing is replayed, as it does with Megatron.

    Without the patch `enable_rollout_routing_replay=True` is ignored with FSDP: every token's experts are recorded and
    sent, and only Megatron and VeOmni use them (workers/engine_workers.py:496; verl#5392).  Remove when verl's FSDP
    engine replays.
    """
    original(self, config, *args, **kwargs)
    rollout, strategy = config.get("rollout") or {}, str((config.get("actor") or {}).get("strategy"))
    if rollout.get("name") != ROLLOUT_NAME or not rollout.get("enable_rollout_routing_replay"):
        return
    if strategy not in ("fsdp", "fsdp2"):
        return
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngine, FSDPEngineWithLMHead

    from verl_ascend_rollout.integration import routing_replay
    from verl_ascend_rollout.options import AscendSafeOptions

    routing_replay.switch_on(
        AscendSafeOptions.from_rollout(rollout).events,
        (FSDPEngine.forward_backward_batch, FSDPEngineWithLMHead.prepare_model_inputs),
    )
    # verl then says of each pass whether it is one: not that of the reference policy (engine_workers.py:62-74).
    self.enable_routing_replay = True


@patch_of(
    PATCHES,
    f"{ENGINE}:FSDPEngine.forward_backward_batch",
    "self",
    "data",
    "loss_function",
    "forward_only",
    required=False,
)
def replay_in_pass(
    original: Callable[..., Any], self: Any, data: Any, loss_function: Any, forward_only: bool = False
) -> Any:
    """Replay in the passes that are marked, and judge the record at the end of each.

    Without the patch `enable_rollout_routing_replay=True` is ignored with FSDP, whose engine has no replay
    (workers/engine/fsdp/transformer_impl.py:724).  Remove when verl's FSDP engine replays.

    The record is used until the pass is over, since a checkpoint's recomputation comes with the backward pass.
    """
    from verl.utils.tensordict_utils import get_non_tensor_data

    if not get_non_tensor_data(data, "enable_routing_replay", default=False):
        return original(self, data, loss_function, forward_only)
    from verl_ascend_rollout.integration import routing_replay

    expected = bool(data["loss_mask"].sum())
    name = routing_replay.LOG_PROB if forward_only else routing_replay.UPDATE
    with routing_replay.passing(self, name, expected) as found:
        output = original(self, data, loss_function, forward_only)
    if not forward_only:
        output["metrics"].update({name: [value] for name, value in found[0].metrics().items()})
    return output


@patch_of(PATCHES, f"{ENGINE}:FSDPEngineWithLMHead.prepare_model_inputs", "self", "micro_batch", required=False)
def hand_over_record(original: Callable[..., Any], self: Any, micro_batch: Any) -> Any:
    """Give the routers the record of the tokens that they are about to see.

    Without the patch `enable_rollout_routing_replay=True` is ignored with FSDP, whose engine does not look at
    `routed_experts` (workers/engine/fsdp/transformer_impl.py:1145).  Remove when verl's FSDP engine replays.
    """
    inputs, outputs = original(self, micro_batch)
    replay = getattr(self, "_ascend_safe_replay", None)
    if replay is None:
        return inputs, outputs
    from verl.utils.ulysses import slice_input_tensor

    from verl_ascend_rollout.integration import routing_replay

    record = micro_batch.get("routed_experts", None)
    if record is None:
        raise routing_replay.RoutingReplayError(
            f"{routing_replay.KEY}=True, and this batch has no record of routing (routed_experts): its rollout was "
            "made without; set it to False, or let every rollout of the job record"
        )
    lengths = micro_batch["input_ids"].offsets().diff().tolist()
    rows, sequence = routing_replay.lay_out(
        record,
        lengths,
        inputs["input_ids"].shape,
        packed=inputs["attention_mask"] is None,
        padding=outputs.get("pad_size", 0),
    )
    if self.use_ulysses_sp:
        rows, sequence = (slice_input_tensor(tensor, dim=0, padding=False) for tensor in (rows, sequence))
    replay.use(rows, sequence, len(lengths))
    return inputs, outputs
