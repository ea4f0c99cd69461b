"""The `weight_loader` of expert parameters: given back where it got lost, and vLLM's own where another was put over it.

vLLM's models ask each parameter for its loader.  vllm-ascend 0.11 to 0.26 processes experts into new parameters that
have none (verl#3840, vllm#34201; kept from 0.28 on, #13337).  The layer still has it as a method: `FusedMoE` up to
vLLM 0.23, `RoutedExperts` from 0.24 on.  verl's own patch knows the first only, and for a model that it does not know
it does nothing, without a word (0.9.1, utils/vllm/patch.py:110,147).

verl 0.9.1 also wraps the method of `FusedMoE` for the NPU (utils/vllm/npu_vllm_patch.py:241): the wrapper transposes a
parameter wherever its shape looks like the kernel's.  With hidden == 2 * intermediate / tp (w13) or intermediate / tp
(w2) the checkpoint's form looks so too, and every load through the wrapper lands in the wrong form, silently
(tests/npu/test_weight_matrix.py).  What is attached here is the method below it: the form of a parameter is known here,
and needs no guess.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from verl_ascend_rollout.worker.weights.manifest import few

Loader = Callable[..., Any]

MARK = "_ascend_safe_loader"
"""The attribute of a parameter that got its loader here; it holds the loader that was there before, or None."""

VERLS_MARK = "_verl_npu_weight_loader_patched"

EXPERT_PARAMETERS = ("w13_", "w2_")
"""How the names of expert parameters begin in every layer of vLLM that has them (0.11 to 0.30)."""


def attach(model: torch.nn.Module) -> list[str]:
    """Give each expert parameter its layer's own loader, where it has none or verl's wrapper.  Twice is as once.

    Returns:
        The names of the parameters that were given one.
    """
    changed = []
    for name, layer, parameter in _expert_parameters(model):
        present = getattr(parameter, "weight_loader", None)
        if present is not None and _below_verls(present) is present:
            continue
        loader = _below_verls(present) if present is not None else own_loader(layer)
        if loader is None:
            continue
        setattr(parameter, MARK, present)
        parameter.weight_loader = loader  # type: ignore[attr-defined]
        changed.append(name)
    return changed


def detach(model: torch.nn.Module) -> list[str]:
    """Take back what `attach` did.

    Returns:
        The names of the parameters that were changed.
    """
    changed = []
    for name, _, parameter in _expert_parameters(model):
        if not hasattr(parameter, MARK):
            continue
        before = vars(parameter).pop(MARK)
        if before is None:
            delattr(parameter, "weight_loader")
        else:
            parameter.weight_loader = before  # type: ignore[attr-defined]
        changed.append(name)
    return changed


def complaint(model: torch.nn.Module) -> str:
    """Return one sentence on expert parameters that have no loader and whose layer has none to give; empty if there are
    none.

    For use after `attach`: such a model cannot be synced.
    """
    found = [
        (name, type(layer).__name__)
        for name, layer, parameter in _expert_parameters(model)
        if getattr(parameter, "weight_loader", None) is None and own_loader(layer) is None
    ]
    if not found:
        return ""
    layers = " and ".join(sorted({layer for _, layer in found}))
    names = few([name for name, _ in found])
    return (
        f"{len(found)} expert parameters of {type(model).__name__} have no weight_loader, and their layer ({layers}) "
        f"has none to give: {names}; new weights cannot be loaded into this model in this vLLM"
    )


def own_loader(layer: torch.nn.Module) -> Loader | None:
    """Return a layer's own method for loading its experts, without verl's wrapper; None where it has none."""
    method = getattr(layer, "weight_loader", None)
    return _below_verls(method) if callable(method) else None


def _below_verls(loader: Any) -> Any:
    """Return vLLM's method below verl's wrapper; the loader itself where it is not wrapped."""
    function = getattr(loader, "__func__", loader)
    if not hasattr(function, VERLS_MARK):
        return loader
    while hasattr(function, VERLS_MARK) and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    owner = getattr(loader, "__self__", None)
    return function if owner is None else function.__get__(owner)


def _expert_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, torch.nn.Parameter]]:
    for prefix, layer in model.named_modules():
        for own, parameter in layer.named_parameters(recurse=False):
            if own.startswith(EXPERT_PARAMETERS):
                yield f"{prefix}.{own}" if prefix else own, layer, parameter
