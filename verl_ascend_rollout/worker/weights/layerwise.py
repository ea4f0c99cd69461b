"""A weight sync through vLLM's own bracket (model_executor/model_loader/reload): initialise, load, finalise.

For kernels whose weights are no view of the checkpoint's, such as FlashInfer's experts on Blackwell, blocked in four
dimensions, which verl's own sequence cannot load (verl#7978).  vLLM puts the parameters of each layer on the meta
device in checkpoint form, keeps what their loaders are given until the layer is complete, then gives the layer memory,
loads it, lets its own code process it, and copies the result to where the kernel's tensors are, which captured graphs
know.

vLLM (0.24 to 0.33) logs what is missing and drops what is too much.  So here all writes are counted twice (see
`account`): on the meta device, where each is traced to its tensor, and in the layer's memory, before the layer is
processed.  What else vLLM does without a word is put right (see `meta_layers`), or refused:

- it keeps tensors that lie in a bucket which is used again: they are copied first, which takes memory for one layer;
- a layer's buffers that no checkpoint has take what happens to lie in fresh memory (0.24, 0.25: all; later: persistent
  ones), and those that are views of parameters may be lost: they stay where they are;
- it counts copies that loaders make: a parameter of one element, which is filled, and what a model writes past its
  loaders (see `unseen_writes`) keep the old policy;
- of tied weights one layer is processed: a head that oneDNN has packed keeps the old policy;
- packed experts on a CPU come out unpacked, since their method packs for a new kernel only (0.28 to 0.33,
  unquantized_fused_moe_method.py);
- what a layer derives and is no parameter gets a new address (0.24: MLA's `W_UV`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from verl_ascend_rollout.transport.stream import NamedTensor
from verl_ascend_rollout.worker.weights import derived, expert_format, merged_experts, tied, vllm_reload
from verl_ascend_rollout.worker.weights import sync as weight_sync
from verl_ascend_rollout.worker.weights.layout import record, recorded_layers
from verl_ascend_rollout.worker.weights.load import LoaderPass
from verl_ascend_rollout.worker.weights.manifest import Manifest, WeightSyncError, few
from verl_ascend_rollout.worker.weights.meta_layers import MetaLayers
from verl_ascend_rollout.worker.weights.plan import Plan
from verl_ascend_rollout.worker.weights.region import storage_of

Loader = Callable[[Iterable[NamedTensor]], None]

WITHOUT_DERIVED = ("MMEncoderAttention",)
"""Names of classes whose own processing derives nothing from weights (0.24 to 0.33: scales of fp8 from a file)."""


@contextmanager
def reload(model: torch.nn.Module, model_config: Any, manifest: Manifest, plan: Plan | None = None) -> Iterator[Loader]:
    """Run one full weight sync: initialise, load as often as buckets come, finalise.

    Args:
        model: the model whose every parameter is to be loaded again.
        model_config: vLLM's ModelConfig.
        manifest: what was expected and what has come; checked here, before the model is used again.
        plan: keeps the names of the last sync that passed; is never replayed.

    Yields:
        A function that takes weights in checkpoint form.  Each tensor is copied before it returns.

    Raises:
        WeightSyncError: the stream was not the whole model, or not this model, or vLLM's bracket does not fit it.
            Generate nothing until a full sync has passed.
    """
    reason = obstacle(model)
    if reason:
        raise WeightSyncError(reason)
    plan = plan if plan is not None else Plan()
    expert_format.restore_kernel_format(model)
    heads = tied.Heads(model)
    # For what loaders make of tensors, which cannot be looked at before it is there, and has no tensor's name then.
    values = Manifest(finite=manifest.finite, sync=manifest.sync, names=manifest.names)
    layers = MetaLayers(model, model_config, values)
    # Nothing can be read back from the meta device; that the kernels have got what came is looked at in `MetaLayers`.
    manifest.compare = False

    def load(weights: Iterable[NamedTensor]) -> None:
        # vLLM keeps tensors, and the bucket is used again.
        weights = (
            (name, tensor.clone(memory_format=torch.contiguous_format))
            for name, tensor in heads.once(weights, manifest.refuse)
        )
        for batch in weight_sync.batches(weights):
            with weight_sync.as_when_made(model_config), layers.writes:
                sync.load(batch)

    try:
        with layers.opened():
            sync = LoaderPass(
                model, manifest, plan, layers, lambda name, tensor: merged_experts.parts(name, tensor, model_config)
            )
            layers.not_plain = sync.not_plain
            yield load
            manifest.check_findings(sync.findings())
            with weight_sync.as_when_made(model_config), derived.in_place(derived.implementations(model)):
                layers.finish()
            derived.make_again(model)
        heads.check(manifest.refuse)
        manifest.check()
        values.check()
        sync.keep_names()
    except BaseException:
        layers.give_up()
        raise


def obstacle(model: torch.nn.Module) -> str:
    """Return why vLLM's bracket cannot sync this model; empty if it can."""
    lacking = vllm_reload.missing()
    if lacking:
        return lacking
    if not any(True for _ in recorded_layers(model)):
        return weight_sync.NOT_RECORDED
    found = list(_obstacles(model))
    return f"vLLM's layerwise reload does not fit this model: {few(found)}" if found else ""


def _obstacles(model: torch.nn.Module) -> Iterator[str]:
    # A method that is an operator of vLLM's own is a module itself.
    methods = {id(getattr(layer, "quant_method", None)) for layer in model.modules()}
    memory = {storage_of(parameter) for parameter in model.parameters()}
    for prefix, layer in model.named_modules():
        name = prefix or type(model).__name__
        metadata, buffers = vllm_reload.info(layer).restore_metadata
        if vllm_reload.is_attention(layer):
            if metadata:
                yield f"{name} has weights of its own ({', '.join(metadata)}), which it leaves out for attention layers"
            continue
        for own, buffer in layer.named_buffers(recurse=False):
            if own not in buffers and not vllm_reload.stays_in_place(own) and storage_of(buffer) not in memory:
                yield f"{name}.{own} was a view of a parameter that has been replaced since, and would not be loaded"
        derives = callable(getattr(layer, "process_weights_after_loading", None)) and id(layer) not in methods
        if derives and type(layer).__name__ not in WITHOUT_DERIVED:
            yield f"{name} derives something from its weights, for which it has no step"
        known = record(layer)
        derived = known.derived if known is not None else ()
        for own, parameter in layer.named_parameters(recurse=False):
            if own not in metadata and own not in derived and not vllm_reload.stays_in_place(own):
                yield f"{name}.{own} was made after the model, so that it is not known there"
            elif getattr(parameter, "_vllm_is_uva_offloaded", False):
                yield f"{name}.{own} is offloaded to the host"
