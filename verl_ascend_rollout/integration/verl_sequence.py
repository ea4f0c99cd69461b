"""verl's own way to load one full set of weights into a running engine: what `bench weights` measures ours beside."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from verl_ascend_rollout.worker.weights import sync


def load(runner: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Do what verl 0.9.1's worker extension does (workers/rollout/vllm_rollout/utils.py:292-353).

    Args:
        runner: vLLM's model runner.
        weights: by their names in a checkpoint, on the model runner's device.

    Raises:
        Exception: whatever verl's and vLLM's own code raises: on a kernel's weights it often cannot work.
    """
    from verl.utils.vllm.patch import patch_vllm_moe_model_weight_loader
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    model = sync.unwrapped(runner)
    patch_vllm_moe_model_weight_loader(model)
    model.load_weights(weights)
    process_weights_after_loading(model, runner.vllm_config.model_config, runner.device)
