"""By which path a worker's weights are loaded: the first of those that the policy proposes that works for its model.

- `by_layout`: each weight where its kernel has it, through a view in checkpoint form (see `sync`).
- `layerwise`: vLLM's own layerwise reload, with every write counted (see `layerwise`).
- `verl`: verl's own sequence, of which nothing is checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from verl_ascend_rollout.worker.weights import layerwise, sync

AUTO = ("by_layout", "layerwise", "verl")


def choose(proposed: str | Sequence[str], model: torch.nn.Module, vllm_config: Any) -> tuple[str, list[str]]:
    """Return the path to take, and why those before it do not work here.

    Args:
        proposed: one path, which is taken whatever speaks against it (a sync then says so); several, best first; or
            `auto` for all.
        model: loaded, and processed for its kernels.
        vllm_config: vLLM's VllmConfig.
    """
    paths = AUTO if proposed == "auto" else (proposed,) if isinstance(proposed, str) else tuple(proposed)
    if len(paths) == 1:
        return paths[0], []
    reasons: list[str] = []
    for path in paths:
        reason = _obstacle(path, model, vllm_config)
        if not reason:
            return path, reasons
        reasons.append(f"{path}: {reason}")
    return paths[0], reasons


def _obstacle(path: str, model: torch.nn.Module, vllm_config: Any) -> str:
    if path == "verl":
        return ""
    beyond = list(_more_than_plain_weights(vllm_config))
    if beyond:
        return f"it does not load {' and '.join(beyond)}"
    return sync.obstacle(model) if path == "by_layout" else layerwise.obstacle(model)


def _more_than_plain_weights(vllm_config: Any) -> Iterator[str]:
    if vllm_config.lora_config is not None:
        yield "LoRA adapters"
    if vllm_config.model_config.quantization is not None:
        yield "quantized weights"
    if vllm_config.speculative_config is not None:
        yield "a drafter"
