"""What is used of vLLM's layerwise reload (0.24 to 0.33, model_executor/model_loader/reload), looked up at each use."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

RELOAD = "vllm.model_executor.model_loader.reload"

NEEDED = {
    RELOAD: ("initialize_layerwise_reload", "finalize_layerwise_reload"),
    f"{RELOAD}.layerwise": ("get_layerwise_info", "get_numel_loaded", "_layerwise_process"),
    f"{RELOAD}.meta": ("materialize_layer", "SKIP_TENSORS"),
}
"""Symbols, by module."""


def missing() -> str:
    """Return what of it this vLLM does not have; empty if it has all."""
    for name, symbols in NEEDED.items():
        try:
            module = importlib.import_module(name)
        except ImportError:
            return "this vLLM has no layerwise reload (0.24 is the first release with one that is right)"
        lacking = [symbol for symbol in symbols if not hasattr(module, symbol)]
        if lacking:
            return f"{name} of this vLLM has no {' and no '.join(lacking)}"
    return ""


def initialize(model: torch.nn.Module) -> None:
    """Put the model's parameters on the meta device, and vLLM's loaders before their own."""
    for parameter in model.parameters():
        loader: Any = getattr(parameter, "weight_loader", None)
        if loader is not None and not hasattr(loader, "__name__"):
            loader.__name__ = type(loader).__name__  # vLLM asks for it, and a functools.partial has none (MiniMax-M2)
    importlib.import_module(RELOAD).initialize_layerwise_reload(model)


def finalize(model: torch.nn.Module, model_config: Any) -> None:
    """Process attention layers, and give the others their tensors back.

    vLLM reports each layer to which nothing came, also those to which nothing should: the manifest knows better.
    """

    def other(entry: logging.LogRecord) -> bool:
        return "Failed to load weights" not in str(entry.msg)

    logger = logging.getLogger(f"{RELOAD}.layerwise")
    logger.addFilter(other)
    try:
        importlib.import_module(RELOAD).finalize_layerwise_reload(model, model_config)
    finally:
        logger.removeFilter(other)


def info(layer: torch.nn.Module) -> Any:
    """Return what vLLM knows of a layer: its LayerReloadingInfo."""
    return layerwise().get_layerwise_info(layer)


def give_memory(layer: torch.nn.Module) -> None:
    """Give a layer's parameters memory in checkpoint form, where they are on the meta device."""
    importlib.import_module(f"{RELOAD}.meta").materialize_layer(layer, info(layer))


def stays_in_place(name: str) -> bool:
    """Return whether a tensor of that name is never put on the meta device."""
    return name in importlib.import_module(f"{RELOAD}.meta").SKIP_TENSORS


def is_attention(layer: torch.nn.Module) -> bool:
    """Return whether vLLM processes a layer at the end, by its own rule."""
    module: Any = layerwise()
    if hasattr(module, "is_deferred_attention_layer"):  # 0.28
        return bool(module.is_deferred_attention_layer(layer))
    return isinstance(layer, (module.Attention, module.MLAAttention))


def layerwise() -> ModuleType:
    """Return the module with vLLM's steps."""
    return importlib.import_module(f"{RELOAD}.layerwise")


@contextmanager
def replaced(**functions: Any) -> Iterator[None]:
    """Within the block, vLLM's steps are other functions."""
    module = layerwise()
    before = {name: getattr(module, name) for name in functions}
    vars(module).update(functions)
    try:
        yield
    finally:
        vars(module).update(before)
