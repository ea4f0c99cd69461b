"""What layers make of their weights and keep beside them: brought up to date after a sync, at the same addresses.

A captured graph reads the tensor that was there when it was captured, whatever the attribute holds since.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from verl_ascend_rollout.worker.weights.layout import LayerRecord
from verl_ascend_rollout.worker.weights.manifest import WeightSyncError, first_line
from verl_ascend_rollout.worker.weights.region import storage_of


def process_again(layer: torch.nn.Module, layer_record: LayerRecord, prefix: str) -> None:
    """Run the processing of a layer whose weights it leaves as they are, for the sake of what it derives.

    vllm-ascend 0.23 makes a new fp32 copy of the router each time (ops/linear.py:90), main copies into the old one.

    Raises:
        WeightSyncError: what is derived has another shape or dtype than before.
    """
    method: Any = layer.quant_method
    with in_place({prefix: layer}, only=layer_record.derived):
        method.process_weights_after_loading(layer)


def process_attention(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Run the last step of vLLM's own processing (model_loader/utils.py): absorbed projections of MLA, scales.

    Raises:
        WeightSyncError: what is derived has another shape or dtype than before.
    """
    for prefix, attention in _attention_layers(model):
        with in_place({prefix: attention, f"{prefix}.impl": getattr(attention, "impl", None)}):
            attention.process_weights_after_loading(dtype)


def implementations(model: torch.nn.Module) -> dict[str, Any]:
    """Return the objects that compute attention, by name; they are no modules, and have tensors of their own."""
    return {f"{prefix}.impl": getattr(layer, "impl", None) for prefix, layer in _attention_layers(model)}


def _attention_layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield vLLM's attention layers that process weights.  The classes moved after vLLM 0.13, and models have classes
    of their own (Kimi K3 in 0.28; vllm-ascend's DeepSeek-V4 from 0.23 on)."""
    classes: list[type] = []
    for place, names in (
        ("vllm.model_executor.layers.attention_layer_base", ("AttentionLayerBase",)),
        ("vllm.model_executor.layers.attention", ("Attention", "MLAAttention")),
        ("vllm.attention.layer", ("Attention", "MLAAttention")),
    ):
        with contextlib.suppress(ImportError):
            found = importlib.import_module(place)
            classes += [getattr(found, name) for name in names if hasattr(found, name)]
    for prefix, module in model.named_modules():
        if isinstance(module, tuple(classes)) and callable(getattr(module, "process_weights_after_loading", None)):
            yield prefix, module


@contextmanager
def in_place(owners: Mapping[str, Any], only: tuple[str, ...] | None = None) -> Iterator[None]:
    """Whatever tensor is made anew within the block is copied to where the old one is, and the old one put back.

    vllm-ascend makes MLA's `W_UV` anew each time (0.13, attention/mla_v1.py:807), and what its fused kernels take of
    the projections (0.28, mla_v1.py:1128, on an A5).

    Args:
        owners: modules and other objects that have tensors, by name; `None` has none.
        only: the names of the tensors that are meant; without, all.

    Raises:
        WeightSyncError: the new one has another shape or dtype.
    """
    before = [
        (f"{prefix}.{name}", owner, name, tensor)
        for prefix, owner in owners.items()
        for name, tensor in _tensors(owner).items()
        if only is None or name in only
    ]
    yield
    for full_name, owner, name, old in before:
        new = getattr(owner, name, None)
        if not isinstance(new, torch.Tensor) or new is old or new.data_ptr() == old.data_ptr():
            continue
        if new.shape != old.shape or new.dtype != old.dtype:
            raise WeightSyncError(
                f"{full_name}, which is derived from weights, is {new.dtype} of shape {tuple(new.shape)} now, and "
                f"{old.dtype} of shape {tuple(old.shape)} for captured graphs"
            )
        old.data.copy_(new.data)
        setattr(owner, name, old)


def _tensors(owner: Any) -> dict[str, torch.Tensor]:
    """Return the tensors that an object has itself: its attributes and, of a module, its parameters and buffers."""
    own = getattr(owner, "__dict__", {})
    everything = {**own, **own.get("_buffers", {}), **own.get("_parameters", {})}
    return {name: value for name, value in everything.items() if isinstance(value, torch.Tensor)}


# --------------------------------------------------------------------------------------------------------------------
# what vLLM's own processing does not make again


def _gates(runner: Any) -> torch.Tensor:
    return torch.cat([runner.gate.weight, runner.shared_expert_gate.weight])


def _convolutions(layer: Any) -> torch.Tensor:
    weights = [each.weight for each in (layer.q_conv1d, layer.k_conv1d, layer.v_conv1d)]
    return torch.cat([weight.view(weight.size(0), weight.size(2)) for weight in weights]).transpose(0, 1)


def _positions(layer: Any) -> torch.Tensor:
    edge, width = layer.position_edge, layer.embed_dim
    weight: torch.Tensor = layer.position_embedding.weight
    return weight[1:].reshape(1, edge, edge, width).permute(0, 3, 1, 2)


MADE_WHEN_USED: Mapping[str, Callable[[Any], torch.Tensor]] = {
    "_combined_gate_weight": _gates,  # vLLM 0.28, fused_moe/runner/moe_runner.py:334
    "_merged_conv_weight": _convolutions,  # vllm-ascend 0.28, models/glm5next/kda.py:375
    "patch_pos_embed": _positions,  # vLLM 0.28, models/hunyuan_vision.py:342
}
"""What a layer makes of weights when it is first used and never again, by its attribute, with how it makes it."""


def make_again(model: torch.nn.Module) -> None:
    """Bring up to date what neither vLLM's processing nor the layer makes a second time.

    Raises:
        WeightSyncError: it is not known of what something was made.
    """
    for prefix, layer in model.named_modules():
        for name in MADE_WHEN_USED.keys() & vars(layer).keys():
            if isinstance(vars(layer)[name], torch.Tensor):
                _renew(f"{prefix}.{name}", vars(layer)[name], MADE_WHEN_USED[name], layer)
    _cast_sinks_again(model)


def _renew(name: str, old: torch.Tensor, make: Callable[[Any], torch.Tensor], layer: Any) -> None:
    try:
        new = make(layer)
        if new.shape != old.shape:
            raise ValueError(f"{tuple(new.shape)} is not {tuple(old.shape)}")
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise WeightSyncError(
            f"{name} was made of weights when its layer was first used, in a way that is not known here "
            f"({first_line(error)})"
        ) from error
    old.data.copy_(new.data)


def _cast_sinks_again(model: torch.nn.Module) -> None:
    """Attention sinks that FlashInfer's attention has cast: before vllm#48251 it keeps the first policy's."""
    memory = {storage_of(parameter) for parameter in model.parameters()}
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    for prefix, attention in _attention_layers(model):
        implementation = getattr(attention, "impl", None)
        sinks = getattr(implementation, "sinks", None)
        if not isinstance(sinks, torch.Tensor) or storage_of(sinks) in memory:
            continue
        if hasattr(implementation, "_sinks_source"):
            continue  # it casts them again by itself
        found = [
            parameter
            for name, parameter in parents[attention].named_parameters(recurse=False)
            if "sink" in name and parameter.shape == sinks.shape
        ]
        if len(found) != 1:
            raise WeightSyncError(f"{prefix}.impl.sinks is a copy of a weight, and it is not known of which")
        sinks.data.copy_(found[0].data)
