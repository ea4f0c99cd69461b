"""Models with vLLM's experts for Blackwell on a CPU: blocked in four dimensions, as FlashInfer's kernels want them.

What processes the weights is vLLM's own code.  Stood in for are the two functions of FlashInfer that say in which order
the rows of a block lie, since FlashInfer is not installed here, and the platform, which would be CUDA.  No kernel runs:
what is compared are the weights that it would read.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from loaded_model import LoadedModel


@contextmanager
def blackwell() -> Iterator[None]:
    """Within the block, vLLM chooses these experts for new models, and can process their weights."""
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method
    from vllm.model_executor.layers.fused_moe.experts.trtllm_bf16_moe import TrtLlmBf16ExpertsMonolithic
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend

    def chosen(moe_config: Any) -> tuple[Any, type[Any]]:
        return UnquantizedMoeBackend.FLASHINFER_TRTLLM, TrtLlmBf16ExpertsMonolithic

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unquantized_fused_moe_method, "select_unquantized_moe_backend", chosen)
        for name in ("flashinfer", "flashinfer.fused_moe"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, "flashinfer.fused_moe.core", fake_flashinfer())
        yield


def fake_flashinfer() -> types.ModuleType:
    """What vLLM takes from FlashInfer here: an order of rows for each of the two weights."""
    module: Any = types.ModuleType("flashinfer.fused_moe.core")

    def order(rows: int, seed: int) -> torch.Tensor:
        return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))

    module._maybe_get_cached_w3_w1_permute_indices = lambda cache, weight, tile, **how: order(len(weight), 1)
    module.get_w2_permute_indices_with_cache = lambda cache, weight, tile, **how: order(len(weight), 2)
    return module


def loaded_on_cuda(folder: Path) -> LoadedModel:
    """A model whose experts were recorded as on a GPU; for use within `blackwell`."""
    from verl_ascend_rollout.worker.weights import layout

    loaded = LoadedModel(folder, "bfloat16")
    for prefix, layer, record in layout.recorded_layers(loaded.model):
        if prefix.endswith("experts"):
            setattr(layer, layout.RECORD, dataclasses.replace(record, device="cuda"))
    return loaded
