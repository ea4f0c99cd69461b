"""The layers of a model between vLLM's initialise and finalise: on the meta device, loaded and processed when whole."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from verl_ascend_rollout.worker.weights import padding, vllm_reload
from verl_ascend_rollout.worker.weights.account import Account, Findings, Places, find
from verl_ascend_rollout.worker.weights.layout import LayerRecord, WeightRecord, record
from verl_ascend_rollout.worker.weights.manifest import Manifest, WeightSyncError, first_line
from verl_ascend_rollout.worker.weights.placement import Placement, Probe
from verl_ascend_rollout.worker.weights.recorder import Recorder
from verl_ascend_rollout.worker.weights.region import Region, storage_of
from verl_ascend_rollout.worker.weights.served_layer import ServedLayer
from verl_ascend_rollout.worker.weights.unseen_writes import UnseenWrites


@dataclass(frozen=True)
class _Tie:
    """A parameter of a layer that is another's, the `first`, which is the one that it is loaded into."""

    layer: torch.nn.Module
    name: str
    first: torch.nn.Module


class MetaLayers:
    """The layers of a model within vLLM's bracket, as a loader's pass asks for them (`load.Layers`).

    Attributes:
        closed: names by storage of the kernels' tensors of layers that are done: nothing may be loaded into them.
        writes: watches the model's loader, within a `with`.
        not_plain: tensors of which the loader makes something, with what.
    """

    def __init__(self, model: torch.nn.Module, model_config: Any, values: Manifest) -> None:
        """Begin.

        Args:
            model: in the state in which it serves.
            model_config: vLLM's ModelConfig.
            values: is told which parameters have a NaN or an Inf, if it is for that.
        """
        self._model = model
        self._model_config = model_config
        self._values = values
        self._served = {layer: ServedLayer.of(prefix, layer) for prefix, layer in model.named_modules()}
        self._load_and_process: Any = vllm_reload.layerwise()._layerwise_process
        self._padded_rows = padding.padded_rows(model)
        self._account = Account({})
        self._owners: dict[int, torch.nn.Module] = {}
        self._ties: list[_Tie] = []
        self._touched: dict[torch.nn.Module, None] = {}
        self._done: set[torch.nn.Module] = set()
        self._failure: str | None = None
        # Found to be, at the end; also where a loader writes parts of a tensor twice, which no account takes for whole.
        self._is_whole = False
        self.closed: dict[int, str] = {}
        self.writes = UnseenWrites()
        self.not_plain: Mapping[str, str] = {}

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Within the block, the model's parameters are on the meta device, and its loaders are vLLM's."""
        vllm_reload.initialize(self._model)
        for served in self._served.values():
            served.keep_buffers()
        self._tie_again()
        for layer in self._served:
            for parameter in layer.parameters(recurse=False):
                self._owners.setdefault(storage_of(parameter), layer)
                if parameter.is_meta:
                    self.writes.expect(parameter)
        counted = self.writes.left_to_vllm(vllm_reload.layerwise().get_numel_loaded)
        # Layers are processed when no loader is at work (`process_whole_layers`), and when they are whole by our count.
        with vllm_reload.replaced(get_numel_loaded=counted, _layerwise_process=lambda layer, info: None):
            yield

    def finish(self) -> None:
        """End vLLM's bracket, for a sync that brought the whole model.

        Raises:
            WeightSyncError: a layer could not be loaded or processed.
        """
        self._is_whole = True
        for layer in self._owners.values():
            self._process(layer)
            if self._failure is None and layer not in self._done:
                self._failure = f"{self._served[layer].prefix} was not loaded"
        if self._failure is not None:
            raise WeightSyncError(self._failure)
        vllm_reload.finalize(self._model, self._model_config)
        for served in self._served.values():
            served.restore_kernel_format()

    def give_up(self) -> None:
        """Give the layers back what they had; what has been processed stays."""
        model: Any = self._model
        model._do_torchao_reload = getattr(model, "_original_do_torchao_reload", False)
        for layer, served in self._served.items():
            if layer in self._done:
                served.restore_kernel_format()
            else:
                served.put_back()
            vllm_reload.info(layer).reset()

    # what a loader's pass asks

    def direct(self) -> dict[int, Any]:
        """No weights are packed while they are written."""
        return {}

    def storages(self) -> set[int]:
        """No sync is repeated, so that no constant has to be."""
        return set()

    def staged_names(self) -> set[str]:
        """See `storages`."""
        return set()

    def came(self, storage: int, account: Account) -> None:
        """Note that something has been written into a storage (see `storage_of`)."""
        self._account = account
        layer = self._owners.get(storage)
        if layer is not None:
            self._touched[layer] = None

    def process_whole_layers(self) -> None:
        """Process the layers of which all has come since the last call."""
        for layer in self._touched:
            self._process(layer)
        self._touched.clear()

    # ----------------------------------------------------------------------------------------------------------------

    def _tie_again(self) -> None:
        """vLLM has made two parameters of each that two layers have."""
        owners: dict[int, tuple[torch.nn.Module, str]] = {}
        for layer, served in self._served.items():
            for name, parameter in served.parameters.items():
                first, first_name = owners.setdefault(id(parameter), (layer, name))
                loaded = first._parameters.get(first_name)
                # Some stay where they are (`SKIP_TENSORS`), and some come with the processing.
                if first is not layer and loaded is not None and loaded is not parameter:
                    layer._parameters[name] = loaded
                    self._ties.append(_Tie(layer, name, first))

    def _process(self, layer: torch.nn.Module) -> None:
        """Load a layer that is whole, and process it."""
        if self._failure is not None or layer in self._done or vllm_reload.is_attention(layer):
            return
        own = (storage_of(each) for each in layer.parameters(recurse=False))
        whole = all(self._account.is_whole(storage) for storage in own if self._owners.get(storage) is layer)
        if not whole and not self._is_whole:
            return
        if any(tie.layer is layer and tie.first not in self._done for tie in self._ties):
            return
        with _disable_current_modes():
            try:
                self._rebuild(layer)
            except Exception as error:
                # Said at the end, unless the stream is not the model's: that would be the cause.
                self._failure = f"{self._served[layer].prefix} could not be loaded: {first_line(error)}"
        for tie in self._ties:
            # What it makes of its weight, a packed head for example, is made of another layer's new one.
            if tie.first is layer:
                self._process(tie.layer)

    def _rebuild(self, layer: torch.nn.Module) -> None:
        served = self._served[layer]
        for tie in self._ties:
            if tie.layer is layer:
                layer._parameters[tie.name] = served.parameters[tie.name]
        staged = {name: each for name, each in layer.named_parameters(recurse=False) if each.is_meta}
        vllm_reload.give_memory(layer)
        loaded: dict[str, Any] = {name: getattr(layer, name) for name in staged}
        rows = self._padded_rows.get(layer, 0)
        parts = {served.name(name): padding.filled(layer, name, parameter, rows) for name, parameter in loaded.items()}
        for name, parameter in loaded.items():
            if parts[served.name(name)][0] is not parameter:
                parameter.data.zero_()
        places = Places({served.name(name): parameter for name, parameter in loaded.items()}, parts)
        account = Account(places.wanted())
        recorder = Recorder(places, account)

        @functools.cache
        def check() -> None:
            short = [
                name
                for storage, name in places.names.items()
                if not account.is_whole(storage) and not _covers(recorder, name, places.regions(storage))
            ]
            if short:
                raise WeightSyncError(f"not every element of {', '.join(short)} was written")
            for name, parameter in places.tensors.items() if self._values.finite and self.not_plain else ():
                self._values.look(name, parameter)

        with self._watched(layer, check), recorder:
            for name, parameter in staged.items():
                self.writes.repeat(parameter, loaded[name])
            self._load_and_process(layer, vllm_reload.info(layer))
        check()
        self._done.add(layer)
        for name in staged.keys() & served.parameters.keys():
            self.closed[storage_of(served.parameters[name])] = served.name(name)

    @contextmanager
    def _watched(self, layer: Any, check: Callable[[], None]) -> Iterator[None]:
        """Within the block, the layer's own processing is watched: what it is given, and where it puts that."""
        served = self._served[layer]
        method: Any = getattr(layer, "quant_method", None)
        if not hasattr(method, "process_weights_after_loading"):
            served.check_shapes()
            yield
            return
        process = method.process_weights_after_loading
        known = record(layer)
        weights = known.weights if known is not None else {}

        def processed(given: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
            with _disable_current_modes():
                check()
                looks = [_Look(name, weight, getattr(given, name)) for name, weight in weights.items()]
                with _as_for_the_first_time(method, known):
                    process(given, *args, **kwargs)
                served.check_shapes()
                for look in looks:
                    look.check(given)

        had_one = "process_weights_after_loading" in vars(method)
        method.process_weights_after_loading = processed
        try:
            yield
        finally:
            if had_one:
                method.process_weights_after_loading = process
            else:
                del method.process_weights_after_loading


def _covers(recorder: Recorder, name: str, parts: Sequence[Region]) -> bool:
    """Return whether every element was written, some of them more than once."""
    fills = [fill for fill in recorder.fills if fill.target == name]
    return find(name, parts, recorder.writers.get(name, ()), fills, (), (), (), Findings())


class _Look:
    """A few elements of a weight before it is processed, and where they have to be afterwards."""

    def __init__(self, name: str, weight: WeightRecord, parameter: torch.Tensor) -> None:
        self._name = name
        self._placement = weight.placement or Placement.of_view(weight.shape, weight.layout)
        self._probe: Probe | None = self._placement.probe(parameter) if self._placement is not None else None

    def check(self, layer: torch.nn.Module) -> None:
        """Raise if they are not there."""
        kernel = getattr(layer, self._name, None)
        if self._placement is None or self._probe is None:
            return
        if not isinstance(kernel, torch.Tensor) or not self._placement.holds(self._probe, kernel):
            raise WeightSyncError(
                f"its kernel keeps {self._name} in another form than after the first load: its processing "
                f"({type(layer).__name__}) does something else when it has a kernel already"
            )


@contextmanager
def _as_for_the_first_time(method: Any, known: LayerRecord | None) -> Iterator[None]:
    """Within the block, experts on a CPU have no kernel yet: vLLM packs them for a new one only.  The old one stays."""
    kernel = getattr(method, "moe_kernel", None)
    if known is None or known.device != "cpu" or kernel is None:
        yield
        return
    config = method.moe_quant_config
    method.moe_kernel = None
    try:
        yield
    finally:
        method.moe_kernel, method.moe_quant_config = kernel, config
