"""One full weight sync of a model: present, load, check, restore and derive.

For every kernel whose layouts were recorded (see `layout`).  `identity` and `transposed` weights are loaded in place,
through views in checkpoint form over the kernels' own tensors; `blocked` ones are copied into their blocks; layers with
`repacked` ones are rebuilt one at a time (see `staging`).  The model's own `load_weights` does the loading in the first
sync, so that tensor and expert parallelism, fused projections and tied weights are its business; later syncs repeat
what it did (see `plan`, `replay`).  What a layer derives from its weights is derived again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from verl_ascend_rollout.transport.stream import NamedTensor
from verl_ascend_rollout.worker.weights import derived, expert_format, merged_experts, padding, tied
from verl_ascend_rollout.worker.weights.layout import recorded_layers
from verl_ascend_rollout.worker.weights.load import LoaderPass
from verl_ascend_rollout.worker.weights.manifest import Manifest, WeightSyncError, few
from verl_ascend_rollout.worker.weights.plan import Plan
from verl_ascend_rollout.worker.weights.replay import ReplayPass
from verl_ascend_rollout.worker.weights.staging import Staging

Loader = Callable[[Iterable[NamedTensor]], None]

BATCH_BYTES = 64 * 2**20
"""How much is loaded at once: a model's loader looks through all of its parameters each time that it is called."""


@contextmanager
def reload(model: torch.nn.Module, model_config: Any, manifest: Manifest, plan: Plan | None = None) -> Iterator[Loader]:
    """Run one full weight sync: present, load as often as buckets come, restore and derive.

    Args:
        model: the model whose every parameter is to be loaded again.
        model_config: vLLM's ModelConfig, whose dtype the attention layers' processing wants.
        manifest: what was expected and what has come; checked here, before the model is used again.
        plan: what an earlier sync of this model wrote down, to be repeated; empty: to be filled.

    Yields:
        A function that takes weights in checkpoint form.  Each tensor is copied before it returns.

    Raises:
        WeightSyncError: the stream was not the whole model, or not this model, or a layer's kernel form is no view of
            the checkpoint form.  Generate nothing until a full sync has passed.
        LayoutError: a weight is in no form that was recorded for it.
    """
    reason = obstacle(model)
    if reason:
        raise WeightSyncError(reason)
    plan = plan if plan is not None else Plan()
    expert_format.to_checkpoint_format(model)
    _clear_padding(model)
    staging = Staging(model, plan.packed if plan.replayable else None)
    kind = ReplayPass if plan.replayable else LoaderPass
    sync: LoaderPass | ReplayPass = kind(
        model, manifest, plan, staging, lambda name, tensor: merged_experts.parts(name, tensor, model_config)
    )
    heads = tied.Heads(model)

    def load(weights: Iterable[NamedTensor]) -> None:
        for batch in batches(heads.once(weights, manifest.refuse)):
            with as_when_made(model_config):
                sync.load(batch)

    try:
        yield load
        heads.check(manifest.refuse)
        manifest.check_findings(sync.findings())
        with as_when_made(model_config):
            staging.process_rest()
        sync.keep_plan()
    except BaseException:
        # Whatever was surprising, the next sync asks the model's loader again.
        plan.forget()
        raise
    finally:
        # Also after a failure: half-loaded weights in kernel form can be loaded again, and are never generated from.
        staging.give_up()
        expert_format.restore_kernel_format(model)
    with as_when_made(model_config):
        _derive_again(model, model_config, staging)


