"""Layers whose kernel form is no view of the checkpoint form: rebuilt by their own code, as soon as they are whole.

On a CPU, vLLM packs linear weights for oneDNN and leaves the parameter empty, packs experts in place, and packs a copy
of the embeddings beside them.  A second `load_weights` is refused at best (a parameter of shape (0,)), and at worst
accepted: packed experts have the checkpoint's shape, and vLLM 0.28's own reload leaves them unpacked, because their
method skips the packing once it has a kernel (unquantized_fused_moe_method.py:134-149).

Here such a layer gets parameters in checkpoint form for the time of a sync.  They are memory that is asked for and not
touched, which takes no room until a weight comes; the layer is processed by its own code once all have come, and what
was staged is let go: memory for one layer at a time, if the weights come layer by layer.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Container, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from verl_ascend_rollout.worker.weights.account import Account
from verl_ascend_rollout.worker.weights.cpu.packed_experts import DirectWrites
from verl_ascend_rollout.worker.weights.layout import LayerRecord, WeightRecord, recorded_layers
from verl_ascend_rollout.worker.weights.region import storage_of

HUGE_PAGE = 2 * 2**20
"""Bytes: from which size on a mapping can have one."""


@dataclass(eq=False)
class StagedLayer:
    """One layer for the time of a sync."""

    prefix: str
    layer: Any
    record: LayerRecord
    # The parameters that its kernels had, by name, where others stand in for them now.
    kernel: dict[str, torch.nn.Parameter] = field(default_factory=dict)
    # Of these, by name, those in blocks, into which a loader's copies go without a detour.
    direct: dict[str, DirectWrites] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)  # of its parameters
    processed: bool = False  # whether it has been rebuilt from what came

    def present(self, replayed: Container[str] | None) -> None:
        """Put parameters in checkpoint form in place of the kernels'.

        Args:
            replayed: where a plan is replayed, the blocked parameters that need none, since nothing but whole blocks is
                copied into them; the others have no memory then until `back` gives it.
        """
        for name, weight in self.record.weights.items():
            parameter = getattr(self.layer, name, None)
            if not isinstance(parameter, torch.nn.Parameter):
                continue
            known = replayed is not None and f"{self.prefix}.{name}" in replayed
            if weight.layout == "repacked" or (weight.layout == "blocked" and not known):
                self.kernel[name] = parameter
                setattr(self.layer, name, _mapped(weight) if replayed is None else _unbacked(weight))
                if weight.blocks is not None and replayed is None:
                    staged = getattr(self.layer, name).data
                    self.direct[name] = DirectWrites(weight.blocks, parameter.data, staged)
            self.names.append(name)

    def is_whole(self, account: Account) -> bool:
        """Return whether all of its parameters have come."""
        return all(account.is_whole(storage_of(getattr(self.layer, name))) for name in self.names)

    def process(self) -> None:
        """Rebuild the layer from what came, and let go of what was staged."""
        self.processed = True
        weights = self.record.weights
        staged = {name: getattr(self.layer, name) for name in self.kernel}
        for view in self.record.views:
            if view.weight in staged:
                view.tensor.copy_(view.region.in_tensor(staged[view.weight].data))
        if any(weight.blocks is not None for weight in weights.values()):
            for name, kernel in self.kernel.items():
                # A layer is blocked, or repacked as a whole.
                direct, blocks = self.direct.get(name), weights[name].blocks
                if direct is not None:
                    direct.finish()
                elif blocks is not None:
                    blocks.pack(staged[name].data, kernel.data)
                setattr(self.layer, name, kernel)
        else:
            # Also a layer that has its weights in checkpoint form: its code may have packed a copy of them (lm_head).
            _process_anew(self.layer)
        for name, parameter in staged.items():
            if getattr(self.layer, name, None) is not parameter:
                # Somebody may still hold the parameter, with nothing in it.
                parameter.data = torch.empty(0, dtype=parameter.dtype)
        self.kernel.clear()
        self.direct.clear()

    def give_up(self) -> None:
        """Put back what the kernels had; for a layer that did not become whole."""
        for name, kernel in self.kernel.items():
            setattr(self.layer, name, kernel)
        self.kernel.clear()
        self.direct.clear()


class Staging:
    """The layers of a model that are rebuilt in a sync: on a CPU all that have code for it and are not loaded in place
    by `expert_format` or derived again by `sync`; elsewhere none.

    Attributes:
        layers: these.
        closed: names by storage of the packed weights of rebuilt layers: nothing may be loaded into them any more.
    """

    def __init__(self, model: torch.nn.Module, replayed: Container[str] | None) -> None:
        """Present the layers.

        Args:
            model: in the state in which it serves.
            replayed: see `StagedLayer.present`.
        """
        self.layers = [StagedLayer(prefix, layer, record) for prefix, layer, record in _rebuilt_layers(model)]
        for layer in self.layers:
            layer.present(replayed)
        self._names = {f"{layer.prefix}.{name}" for layer in self.layers for name in layer.kernel}
        # Tied weights belong to several layers.
        self._by_storage: dict[int, list[StagedLayer]] = {}
        for layer in self.layers:
            for name in layer.names:
                self._by_storage.setdefault(storage_of(getattr(layer.layer, name)), []).append(layer)
        self._whole: list[StagedLayer] = []
        self.closed: dict[int, str] = {}

    def came(self, storage: int, account: Account) -> None:
        """Note that something has been written into a storage (see `storage_of`), and counted."""
        for layer in self._by_storage.get(storage, ()):
            if not layer.processed and layer not in self._whole and layer.is_whole(account):
                self._whole.append(layer)

    def process_whole_layers(self) -> None:
        """Rebuild the layers of which all has come since the last call."""
        for layer in self._whole:
            self._process(layer)
        self._whole.clear()

    def process_rest(self) -> None:
        """Rebuild the layers that have no parameters to wait for; for the end of a sync that was whole."""
        for layer in self.layers:
            self._process(layer)

    def _process(self, layer: StagedLayer) -> None:
        if not layer.processed:
            layer.process()
            for name, weight in layer.record.weights.items():
                if weight.layout == "blocked":
                    self.closed[storage_of(getattr(layer.layer, name))] = f"{layer.prefix}.{name}"

    def give_up(self) -> None:
        """Put back what the kernels of unprocessed layers had."""
        for layer in self.layers:
            if not layer.processed:
                layer.give_up()

    def storages(self) -> set[int]:
        """Return the storages that are there for this sync only."""
        return {storage_of(getattr(layer.layer, name)) for layer in self.layers for name in layer.kernel}

    def direct(self) -> dict[int, DirectWrites]:
        """Return the weights that are written into without a detour, by the storage of what stands in for them."""
        return {writes.storage: writes for layer in self.layers for writes in layer.direct.values()}

    def has(self, layer: torch.nn.Module) -> bool:
        """Return whether a layer is one of these, rebuilt or left as it was."""
        return any(staged.layer is layer for staged in self.layers)

    def back(self) -> None:
        """Give all staged parameters memory, for a loader that is asked where it would write."""
        for layer in self.layers:
            for name in layer.kernel:
                back(getattr(layer.layer, name))

    def staged_names(self) -> set[str]:
        """Return the names of parameters that are there for this sync only, before any layer is rebuilt."""
        return self._names


def _rebuilt_layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, LayerRecord]]:
    for prefix, layer, record in recorded_layers(model):
        layouts = {weight.layout for weight in record.weights.values()}
        in_place = "transposed" in layouts or (record.derived and layouts == {"identity"})
        if record.device == "cpu" and not in_place:
            yield prefix, layer, record


def back(parameter: torch.Tensor) -> bool:
    """Give an unbacked parameter its memory, and say whether it needed any.

    From the heap, where the next layer finds what this one leaves, in the cache and mapped: in a replay layers come one
    after the other, and fresh pages take longer than the copies into them.
    """
    storage = parameter.untyped_storage()
    if storage.nbytes() or not parameter.numel():
        return False
    storage.resize_(parameter.numel() * parameter.element_size())
    return True


def _unbacked(weight: WeightRecord) -> torch.nn.Parameter:
    """Return a parameter as `_mapped` makes it, without memory."""
    data = torch.empty(weight.shape, dtype=weight.dtype)
    data.untyped_storage().resize_(0)
    return _parameter(weight, data)


def _mapped(weight: WeightRecord) -> torch.nn.Parameter:
    """Return a parameter like the one that vLLM made first: its class, its attributes, its shape; its values are
    undefined.

    Its memory is a mapping of its own, which takes room only where it is written, and goes back to the system with the
    parameter: the heap would keep what a layer leaves until all layers have gone.
    """
    elements = math.prod(weight.shape)
    # A mapping cannot be empty.
    memory = mmap.mmap(-1, max(elements, 1) * weight.dtype.itemsize)
    if len(memory) >= HUGE_PAGE:
        with suppress(OSError):
            # A page fault for each 4 KiB would take as long as the copy.
            memory.madvise(mmap.MADV_HUGEPAGE)
    data = torch.frombuffer(memory, dtype=weight.dtype, count=max(elements, 1))[:elements].view(weight.shape)
    return _parameter(weight, data)


def _parameter(weight: WeightRecord, data: torch.Tensor) -> torch.nn.Parameter:
    parameter: torch.nn.Parameter = torch.Tensor._make_subclass(weight.parameter_class, data, False)
    parameter.__dict__.update(weight.attributes)
    return parameter


def _process_anew(layer: Any) -> None:
    """Run the layer's own processing as if for the first time.

    A MoE method that has a kernel takes what it is given for packed.  Routing replay (R3) hangs its capture function on
    that kernel, so it moves to the new one.
    """
    method = layer.quant_method
    kernel = getattr(method, "moe_kernel", None)
    capture = getattr(getattr(kernel, "fused_experts", None), "routing_replay_capture_fn", None)
    if kernel is not None:
        method.moe_kernel = None
    if hasattr(layer, "cpu_linear"):
        if _is_embedding(layer):
            layer.cpu_linear = _PackedWhenUsed(layer)
            return
        # What oneDNN packed before (0.28, layers/utils.py): let go of first, its memory is there for what comes now.
        layer.cpu_linear = None
    with suppress(AttributeError):
        # vLLM's own mark for methods that process once (0.28, reload/layerwise.py).
        del layer._already_called_process_weights_after_loading
    method.process_weights_after_loading(layer)
    if capture is not None:
        method.moe_kernel.fused_experts.set_capture_fn(capture)


class _PackedWhenUsed:
    """Stands for what oneDNN has of an embedding: it is packed where the embedding serves as a head as well.

    vLLM packs a copy of every embedding, for half a gigabyte of Qwen1.5-MoE's two thirds of a second, and reads it in
    no model that has a head of its own.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer = self._layer
        layer.quant_method.process_weights_after_loading(layer)
        return layer.cpu_linear(*args, **kwargs)


def _is_embedding(layer: torch.nn.Module) -> bool:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    return isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead)
