"""One full weight sync of a model: present, load, check, restore and derive.

For every kernel whose layouts were recorded (see `layout`).  `identity` and `transposed` weights are loaded in place,
through views in checkpoint form over the kernels' own tensors; `blocked` ones are copied into their blocks; layers with
`repacked` ones are rebuilt one at a time (see `staging`).  The model's own `load_weights` does the loading in the first
sync, so that tensor and expert parallelism, fused projections and tied weights are its business; later syncs repeat
what it did (see `plan`, `replay`).  What a layer derives from its weights is derived again.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from verl_ascend_rollout.worker.weights import fused_experts, moe, tied
from verl_ascend_rollout.worker.weights.by_loader import LoaderPass
from verl_ascend_rollout.worker.weights.layout import LayerRecord, recorded_layers
from verl_ascend_rollout.worker.weights.plan import Plan
from verl_ascend_rollout.worker.weights.replay import ReplayPass
from verl_ascend_rollout.worker.weights.staging import Staging
from verl_ascend_rollout.worker.weights.verify import Manifest, WeightSyncError

NamedTensor = tuple[str, torch.Tensor]
Loader = Callable[[Iterable[NamedTensor]], None]

BATCH_BYTES = 64 * 2**20
"""How much is loaded at once: a model's loader looks through all of its parameters each time that it is called."""


@contextmanager
def reload(model: torch.nn.Module, model_config: Any, manifest: Manifest, plan: Plan | None = None) -> Iterator[Loader]:
    """One full weight sync: present, load as often as buckets come, restore and derive.

    Args:
        model: the model whose every parameter is to be loaded again.
        model_config: vLLM's ModelConfig, whose dtype the attention layers' processing wants.
        manifest: what was expected and what has come; checked here, before the model is used again.
        plan: what an earlier sync of this model wrote down, to be repeated; empty: to be filled.

    Yields:
        A function that takes (name, tensor) pairs in checkpoint form.  Each tensor is copied before it returns.

    Raises:
        WeightSyncError: the stream was not the whole model, or not this model, or a layer's kernel form is no view of
            the checkpoint form.  Generate nothing until a full sync has passed.
        LayoutError: a weight is in no form that was recorded for it.
    """
    _refuse_what_cannot_be_loaded(model)
    plan = plan if plan is not None else Plan()
    moe.present_for_loading(model)
    staging = Staging(model, plan)
    sync: LoaderPass | ReplayPass = (ReplayPass if plan.replayable else LoaderPass)(model, manifest, plan, staging)

    names = tied.aliases(model)
    arrived: dict[str, str] = {}

    def load(weights: Iterable[NamedTensor]) -> None:
        stream = tied.once(fused_experts.split(weights, model_config), names, arrived, manifest.refuse)
        for batch in _batches(stream):
            sync.load(batch)

    try:
        yield load
        manifest.check(missing=sync.missing(), duplicates=sync.written_twice())
        staging.process_rest()
        sync.keep_plan()
    except BaseException:
        # Whatever was surprising, the next sync asks the model's loader again.
        plan.forget()
        raise
    finally:
        sync.close()
        # Also after a failure: half-loaded weights in kernel form can be loaded again, and are never generated from.
        staging.give_up()
        moe.settle(model)
    _derive_again(model, model_config, staging)


def _batches(weights: Iterable[NamedTensor]) -> Iterator[list[NamedTensor]]:
    """The pairs in lists of about `BATCH_BYTES`: a layer is rebuilt, and its memory let go, at the end of each."""
    batch: list[NamedTensor] = []
    size = 0
    for name, tensor in weights:
        batch.append((name, tensor))
        size += tensor.nbytes
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def unwrapped(runner: Any) -> Any:
    """The runner's model without the wrapper of captured graphs, which has no modules of its own (vllm-ascend's
    ACLGraphWrapper, vLLM's CUDAGraphWrapper)."""
    model = runner.model
    return model.unwrap() if hasattr(model, "unwrap") else model


def _refuse_what_cannot_be_loaded(model: torch.nn.Module) -> None:
    if not any(True for _ in recorded_layers(model)):
        raise WeightSyncError(
            "The layouts of this engine's weights were not recorded when it was made: its worker process did not load "
            "the vLLM plug-in `ascend_safe`; look for VLLM_PLUGINS, which must name it if it is set"
        )
    found = [*moe.not_loadable_in_place(model), *_derived_beside_transposed(model)]
    if found:
        more = f" and {len(found) - 4} more" if len(found) > 4 else ""
        raise WeightSyncError(
            f"{len(found)} weights have a kernel form that is no view of the checkpoint's: {', '.join(found[:4])}"
            f"{more}; on Ascend set VLLM_ASCEND_ENABLE_NZ=0 and additional_config.weight_nz_mode=0, and leave fused "
            "MC2 off"
        )


def _derived_beside_transposed(model: torch.nn.Module) -> list[str]:
    """Layers whose processing both transposes and derives: running it once more would transpose once more."""
    return [
        f"{prefix} (derives {', '.join(found.derived)} beside transposed weights)"
        for prefix, _, found in recorded_layers(model)
        if found.derived and any(weight.layout == "transposed" for weight in found.weights.values())
    ]


# --------------------------------------------------------------------------------------------------------------------
# what layers derive from their weights


def _derive_again(model: torch.nn.Module, model_config: Any, staging: Staging) -> None:
    """Bring what layers keep beside their weights up to date, at the same addresses where there were any."""
    for _, layer, found in recorded_layers(model):
        if found.derived and not staging.has(layer):
            _process_again(layer, found)
    for attention in _attention_layers(model):
        # Absorbed projections of MLA, scales; the last step of vLLM's own processing (model_loader/utils.py).
        attention.process_weights_after_loading(model_config.dtype)


def _process_again(layer: torch.nn.Module, layer_record: LayerRecord) -> None:
    """Run the processing of a layer whose weights it leaves as they are, for the sake of what it derives.

    vllm-ascend 0.23 makes a new fp32 copy of the router each time (ops/linear.py:90), main copies into the old one;
    a captured graph has the old one's address.
    """
    before = {name: getattr(layer, name) for name in layer_record.derived if hasattr(layer, name)}
    method: Any = layer.quant_method
    method.process_weights_after_loading(layer)
    for name, old in before.items():
        new = getattr(layer, name)
        if new is not old and new.data_ptr() != old.data_ptr() and new.shape == old.shape and new.dtype == old.dtype:
            old.data.copy_(new.data)
            setattr(layer, name, old)


def _attention_layers(model: torch.nn.Module) -> Iterator[Any]:
    """vLLM's attention layers.  The classes moved after vLLM 0.13, and 0.11 has no `MLAAttention` there."""
    classes = []
    for place in ("vllm.model_executor.layers.attention", "vllm.attention.layer"):
        with contextlib.suppress(ImportError):
            found = importlib.import_module(place)
            classes = [getattr(found, name) for name in ("Attention", "MLAAttention") if hasattr(found, name)]
        if classes:
            break
    for module in model.modules():
        if isinstance(module, tuple(classes)) and hasattr(module, "process_weights_after_loading"):
            yield module
