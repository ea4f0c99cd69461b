"""vLLM's making of a model, which is watched, and what its CPU worker lacks.

Imports neither verl nor vLLM, nor what they import.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from verl_ascend_rollout.integration.patch import Patch, patch_of

logger = logging.getLogger("verl_ascend_rollout.worker")

PATCHES: list[Patch] = []

PRELOADS = ("libtcmalloc", "libiomp")
"""What vLLM 0.18 looks for in LD_PRELOAD: an allocator, and Intel's OpenMP."""


# The one copy that makes whole models: those within models come from another.
@patch_of(PATCHES, "vllm.model_executor.model_loader.base_loader:initialize_model", copies=False, required=False)
def record_layouts(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Record the layouts of every model that vLLM makes in this process from now on.

    Without the patch a weight sync that needs the layouts refuses: which form a kernel keeps a weight in is known only
    while the layer's weights are processed after loading (vLLM 0.11 to 0.28, model_loader/base_loader.py:
    initialize_model is the one step that every loader shares).  Remove when vLLM says it.

    The processing itself cannot be wrapped once for all, since vllm-ascend replaces it (0.23,
    patch_process_weights_after_loading.py).
    """
    from verl_ascend_rollout.worker.weights import layout

    model = original(*args, **kwargs)
    layout.watch(model)
    return model


@patch_of(PATCHES, "vllm.v1.worker.cpu_worker:CPUWorker.init_device", "self", required=False)
def start_without_preloads(original: Callable[..., Any], self: Any) -> Any:
    """Start a CPU worker also where the libraries are not preloaded that make it faster.

    Without the patch vLLM 0.18 ends there with "libtcmalloc is not found in LD_PRELOAD", where 0.23 only says so
    (v1/worker/cpu_worker.py:59); no Python package has that library.  Remove when vLLM 0.18 is served no more.

    What is asked comes first in there, so that nothing is done twice.
    """
    try:
        return original(self)
    except RuntimeError as error:
        if "LD_PRELOAD" not in str(error):
            raise
        logger.warning("vLLM's CPU worker is slower than it could be: %s", error)
    before = os.environ.get("LD_PRELOAD")
    os.environ["LD_PRELOAD"] = ":".join(filter(None, (before, *PRELOADS)))
    try:
        return original(self)
    finally:
        if before is None:
            del os.environ["LD_PRELOAD"]
        else:
            os.environ["LD_PRELOAD"] = before


@patch_of(
    PATCHES,
    "vllm.model_executor.layers.fused_moe.experts.cpu_moe:CPUUnquantizedExperts",
    once=True,
    required=False,
    everywhere=False,
)
def record_routing_on_cpu(experts: Any) -> Any:
    """Let vLLM's CPU kernels for experts hand over which ones they have picked.

    Without the patch routing replay cannot be tried on a CPU: "Routed-experts capture is not supported with monolithic
    MoE kernel" (vLLM 0.28, routed_experts_capturer.py), although these kernels pick in Python (experts/cpu_moe.py).
    Remove when vLLM's CPUUnquantizedExperts says that it supports it.
    """
    if "supports_routing_replay_capture" in vars(experts):
        return experts
    pick = experts._select_experts

    def select_experts(self: Any, *args: Any, **kwargs: Any) -> Any:
        weights, chosen = pick(self, *args, **kwargs)
        if self.routing_replay_capture_fn is not None:
            self.routing_replay_capture_fn(chosen)
        return weights, chosen

    experts._select_experts = select_experts
    experts.supports_routing_replay_capture = lambda self: True
    return experts


@patch_of(PATCHES, "vllm.triton_utils.importing:TritonLanguagePlaceholder", once=True, required=False)
def name_functions_of_triton(placeholder: Any) -> Any:
    """Give vLLM's placeholder of Triton the functions that vLLM's own kernels name when they are imported.

    Without the patch verl 0.7.1 cannot be imported beside vLLM 0.11 where there is no Triton, as on a CPU: vLLM's
    Qwen3-Next reads `tl.exp` (layers/fla/ops/op.py:26), which raises an AttributeError, and verl passes over an
    ImportError only (utils/vllm/patch.py:56).  Remove when vLLM 0.11 is served no more; later ones name them.

    On the class, so that it is right for a placeholder that was made before.
    """
    for name in ("exp", "log", "log2"):
        if not hasattr(placeholder(), name):
            type.__setattr__(placeholder, name, None)  # of a class, or it has drifted
    return placeholder


RECORD_LAYOUTS = PATCHES[0]
NAME_FUNCTIONS_OF_TRITON = PATCHES[-1]
"""Which a process that imports verl needs as well."""
