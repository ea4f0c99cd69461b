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
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from verl_ascend_rollout.worker.weights.blocks import DirectWrites
from verl_ascend_rollout.worker.weights.layout import LayerRecord, WeightRecord, recorded_layers
from verl_ascend_rollout.worker.weights.storage import storage_of
from verl_ascend_rollout.worker.weights.verify import WeightSyncError

if TYPE_CHECKING:
    from verl_ascend_rollout.worker.weights.plan import Plan

HUGE_PAGE = 2 * 2**20
"""Bytes: from which size on a mapping can have one."""


@dataclass
class StagedLayer:
    """One layer for the time of a sync.

    Attributes:
        prefix, layer, record: which it is.
        kernel: the parameters that its kernels had, by name, where others stand in for them now.
        direct: of these, by name, those in blocks, into which a loader's copies go without a detour.
        missing: for each of its parameters the elements that have not come yet.
        processed: whether it has been rebuilt from what came.
        touched: whether anything has come.
    """

    prefix: str
    layer: Any
    record: LayerRecord
    kernel: dict[str, torch.nn.Parameter] = field(default_factory=dict)
    direct: dict[str, DirectWrites] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    processed: bool = False
    touched: bool = False

    def present(self, plan: Plan) -> None:
        """Put parameters in checkpoint form in place of the kernels'; where a plan is replayed, not in place of blocked
        ones into which nothing but whole blocks is copied, and without memory until `back` gives it."""
        replayed = plan.replayable
        for name, weight in self.record.weights.items():
            parameter = getattr(self.layer, name, None)
            if not isinstance(parameter, torch.nn.Parameter):
                continue
            known = replayed and f"{self.prefix}.{name}" in plan.packed
            if weight.layout == "repacked" or (weight.layout == "blocked" and not known):
                self.kernel[name] = parameter
                setattr(self.layer, name, _unbacked(weight) if replayed else _mapped(weight))
                if weight.blocks is not None and not replayed:
                    staged = getattr(self.layer, name).data
                    self.direct[name] = DirectWrites(weight.blocks, parameter.data, staged)
            self.missing[name] = math.prod(weight.shape)

    def came(self, name: str, elements: int) -> bool:
        """Note that a part of a parameter has come; whether the layer is whole now."""
        self.touched = True
        self.missing[name] -= elements
        return not self.processed and all(left <= 0 for left in self.missing.values())

    def lacking(self) -> list[str]:
        """The names of staged parameters of which nothing has come."""
        whole = {name: math.prod(self.record.weights[name].shape) for name in self.kernel}
        return [f"{self.prefix}.{name}" for name, elements in whole.items() if 0 < elements <= self.missing[name]]

    def process(self) -> None:
        """Rebuild the layer from what came, and let go of what was staged."""
        self.processed = True
        weights = self.record.weights
        staged = {name: getattr(self.layer, name) for name in self.kernel}
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
    by `moe` or derived again by `bracket`; elsewhere none.

    Attributes:
        layers: these.
        closed: names by storage of the packed weights of rebuilt layers: nothing may be loaded into them any more.
    """

    def __init__(self, model: torch.nn.Module, plan: Plan) -> None:
        """Present the layers.

        Args:
            model: in the state in which it serves.
            plan: see `StagedLayer.present`.
        """
        self.layers = [StagedLayer(prefix, layer, record) for prefix, layer, record in _rebuilt_layers(model)]
        for layer in self.layers:
            layer.present(plan)
        # Tied weights belong to several layers.
        self._by_storage: dict[int, list[tuple[StagedLayer, str]]] = {}
        for layer in self.layers:
            for name in layer.missing:
                storage = storage_of(getattr(layer.layer, name))
                self._by_storage.setdefault(storage, []).append((layer, name))
        self._whole: list[StagedLayer] = []
        self._processed: set[int] = set()
        self.closed: dict[int, str] = {}

    def came(self, storage: int, elements: int) -> None:
        """Note that elements have been written into a storage (see `storage_of`)."""
        for layer, name in self._by_storage.get(storage, ()):
            if layer.came(name, elements):
                self._whole.append(layer)

    def process_whole_layers(self) -> None:
        """Rebuild the layers of which all has come since the last call."""
        for layer in self._whole:
            self._process(layer)
        self._whole.clear()

    def process_rest(self) -> None:
        """Rebuild the layers that are not whole by count; for the end of a sync that was found to be complete: a
        vocabulary is padded, and nobody sends the padding."""
        for layer in self.layers:
            # With verify: off, a layer of which nothing came keeps what it had.
            if layer.touched or not layer.missing:
                lacking = layer.lacking()
                if lacking and not layer.processed:
                    raise WeightSyncError(
                        f"Nothing came for {', '.join(lacking)}, and the rest of that layer did: it is packed as a "
                        "whole, so all of it has to come, with verify: off as well"
                    )
                self._process(layer)

    def _process(self, layer: StagedLayer) -> None:
        if not layer.processed:
            layer.process()
            self._processed.add(id(layer.layer))
            for name, weight in layer.record.weights.items():
                if weight.layout == "blocked":
                    self.closed[storage_of(getattr(layer.layer, name))] = f"{layer.prefix}.{name}"

    def give_up(self) -> None:
        """Put back what the kernels of unprocessed layers had."""
        for layer in self.layers:
            if not layer.processed:
                layer.give_up()

    def storages(self) -> set[int]:
        """The storages that are there for this sync only."""
        return {storage_of(getattr(layer.layer, name)) for layer in self.layers for name in layer.kernel}

    def direct(self) -> dict[int, DirectWrites]:
        """The weights that are written into without a detour, by the storage of what stands in for them."""
        return {writes.storage: writes for layer in self.layers for writes in layer.direct.values()}

    def has(self, layer: torch.nn.Module) -> bool:
        """Whether a layer is one of these, rebuilt or left as it was."""
        return any(staged.layer is layer for staged in self.layers)

    def back(self) -> None:
        """Give all staged parameters memory, for a loader that is asked where it would write."""
        for layer in self.layers:
            for name in layer.kernel:
                back(getattr(layer.layer, name))

    def is_processed(self, layer: torch.nn.Module) -> bool:
        """Whether a layer has been rebuilt in this sync."""
        return id(layer) in self._processed


def _rebuilt_layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, LayerRecord]]:
    for prefix, layer, record in recorded_layers(model):
        layouts = {weight.layout for weight in record.weights.values()}
        in_place = "transposed" in layouts or (record.derived and layouts == {"identity"})
        if record.device == "cpu" and not in_place:
            yield prefix, layer, record


def back(parameter: torch.nn.Parameter) -> None:
    """Give an unbacked parameter its memory.  A second call does nothing, nor does one for any other parameter.

    From the heap, where the next layer finds what this one leaves, in the cache and mapped: in a replay layers come one
    after the other, and fresh pages take longer than the copies into them.
    """
    storage = parameter.untyped_storage()
    if storage.nbytes() == 0:
        storage.resize_(parameter.numel() * parameter.element_size())


def _unbacked(weight: WeightRecord) -> torch.nn.Parameter:
    """A parameter as `_mapped` makes it, without memory."""
    data = torch.empty(weight.shape, dtype=weight.dtype)
    data.untyped_storage().resize_(0)
    return _parameter(weight, data)


def _mapped(weight: WeightRecord) -> torch.nn.Parameter:
    """A parameter like the one that vLLM made first: its class, its attributes, its shape; its values are undefined.

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
        # What oneDNN packed before (0.28, layers/utils.py): let go of first, its memory is there for what comes now.
        layer.cpu_linear = None
    with suppress(AttributeError):
        # vLLM's own mark for methods that process once (0.28, reload/layerwise.py).
        del layer._already_called_process_weights_after_loading
    method.process_weights_after_loading(layer)
    if capture is not None:
        method.moe_kernel.fused_experts.set_capture_fn(capture)
