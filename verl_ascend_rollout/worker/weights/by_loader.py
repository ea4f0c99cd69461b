"""A weight sync through the model's own `load_weights`, with account kept of what it wrote and where.

The first sync of every engine, and all of those whose models do more with a weight than copy it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from verl_ascend_rollout.worker.weights.block_copy import blocks_differ
from verl_ascend_rollout.worker.weights.layout import record
from verl_ascend_rollout.worker.weights.plan import NamedTensor, Plan, Recorder
from verl_ascend_rollout.worker.weights.staging import Staging
from verl_ascend_rollout.worker.weights.storage import storage_of
from verl_ascend_rollout.worker.weights.verify import Manifest, differs, first_line


class LoaderPass:
    """One sync through the model's own loader."""

    def __init__(self, model: torch.nn.Module, manifest: Manifest, plan: Plan, staging: Staging) -> None:
        """Begin; the model's weights are in checkpoint form.

        Args:
            model: whose `load_weights` is called.
            manifest: is told what comes and what is refused.
            plan: is filled.
            staging: is told what is written.
        """
        self._model = model
        self._manifest = manifest
        self._plan = plan
        self._staging = staging
        self._written = _Written()
        self._parameters = dict(model.named_parameters())
        self._buffers = dict(model.named_buffers())
        self._direct = staging.direct()
        self._recorder = Recorder(
            self._parameters, staging.storages(), staging.closed, staging.came, direct=self._direct
        )
        self._not_plain: dict[str, str] = {}
        self._wrapped = ExitStack()
        self._wrapped.enter_context(_counted_loaders(model, self._written))

    def load(self, weights: Iterable[NamedTensor]) -> None:
        """Load pairs in checkpoint form; each tensor is copied before this returns."""
        pairs = [(name, tensor.contiguous()) for name, tensor in weights if self._manifest.receive(name, tensor)]
        pairs = self._without_buffers(pairs)
        recorder = self._recorder
        load_weights: Any = self._model.load_weights
        waiting = iter(pairs)
        while True:
            try:
                with recorder:
                    self._written.names.update(load_weights(recorder.watched(waiting)) or ())
                break
            except Exception as error:
                # The rest is still looked at: one error names everything that is wrong.
                name = recorder.refused()
                if name is None:
                    raise
                self._manifest.refuse(name, first_line(error))
        if self._manifest.compare:
            self._compare(pairs)
        self._staging.process_whole_layers()

    def missing(self) -> list[str]:
        """The model's own names of parameters that were not loaded, or not wholly."""
        self._wrapped.close()
        return _missing(self._model, self._written, self._staging)

    def written_twice(self) -> list[str]:
        """Parts of parameters that more than one tensor was written into."""
        return [*self._written.twice, *self._recorder.late]

    def keep_plan(self) -> None:
        """The sync was whole: later ones may repeat it."""
        not_plain = {**self._recorder.not_plain, **self._not_plain}
        self._plan.take(Plan(self._recorder.routes, not_plain=not_plain), self._model)

    def close(self) -> None:
        """Let go of the model's loaders.  A second call does nothing."""
        self._wrapped.close()

    def _without_buffers(self, pairs: list[NamedTensor]) -> list[NamedTensor]:
        """Buffers are copied here: most models' loaders know parameters only (verl 0.9.1, weight_update_utils.py)."""
        rest = []
        for name, tensor in pairs:
            buffer = self._buffers.get(name)
            if buffer is None or name in self._parameters:
                rest.append((name, tensor))
            elif buffer.shape != tensor.shape:
                self._manifest.refuse(name, f"has shape {tuple(tensor.shape)} instead of {tuple(buffer.shape)}")
            else:
                buffer.copy_(tensor)
                self._not_plain[name] = "it is a buffer"
        return rest

    def _compare(self, pairs: list[NamedTensor]) -> None:
        """Read what was written back through the view that it was written through."""
        for name, tensor in pairs:
            route = self._recorder.routes.get(name)
            for copy in route.copies if route is not None else ():
                source = tensor if copy.source is None else copy.source.in_tensor(tensor)
                parameter = self._parameters[copy.target]
                direct = self._direct.get(storage_of(parameter))
                place = direct.place(copy.destination) if direct is not None else None
                if direct is not None and place is not None:
                    wrong = blocks_differ(place, direct.blocks.plain(source.to(parameter.dtype)))
                else:
                    wrong = differs(copy.destination.in_tensor(parameter.data), source)
                if wrong:
                    self._manifest.not_as_sent(name)


# --------------------------------------------------------------------------------------------------------------------
# what was written


@dataclass
class _Written:
    """What one sync has written.

    Attributes:
        names: the model's own names, as its `load_weights` returned them.
        regions: for each parameter (by id) the parts of it that its loader was given: expert and shard.
        twice: parts that were written more than once, by name.
    """

    names: set[str] = field(default_factory=set)
    regions: dict[int, set[tuple[Any, ...]]] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)

    def note(self, parameter: torch.nn.Parameter, name: str, region: tuple[Any, ...]) -> None:
        known = self.regions.setdefault(id(parameter), set())
        if region in known:
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
    # Not `Signature.bind`, which takes longer than loading a small expert.
    order = list(inspect.signature(loader).parameters)
    can_say = "return_success" in order

    def counted(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(order, args, strict=False)), **kwargs}
        wants_answer = bool(given.get("return_success", False))
        if can_say:
            # Under expert parallelism a rank is given every expert and keeps its own.
            answer = loader(*args, **{**kwargs, "return_success": True})
            if not answer:
                return answer if wants_answer else None
        else:
            answer = loader(*args, **kwargs)
        region = tuple(given[key] for key in ("shard_id", "loaded_shard_id", "expert_id") if given.get(key) is not None)
        written.note(parameter, name, region)
        return answer if wants_answer or not can_say else None

    return counted


def _missing(model: torch.nn.Module, written: _Written, staging: Staging) -> list[str]:
    missing = []
    for prefix, layer in model.named_modules():
        if staging.is_processed(layer):
            continue  # it was whole
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