@contextmanager
def as_when_made(model_config: Any) -> Iterator[None]:
    """Within the block, the default dtype is as when vLLM loads and processes a new model (0.11 to 0.28,
    base_loader.py, load_model)."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(model_config.dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def batches(weights: Iterable[NamedTensor]) -> Iterator[list[NamedTensor]]:
    """Yield lists of about `BATCH_BYTES`: a layer is rebuilt, and its memory let go, at the end of each."""
    batch: list[NamedTensor] = []
    size = 0
    for name, tensor in weights:
        batch.append((name, tensor))
        size += tensor.nbytes
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def unwrapped(runner: Any) -> Any:
    """Return the runner's model without the wrapper of captured graphs, which has no modules of its own (vllm-ascend's
    ACLGraphWrapper, vLLM's CUDAGraphWrapper)."""
    model = runner.model
    return model.unwrap() if hasattr(model, "unwrap") else model


NOT_RECORDED = (
    "The layouts of this engine's weights were not recorded when it was made: its worker process did not load the vLLM "
    "plug-in `ascend_safe`; look for VLLM_PLUGINS, which must name it if it is set"
)


def obstacle(model: torch.nn.Module) -> str:
    """Return why this model cannot be loaded by its recorded layouts; empty if it can."""
    if not any(True for _ in recorded_layers(model)):
        return NOT_RECORDED
    gone = list(_thrown_away(model))
    if gone:
        return (
            f"{few(gone)} {'was' if len(gone) == 1 else 'were'} thrown away by the engine after loading, as "
            "vllm-ascend's sparse attention does, so that no sync can load it again: set "
            "actor_rollout_ref.rollout.engine_kwargs.vllm.additional_config.rl_config.enabled=True, with which "
            "vllm-ascend keeps it from 0.28 on (vllm-ascend#16700)"
        )
    found = [*expert_format.not_loadable_in_place(model), *_derived_beside_transposed(model)]
    if not found:
        return ""
    reason = f"{len(found)} weights have a kernel form that is no view of the checkpoint's: {few(found)}"
    if any(layer_record.device == "cuda" for _, _, layer_record in recorded_layers(model)):
        return reason
    return (
        f"{reason}; on Ascend set VLLM_ASCEND_ENABLE_NZ=0 and additional_config.weight_nz_mode=0, and leave fused MC2 "
        "off"
    )


def _thrown_away(model: torch.nn.Module) -> Iterator[str]:
    """Weights that the processing left where they were, and that have no elements now: vllm-ascend's `dispose_layer` of
    `kv_b_proj` for DeepSeek-V3.2 and GLM-5 (0.13 to 0.25, attention/sfa_v1.py; 0.28 without its `rl_config`)."""
    for prefix, layer, found in recorded_layers(model):
        for name, weight in found.weights.items():
            parameter = getattr(layer, name, None)
            in_place = weight.layout in ("identity", "transposed")
            if in_place and 0 not in weight.shape and isinstance(parameter, torch.Tensor) and not parameter.numel():
                yield f"{prefix}.{name}"


def _derived_beside_transposed(model: torch.nn.Module) -> list[str]:
    """Layers whose processing both transposes and derives: running it once more would transpose once more."""
    return [
        f"{prefix} (derives {', '.join(found.derived)} beside transposed weights)"
        for prefix, _, found in recorded_layers(model)
        if found.derived and any(weight.layout == "transposed" for weight in found.weights.values())
    ]


def _clear_padding(model: torch.nn.Module) -> None:
    """Clear the parameters of which no checkpoint fills all, where they are loaded in place: memory that a sleep of
    level 2 has discarded comes back undefined (vLLM 0.28, device_allocator/cumem.py)."""
    elsewhere = {
        f"{prefix}.{name}"
        for prefix, _, found in recorded_layers(model)
        for name, weight in found.weights.items()
        if weight.layout not in ("identity", "transposed")
    }
    for name in padding.padded(model).keys() - elsewhere:
        model.get_parameter(name).data.zero_()


def _derive_again(model: torch.nn.Module, model_config: Any, staging: Staging) -> None:
    """Bring what layers keep beside their weights up to date, at the same addresses."""
    for prefix, layer, found in recorded_layers(model):
        if found.derived and not staging.has(layer):
            derived.process_again(layer, found, prefix)
    derived.process_attention(model, model_config.dtype)
    derived.make_again(model)
