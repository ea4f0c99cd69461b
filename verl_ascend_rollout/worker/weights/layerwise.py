"""Reloading weights whose kernel form is no view of the checkpoint form: one layer at a time, through its own code.

On a CPU, vLLM packs linear weights for oneDNN and leaves the parameter empty, and packs experts for AMX in place.
A second `load_weights` on such a layer is refused at best (linear: shape (0,)), and at worst accepted (experts: the
packed tensor has the same shape), so that the model goes on with wrong weights.  vLLM's layerwise reload rebuilds each
layer from its checkpoint form and runs the layer's own `process_weights_after_loading`; used alone it is silently wrong
for experts in vLLM 0.28, because their method skips the packing once it has a kernel
(unquantized_fused_moe_method.py:134-149).  Here that kernel is forgotten first, so that the packing runs again.
Measured bit-exact against a fresh engine: tests/engine/test_weight_sync.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from verl_ascend_rollout.worker.weights import fused_experts, loaders, tied
from verl_ascend_rollout.worker.weights.verify import Manifest, WeightSyncError

NamedTensor = tuple[str, torch.Tensor]
Loader = Callable[[Iterable[NamedTensor]], None]


@dataclass
class _Received:
    """What one sync has brought so far."""

    names: set[str] = field(default_factory=set)
    buffers: list[NamedTensor] = field(default_factory=list)
    tied: dict[str, torch.Tensor] = field(default_factory=dict)


@contextmanager
def reload(model: torch.nn.Module, model_config: Any, manifest: Manifest) -> Iterator[Loader]:
    """One full weight sync: initialise, load as often as buckets come, finalise.

    Args:
        model: the model whose every parameter is to be loaded again.
        model_config: vLLM's ModelConfig, which the attention layers' processing wants.
        manifest: what was expected and what has come; checked here, before the model is used again.

    Yields:
        A function that takes (name, tensor) pairs in checkpoint form.  The tensors may be kept until the bracket ends:
        a caller that reuses their memory hands over copies.

    Raises:
        WeightSyncError: the stream was not the whole model, or not this model.  The model is unusable until a full
            sync has passed.
    """
    from verl.workers.rollout.vllm_rollout.weight_update_utils import apply_buffer_updates, split_buffer_updates
    from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload, initialize_layerwise_reload

    lacking = loaders.complaint(model)
    if lacking:
        raise WeightSyncError(lacking)
    received = _Received()
    names = tied.aliases(model)
    load_weights: Any = model.load_weights
    _forget_prepacked_experts(model)
    initialize_layerwise_reload(model)

    def load(weights: Iterable[NamedTensor]) -> None:
        stream = [(name, tensor) for name, tensor in weights if manifest.receive(name, tensor)]
        parameter_updates, buffer_updates, _ = split_buffer_updates(model, stream)
        received.buffers.extend(buffer_updates)
        if parameter_updates:
            split = fused_experts.split(parameter_updates, model_config)
            received.names.update(load_weights(tied.doubled(split, names, received.tied)) or ())

    try:
        yield load
        manifest.check(missing=_missing_parameters(model, received.names))
    except BaseException:
        _forget_partial_layers(model)
        raise
    with _without_false_alarms():
        finalize_layerwise_reload(model, model_config)
    _restore_capture_functions(model)
    apply_buffer_updates(model, received.buffers)


@contextmanager
def _without_false_alarms() -> Iterator[None]:
    """Within the block, vLLM does not say "Failed to load weights" of layers that have none, such as rotary embeddings.

    It counts buffers as loadable (vllm 0.28, reload/utils.py:31).  A parameter that did not come is an error before.
    """
    vllm_logger = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")

    def is_news(record: logging.LogRecord) -> bool:
        return "Failed to load weights" not in str(record.msg)

    vllm_logger.addFilter(is_news)
    try:
        yield
    finally:
        vllm_logger.removeFilter(is_news)


def _missing_parameters(model: torch.nn.Module, loaded: set[str]) -> list[str]:
    """The model's own names of parameters that were not loaded, or not wholly.

    Two counts are needed.  By name: what `load_weights` did not return, which is exact for a parameter that one tensor
    fills.  By element: one expert of sixty, or the bias of k among q, k and v, shows in no name (and for experts
    `load_weights` returns no name at all while the reload defers them: vllm 0.28, routed_experts.py).  The layerwise
    reload counts elements for each layer; a vocabulary is padded and never gets all of its own.
    """
    from vllm.model_executor.layers.attention import is_deferred_attention_layer
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload.layerwise import SKIP_LOAD_TENSORS, get_layerwise_info

    missing: list[str] = []
    for prefix, layer in model.named_modules():
        info = get_layerwise_info(layer)
        if not info.can_load() or is_deferred_attention_layer(layer):
            continue  # whole, and processed already; or scales of a quantised KV cache, which have defaults
        parameters = {
            name: parameter
            for name, parameter in layer.named_parameters(recurse=False)
            if name not in SKIP_LOAD_TENSORS
        }
        names = {name: f"{prefix}.{name}" if prefix else name for name in parameters}
        absent = [name for name in parameters if names[name] not in loaded]
        short = info.load_numel < sum(parameter.numel() for parameter in parameters.values())
        if short and not absent and not isinstance(layer, VocabParallelEmbedding):
            received = _elements_received(info)
            absent = [name for name in parameters if received.get(name, 0) < parameters[name].numel()]
            # Under tensor parallelism a rank receives more than it keeps, so none may look short by itself.
            absent = absent or list(parameters)
        missing.extend(names[name] for name in absent if short)
    return sorted(missing)


def _elements_received(info: Any) -> dict[str, int]:
    """Elements of the tensors that came for each parameter of a layer."""
    received: dict[str, int] = {}
    for name, arguments in info.loaded_weights:
        tensor = arguments.arguments.get("loaded_weight")
        if isinstance(tensor, torch.Tensor):
            received[name] = received.get(name, 0) + tensor.numel()
    return received


def _forget_partial_layers(model: torch.nn.Module) -> None:
    """After a sync that broke off: drop what half-loaded layers hold, so that the next full sync starts clean.

    The layers stay unloaded (on the meta device) and their kernel tensors stay kept; a new sync takes them up again.
    """
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load():
            info.loaded_weights.clear()
            info.load_numel = 0


def _forget_prepacked_experts(model: torch.nn.Module) -> None:
    """Let the experts' packing run again: it is skipped as soon as the method has a kernel.

    Routing replay (R3) hangs its capture function on that kernel; it is kept on the method meanwhile, also over a sync
    that breaks off.
    """
    for method in _methods(model):
        kernel = getattr(method, "moe_kernel", None)
        if kernel is None:
            continue
        capture = getattr(getattr(kernel, "fused_experts", None), "routing_replay_capture_fn", None)
        if capture is not None:
            method._ascend_safe_capture = capture
        method.moe_kernel = None


def _restore_capture_functions(model: torch.nn.Module) -> None:
    """Hang the capture functions on the kernels that were just made anew."""
    for method in _methods(model):
        capture = vars(method).pop("_ascend_safe_capture", None)
        if capture is not None:
            method.moe_kernel.fused_experts.set_capture_fn(capture)


def _methods(model: torch.nn.Module) -> Iterator[Any]:
    """The quantization methods (vLLM's word, also for unquantized layers) of the model's layers."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None:
            yield method
