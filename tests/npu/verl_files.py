"""verl's own weight sync, as the control of test_weight_matrix.py: its files, without the rest of verl.

Only the default stack has verl installed; with the older vLLMs of the others it is not meant to run (it wants Ray,
tensordict, peft).  The files that touch the weights need none of that, and are imported by themselves: from the
installed verl, or from verl's wheel as build.py unpacked it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

UNPACKED = Path(sys.prefix) / "build" / "verl"
"""Where build.py unpacks verl's wheel (its step "verl's files")."""

PACKAGES = ("verl", "verl.utils", "verl.utils.vllm", "verl.workers", "verl.workers.rollout")
PACKAGES += ("verl.workers.rollout.vllm_rollout",)
"""Packages whose `__init__` is passed over: they import the rest of verl, and `verl.utils.vllm` applies its patches."""


def root() -> Path:
    """The folder that holds verl's package.

    Raises:
        FileNotFoundError: neither is there.
    """
    installed = importlib.util.find_spec("verl")
    if installed is not None and installed.submodule_search_locations:
        return Path(next(iter(installed.submodule_search_locations))).parent
    if not (UNPACKED / "verl").is_dir():
        raise FileNotFoundError(
            f"verl's files are not in {UNPACKED}: run emulator/build.py again for this stack, which puts them there"
        )
    return UNPACKED


def module(name: str) -> Any:
    """One module of verl, without what its packages import."""
    place = root() if "verl" not in sys.modules else Path(sys.modules["verl"].__path__[0]).parent
    for package in PACKAGES:
        if package not in sys.modules:
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(place.joinpath(*package.split(".")))]
    _refuse_models_of_triton()
    return importlib.import_module(name)


def _refuse_models_of_triton() -> None:
    """verl lists the MoE models that it can import, and passes over an ImportError only.

    Without Triton, vLLM 0.11's Qwen3-Next fails to import with an AttributeError of vLLM's placeholder.
    """
    name = "vllm.model_executor.models.qwen3_next"
    try:
        importlib.import_module(name)
    except ImportError:
        pass
    except AttributeError:
        sys.modules[name] = None  # type: ignore[assignment] - what makes Python raise ImportError


@contextmanager
def verls_patches() -> Iterator[str]:
    """Within the block, verl's patches of vLLM for the NPU are on, as they are in a worker of verl.

    verl applies them when `verl.utils.vllm` is imported and never takes them back.  Here they are taken back, so that
    references are made by the stock code.

    Yields:
        The error with which verl 0.9.1 cannot be imported beside this vLLM (0.11: no `ApplyRotaryEmb`), and none of the
        patches is on; else nothing.
    """
    from vllm.model_executor.layers import fused_moe
    from vllm.model_executor.layers.rotary_embedding import common

    owners = [
        (getattr(fused_moe, "FusedMoE", None), "weight_loader"),
        (getattr(common, "ApplyRotaryEmb", None), "__init__"),
    ]
    before = [
        (owner, name, vars(owner)[name]) for owner, name in owners if isinstance(owner, type) and name in vars(owner)
    ]
    error = ""
    try:
        module("verl.utils.vllm.npu_vllm_patch").apply_npu_vllm_patches()
    except ImportError as found:
        error = str(found)
    try:
        yield error
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def verls_sync(
    model: torch.nn.Module, model_config: Any, buckets: Iterable[list[tuple[str, torch.Tensor]]], device: torch.device
) -> None:
    """One sync, step by step what verl 0.9.1's `update_weights_from_ipc` does (vllm_rollout/utils.py:251-353)."""
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    patch = module("verl.utils.vllm.patch").patch_vllm_moe_model_weight_loader
    updates = module("verl.workers.rollout.vllm_rollout.weight_update_utils")
    patch(model)
    for bucket in buckets:
        parameters, buffers, named_buffers = updates.split_buffer_updates(model, bucket)
        if parameters:
            load_weights: Any = model.load_weights
            load_weights(parameters)
        updates.apply_buffer_updates(model, buffers, named_buffers=named_buffers)
    process_weights_after_loading(model, model_config, device)
