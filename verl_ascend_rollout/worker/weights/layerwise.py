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

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from verl_ascend_rollout.worker.weights.verify import Manifest

NamedTensor = tuple[str, torch.Tensor]
Loader = Callable[[Iterable[NamedTensor]], None]


@dataclass
class _Received:
    """What one sync has brought so far."""

    names: set[str] = field(default_factory=set)
    buffers: list[NamedTensor] = field(default_factory=list)


def available() -> bool:
    """Whether this vLLM has the layerwise reload (0.18 and newer)."""
    try:
        import vllm.model_executor.model_loader.reload.layerwise  # noqa: F401
    except ImportError:
        return False
    return True


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
    from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload, initialize_layerwise_reload

    from verl.workers.rollout.vllm_rollout.weight_update_utils import apply_buffer_updates, split_buffer_updates

    received = _Received()
    parameters = {name for name, _ in model.named_parameters()}
    capture_functions = _forget_prepacked_experts(model)
    initialize_layerwise_reload(model)

    def load(weights: Iterable[NamedTensor]) -> None:
        stream = [(name, tensor) for name, tensor in weights if manifest.receive(name, tensor)]
        parameter_updates, buffer_updates, _ = split_buffer_updates(model, stream)
        received.buffers.extend(buffer_updates)
        if parameter_updates:
            received.names.update(model.load_weights(parameter_updates) or ())

    try:
        yield load
        manifest.check(missing=sorted((parameters - received.names) & _unfinished_parameters(model)))
    except BaseException:
        _forget_partial_layers(model)
        raise
    finalize_layerwise_reload(model, model_config)
    _restore_capture_functions(capture_functions)
    apply_buffer_updates(model, received.buffers)


def _unfinished_parameters(model: torch.nn.Module) -> set[str]:
    """Parameters of layers that are not whole yet, by the count of elements that the layerwise reload keeps.

    Needed beside the names that `load_weights` returns: for experts it returns none while the reload defers their
    loading (vllm 0.28, routed_experts.py `load_weights`), and one expert of sixty would not show in a name at all.
    The count alone would not do either: a padded vocabulary never gets all of its elements.
    """
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in model.named_modules()
        if get_layerwise_info(layer).can_load()
        for name, _ in layer.named_parameters(recurse=False)
    }


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


def _forget_prepacked_experts(model: torch.nn.Module) -> list[tuple[Any, Any]]:
    """Let the experts' packing run again: it is skipped as soon as the method has a kernel.

    Returns:
        For each method with a routing-replay capture, the method and the capture function, which hangs on the kernel.
    """
    captures = []
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        kernel = getattr(method, "moe_kernel", None)
        if kernel is None:
            continue
        capture = getattr(getattr(kernel, "fused_experts", None), "routing_replay_capture_fn", None)
        if capture is not None:
            captures.append((method, capture))
        method.moe_kernel = None  # type: ignore[union-attr]
    return captures


def _restore_capture_functions(captures: list[tuple[Any, Any]]) -> None:
    """Routing replay (R3) hangs its capture on the kernel that was just made anew."""
    for method, capture in captures:
        method.moe_kernel.fused_experts.set_capture_fn(capture)
