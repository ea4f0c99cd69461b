"""Loading weights in place: through views in checkpoint form, into the kernels' own tensors, at the same addresses.

For engines whose weights are `identity` or `transposed` (see `layout`): vllm-ascend in every release, and CUDA back
ends that do not shuffle.  The model's own `load_weights` does the loading, so that tensor and expert parallelism, fused
projections and tied weights are its business; nothing is allocated, and no weight is processed a second time.  What a
layer derives from its weights is derived again.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from verl_ascend_rollout.worker.weights import fused_experts, moe, tied
from verl_ascend_rollout.worker.weights.layout import LayerRecord, record, recorded_layers
from verl_ascend_rollout.worker.weights.verify import Manifest, WeightSyncError

NamedTensor = tuple[str, torch.Tensor]
Loader = Callable[[Iterable[NamedTensor]], None]


@contextmanager
def reload(model: torch.nn.Module, model_config: Any, manifest: Manifest) -> Iterator[Loader]:
    """One full weight sync: present, load as often as buckets come, restore and derive.

    Args:
        model: the model whose every parameter is to be loaded again.
        model_config: vLLM's ModelConfig, whose dtype the attention layers' processing wants.
        manifest: what was expected and what has come; checked here, before the model is used again.

    Yields:
        A function that takes (name, tensor) pairs in checkpoint form.  Each tensor is copied before it returns.

    Raises:
        WeightSyncError: the stream was not the whole model, or not this model, or a layer's kernel form is no view of
            the checkpoint form.  Generate nothing until a full sync has passed.
        LayoutError: a weight is in no form that was recorded for it.
    """
    _refuse_what_cannot_be_loaded(model)
    moe.present_for_loading(model)
    written = _Written(tied=tied.aliases(model))
    load_weights: Any = model.load_weights
    try:
        with _counted_loaders(model, written):

            def load(weights: Iterable[NamedTensor]) -> None:
                stream = [(name, tensor) for name, tensor in weights if manifest.receive(name, tensor)]
                if stream:
                    named = tied.renamed(fused_experts.split(stream, model_config), written.tied)
                    written.names.update(load_weights(named) or ())

            yield load
        manifest.check(missing=_missing(model, written), duplicates=written.twice)
    finally:
        # Also after a failure: half-loaded weights in kernel form can be loaded again, and are never generated from.
        moe.settle(model)
    _derive_again(model, model_config)


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
# what was written


@dataclass
class _Written:
    """What one sync has written.

    Attributes:
        names: the model's own names, as its `load_weights` returned them.
        regions: for each parameter (by id) the parts of it that its loader was given: expert and shard.
        twice: parts that were written more than once, by name.
        tied: further names of parameters that have several (see `tied`).
    """

    names: set[str] = field(default_factory=set)
    regions: dict[int, set[tuple[Any, ...]]] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)

    def note(
        self, parameter: torch.nn.Parameter, name: str, region: tuple[Any, ...], before: torch.Tensor | None
    ) -> None:
        known = self.regions.setdefault(id(parameter), set())
        if region in known and (before is None or not torch.equal(before, parameter.data)):
            self.twice.append(f"{name}{list(region)}" if region else name)
        known.add(region)


@contextmanager
def _counted_loaders(model: torch.nn.Module, written: _Written) -> Iterator[None]:
    """Within the block, each parameter's loader notes what it was given.

    Names alone would not show one expert of sixty that never came, or the bias of k among q, k and v: they share one
    parameter.  A parameter with the default loader is filled by one tensor, for which its name in the answer of
    `load_weights` is enough; some models compare the loader with the default one (vLLM 0.13, qwen2_moe.py), so that one
    is left as it is.
    """
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    replaced: list[tuple[torch.nn.Parameter, str, Any]] = []
    for name, parameter in model.named_parameters():
        # vLLM's own parameter classes have a property over `_weight_loader`.
        attribute = "_weight_loader" if hasattr(parameter, "_weight_loader") else "weight_loader"
        original = getattr(parameter, attribute, None)
        if original is None or original is default_weight_loader:
            continue
        replaced.append((parameter, attribute, original))
        setattr(parameter, attribute, _counting(original, parameter, name, written))
    try:
        yield
    finally:
        for parameter, attribute, original in replaced:
            setattr(parameter, attribute, original)


def _counting(loader: Any, parameter: torch.nn.Parameter, name: str, written: _Written) -> Any:
    signature = inspect.signature(loader)
    can_say = "return_success" in signature.parameters

    def counted(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        wants_answer = bool(given.get("return_success", False))
        # A tied head may come beside its embedding, if it is the same.
        again = name in written.tied.values() and id(parameter) in written.regions
        before = parameter.data.clone() if again else None
        if can_say:
            # Under expert parallelism a rank is given every expert and keeps its own.
            answer = loader(*args, **{**kwargs, "return_success": True})
            if not answer:
                return answer if wants_answer else None
        else:
            answer = loader(*args, **kwargs)
        region = tuple(given[key] for key in ("shard_id", "loaded_shard_id", "expert_id") if given.get(key) is not None)
        written.note(parameter, name, region, before)
        return answer if wants_answer or not can_say else None

    return counted


def _missing(model: torch.nn.Module, written: _Written) -> list[str]:
    """The model's own names of parameters that were not loaded, or not wholly."""
    missing = []
    for prefix, layer in model.named_modules():
        layer_record = record(layer)
        derived = layer_record.derived if layer_record else ()
        for own, parameter in layer.named_parameters(recurse=False):
            if own in derived:
                continue  # vllm-ascend main registers its fp32 router as a parameter
            name = f"{prefix}.{own}" if prefix else own
            regions = written.regions.get(id(parameter), set())
            if not regions:
                if name not in written.names:
                    missing.append(name)
            elif () not in regions and len(regions) < _parts(layer, own, parameter):
                missing.append(name)
    return sorted(set(missing))


def _parts(layer: torch.nn.Module, own: str, parameter: torch.nn.Parameter) -> int:
    """Into how many parts a checkpoint splits a parameter: experts and shards of this rank; 1 for most."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear

    if own.startswith(("w13_", "w2_")) and parameter.dim() >= 2:
        return int(parameter.shape[0]) * (2 if own.startswith("w13_") else 1)
    if isinstance(layer, QKVParallelLinear):
        return 3
    if isinstance(layer, MergedColumnParallelLinear):
        return len(layer.output_sizes)
    return 1


# --------------------------------------------------------------------------------------------------------------------
# what layers derive from their weights


def _derive_again(model: torch.nn.Module, model_config: Any) -> None:
    """Bring what layers keep beside their weights up to date, at the same addresses where there were any."""
    for _, layer, found in recorded_layers(model):
        if found.derived:
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
