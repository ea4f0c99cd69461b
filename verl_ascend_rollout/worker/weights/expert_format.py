"""Expert weights between checkpoint form and kernel form, without a copy.

`transposed` weights have two forms over one storage: the kernel's, contiguous, and its transposed view, which has the
checkpoint's shape.  Loading through the view writes the kernel's layout at the kernel's address.

vllm-ascend moves between the two forms by itself: from 0.13 to 0.26 `NPUWorker.wake_up` puts the view in place of the
kernel tensor, in a new Parameter without `weight_loader` (0.13 worker.py:188, 0.18:217, 0.23:253; removed in main by
#13012), and whoever then generates before the next load dies or answers nonsense (#5915, #11548).  Undone by
`restore_kernel_format`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from verl_ascend_rollout.worker.weights import weight_loader
from verl_ascend_rollout.worker.weights.layout import LayerRecord, WeightRecord, recorded_layers
from verl_ascend_rollout.worker.weights.manifest import WeightSyncError


class LayoutError(RuntimeError):
    """A weight is in no form that was recorded for it.  The message names the layer, and what to do."""


def restore_kernel_format(model: torch.nn.Module) -> list[str]:
    """Put every expert weight into its kernel form and give every weight its loader back.

    For use after a wake-up that no weight sync follows (an adapter-only sync, a reward model that never reloads), and
    before a sync.  A second call changes nothing.

    Returns:
        The names of the weights that were not in kernel form.

    Raises:
        LayoutError: a weight is in neither of its two forms.
    """
    _give_back_loaders(model)
    changed = []
    for prefix, layer, record in recorded_layers(model):
        for name, weight, parameter in _weights(layer, record):
            if weight.layout == "transposed" and not _is_kernel_form(parameter, weight, f"{prefix}.{name}"):
                parameter.data = parameter.data.transpose(-1, -2)
                changed.append(f"{prefix}.{name}")
    return changed


def to_checkpoint_format(model: torch.nn.Module) -> None:
    """Put every transposed weight into its checkpoint form, as a view over the kernel's storage.

    Raises:
        LayoutError: a weight is in neither of its two forms.
        WeightSyncError: experts have no loader and none can be had.
    """
    _give_back_loaders(model)
    lacking = weight_loader.complaint(model)
    if lacking:
        raise WeightSyncError(lacking)
    for prefix, layer, record in recorded_layers(model):
        for name, weight, parameter in _weights(layer, record):
            if weight.layout == "transposed" and _is_kernel_form(parameter, weight, f"{prefix}.{name}"):
                parameter.data = parameter.data.transpose(-1, -2)


def not_loadable_in_place(model: torch.nn.Module) -> list[str]:
    """Return the weights whose kernel form is no view of the checkpoint form, or not known, each with its layout."""
    return [
        f"{prefix}.{name} ({weight.layout})"
        for prefix, _, record in recorded_layers(model)
        for name, weight in record.weights.items()
        # On a CPU they are staged.
        if weight.layout == "unknown" or (weight.layout == "repacked" and record.device != "cpu")
    ]


def _give_back_loaders(model: torch.nn.Module) -> None:
    """Restore what was recorded of each parameter first, then vLLM's own loader of experts that nobody recorded."""
    for _, layer, record in recorded_layers(model):
        for _, weight, parameter in _weights(layer, record):
            _restore_attributes(parameter, weight)
    weight_loader.attach(model)


def _weights(layer: torch.nn.Module, record: LayerRecord) -> Iterator[tuple[str, WeightRecord, torch.nn.Parameter]]:
    for name, weight in record.weights.items():
        parameter = getattr(layer, name, None)
        if isinstance(parameter, torch.nn.Parameter):
            yield name, weight, parameter


def _is_kernel_form(parameter: torch.nn.Parameter, weight: WeightRecord, name: str) -> bool:
    """Return whether a transposed weight is in kernel form: its strides tell, which differ even where its axes are
    equal."""
    swapped = (*weight.shape[:-2], weight.shape[-1], weight.shape[-2])
    if tuple(parameter.shape) == swapped and parameter.is_contiguous():
        return True
    if tuple(parameter.shape) == weight.shape and parameter.transpose(-1, -2).is_contiguous():
        return False
    raise LayoutError(
        f"{name} has shape {tuple(parameter.shape)} and strides {parameter.stride()}, which is neither its checkpoint "
        f"form {weight.shape} over the kernel's storage nor its kernel form {swapped}: something else has changed the "
        "weights of this engine; start the rollout again"
    )


def _restore_attributes(parameter: torch.nn.Parameter, weight: WeightRecord) -> None:
    """Give a parameter that was made anew what the first one had, its `weight_loader` before all (verl#3840)."""
    for attribute, value in weight.attributes.items():
        if not hasattr(parameter, attribute):
            setattr(parameter, attribute, value)
