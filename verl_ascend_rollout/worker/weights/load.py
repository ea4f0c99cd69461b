"""A weight sync through the model's own `load_weights`, with account kept of what it wrote and where.

The first sync of every engine, and all of those whose models do more with a weight than copy it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from verl_ascend_rollout.transport.stream import NamedTensor
from verl_ascend_rollout.worker.weights import padding, passed_over
from verl_ascend_rollout.worker.weights.account import Account, Findings, Places, find
from verl_ascend_rollout.worker.weights.cpu.block_copy import blocks_differ
from verl_ascend_rollout.worker.weights.cpu.packed_experts import DirectWrites
from verl_ascend_rollout.worker.weights.expected import Expected
from verl_ascend_rollout.worker.weights.layout import recorded_layers
from verl_ascend_rollout.worker.weights.manifest import Manifest, differs, first_line
from verl_ascend_rollout.worker.weights.plan import Copy, Fill, Plan, Route
from verl_ascend_rollout.worker.weights.recorder import Incoming, Recorder, castable, used_whole
from verl_ascend_rollout.worker.weights.region import Region, storage_of

Parts = Callable[[str, torch.Tensor], "list[NamedTensor]"]
"""For a tensor that several go by in the model: these; else nothing.  A ValueError says why it is none."""


class Layers(Protocol):
    """The layers that are there for one sync: `Staging`, or those in vLLM's own bracket (`layerwise`).

    Attributes:
        closed: see `Recorder`.
    """

    closed: dict[int, str]

    def direct(self) -> dict[int, DirectWrites]:
        """See `Recorder`."""

    def storages(self) -> set[int]:
        """Return the storages that are there for this sync only."""

    def staged_names(self) -> set[str]:
        """Return the names of the parameters that are there for this sync only."""

    def came(self, storage: int, account: Account) -> None:
        """Note that something has been written into a storage."""

    def process_whole_layers(self) -> None:
        """Process the layers of which all has come."""


class LoaderPass:
    """One sync through the model's own loader."""

    def __init__(self, model: torch.nn.Module, manifest: Manifest, plan: Plan, staging: Layers, parts: Parts) -> None:
        """Begin; the model's weights are in checkpoint form.

        Args:
            model: whose `load_weights` is called.
            manifest: is told what comes and what is refused.
            plan: is filled.
            staging: is told what is written.
            parts: takes merged tensors apart.
        """
        self._model = model
        self._manifest = manifest
        self._plan = plan
        self._staging = staging
        self._parts = parts
        self._places = Places(to_be_loaded(model), padding.padded(model))
        self._tensors = {**dict(model.named_buffers()), **self._places.tensors}
        self._account = Account(self._places.wanted())
        self._direct = staging.direct()
        self._recorder = Recorder(
            self._places,
            self._account,
            staging.storages(),
            staging.closed,
            on_write=lambda storage: staging.came(storage, self._account),
            direct=self._direct,
        )
        self._routes: dict[str, Route] = {}
        self._ranks = groups()
        self._made_anew: set[str] = set()

    @property
    def not_plain(self) -> Mapping[str, str]:
        """See `Recorder`."""
        return self._recorder.not_plain

    def load(self, weights: Iterable[NamedTensor]) -> None:
        """Load weights in checkpoint form; each tensor is copied before this returns."""
        batch = []
        for name, tensor in weights:
            if not self._manifest.receive(name, tensor):
                continue
            tensor = tensor.contiguous()
            if name in self._tensors and name not in self._places.tensors and self._take_buffer(name, tensor):
                continue
            try:
                batch.append(Incoming(name, tensor, self._parts(name, tensor)))
            except ValueError as error:
                self._manifest.refuse(name, first_line(error))
        self._recorder.expect(batch)
        self._call(batch)
        for incoming in batch:
            self._take(incoming)
        if self._manifest.compare:
            self._compare(batch)
        self._staging.process_whole_layers()

    def findings(self) -> Findings:
        """Return what is wrong with the parameters that are not whole."""
        found = Findings()
        fills: dict[str, list[Fill]] = {}
        for fill in self._recorder.fills:
            fills.setdefault(fill.target, []).append(fill)
        packed = getattr(self._model, "packed_modules_mapping", {})
        expected = Expected(self._plan.known, self._recorder.writers, packed)
        refused = {*self._manifest.refused, *self._recorder.refused}
        for storage, name in self._places.names.items():
            if name not in self._made_anew and not self._account.is_whole(storage):
                parts = self._places.regions(storage)
                right = find(
                    name,
                    parts,
                    self._recorder.writers.get(name, ()),
                    fills.get(name, ()),
                    expected.of(name, parts[0]),
                    came=self._manifest.names,
                    refused=refused,
                    findings=found,
                )
                if right:
                    self._recorder.not_plain[name] = "parts of it are written more than once"
        found.twice.extend(self._recorder.late)
        return found

    def keep_plan(self) -> None:
        """Keep the plan of a sync that was whole: later ones may repeat it."""
        fills = [fill for fill in self._recorder.fills if fill.target in self._staging.staged_names()]
        self._plan.take(self._routes, fills, self._recorder.not_plain, self._recorder.writers, self._model)
        self._manifest.copies = self._recorder.writes

    def keep_names(self) -> None:
        """Keep the names of a sync that was whole, and is not to be repeated, for what a later one says is missing."""
        self._plan.known = self._recorder.writers
        self._manifest.copies = self._recorder.writes

    def _call(self, batch: list[Incoming]) -> None:
        load_weights: Any = self._model.load_weights
        weights = self._recorder.stream()
        while True:
            try:
                # Each time, since layers that have been processed have other parameters than before.
                with told_of_foreign_experts(self._model, self._recorder), self._recorder:
                    load_weights(weights)
                return
            except Exception as error:
                # The rest is still looked at: one error names everything that is wrong.
                current = self._recorder.current()
                if current is None:
                    self._blame(batch, error)
                    # Of the others nothing, or not all, has been written.
                    batch = [incoming for incoming in batch if incoming.refused is None]
                    self._recorder.expect(batch)
                    weights = self._recorder.stream()
                    continue
                current.refused = current.refused or first_line(error)

    def _blame(self, batch: list[Incoming], error: Exception) -> None:
        """Ask a loader that takes all tensors first, and has failed, for each alone, without letting it write."""
        if not batch:
            raise error  # not because of what came
        for incoming in batch:
            alone = Recorder(self._places, write=False)
            alone.expect([Incoming(incoming.name, incoming.tensor, incoming.parts)])
            try:
                with alone:
                    load_weights: Any = self._model.load_weights
                    load_weights(alone.stream())
            except Exception as reason:
                incoming.refused = incoming.refused or first_line(reason)
        if not any(incoming.refused for incoming in batch):
            batch[-1].refused = f"or one of the {len(batch)} tensors that came with it: {first_line(error)}"

    def _take(self, incoming: Incoming) -> None:
        """Note what became of one tensor."""
        if incoming.refused is None and not (self._recorder.unexplained and not incoming.copies):
            incoming.refused = complaint(incoming, self._ranks, self._model)
            if incoming.refused is not None and not incoming.copies and self._is_made_anew(incoming.name):
                incoming.refused = None
        if incoming.refused is not None:
            self._manifest.refuse(incoming.name, incoming.refused)
            return
        if self._manifest.finite:
            for copy in incoming.copies:
                self._manifest.look_after_cast(incoming.name, incoming.tensor, self._tensors[copy.target].dtype)
        self._routes[incoming.name] = incoming.route(self._shape)

    def _is_made_anew(self, name: str) -> bool:
        """Return whether a loader has replaced a parameter by one that it has then loaded, as that of vLLM's
        Transformers backend does with a head's bias (0.28, models/transformers/causal.py)."""
        parameter = dict(self._model.named_parameters()).get(name)
        if parameter is None or storage_of(parameter) in self._places.names:
            return False
        self._made_anew.add(name)
        self._recorder.not_plain[name] = "a parameter that is made anew"
        return True

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def _take_buffer(self, name: str, tensor: torch.Tensor) -> bool:
        """Buffers are copied here: most models' loaders know parameters only (verl 0.9.1, weight_update_utils.py)."""
        buffer = self._tensors[name]
        if buffer.shape != tensor.shape:
            self._manifest.refuse(name, f"has shape {tuple(tensor.shape)} instead of {tuple(buffer.shape)}")
        elif not castable(tensor.dtype, buffer.dtype):
            self._manifest.refuse(name, f"is {tensor.dtype}, and the buffer is {buffer.dtype}")
        else:
            buffer.copy_(tensor)
            whole = Region.of(buffer, int(buffer.storage_offset()))
            self._routes[name] = Route(tuple(tensor.shape), tensor.dtype, (Copy(name, whole, None),))
        return True

    def _compare(self, batch: list[Incoming]) -> None:
        """Read what was written back through the view that it was written through."""
        for incoming in batch:
            for copy in incoming.copies if incoming.refused is None and incoming.other is None else ():
                source = incoming.tensor if copy.source is None else copy.source.in_tensor(incoming.tensor)
                parameter = self._tensors[copy.target]
                direct = self._direct.get(storage_of(parameter))
                place = direct.place(copy.destination) if direct is not None else None
                if direct is not None and place is not None:
                    wrong = blocks_differ(place, direct.blocks.plain(source.to(parameter.dtype)))
                else:
                    wrong = differs(copy.destination.in_tensor(parameter.data), source)
                if wrong:
                    self._manifest.not_as_sent(incoming.name)


def to_be_loaded(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters that a checkpoint brings, by name; without those that are a part of another's memory.

    vLLM 0.28 registers MLA's `W_UV` and `W_UK_T`, which are views of `kv_b_proj.weight` (mla_attention.py:1124).
    """
    derived = {
        f"{prefix}.{name}" if prefix else name
        for prefix, _, record in recorded_layers(model)
        for name in record.derived
    }
    # vllm-ascend main registers its fp32 router as a parameter.
    found = {name: parameter for name, parameter in model.named_parameters() if name not in derived}
    whole: dict[int, str] = {}
    for name, parameter in found.items():
        if parameter.nbytes == parameter.untyped_storage().nbytes():
            whole.setdefault(storage_of(parameter), name)
    return {name: each for name, each in found.items() if whole.get(storage_of(each), name) == name}


def complaint(incoming: Incoming, ranks: list[tuple[int, int]], model: torch.nn.Module) -> str | None:
    """Return why a tensor is none of this model's, or was not taken whole; `None` if it was, or need not be."""
    reason = used_whole(incoming, ranks)
    if reason is not None and not incoming.copies and passed_over.on_purpose(incoming.name, model):
        return None
    return reason


def groups() -> list[tuple[int, int]]:
    """Return this rank, and how many there are, in each group over which a weight can be split."""
    from vllm.distributed import parallel_state

    found = []
    for name in ("_TP", "_EP"):
        # vLLM's own accessors raise where a group was not made: without an engine, or without experts.
        group: Any = getattr(parallel_state, name, None)
        if group is not None:
            found.append((int(group.rank_in_group), int(group.world_size)))
    return found


@contextmanager
def told_of_foreign_experts(model: torch.nn.Module, recorder: Recorder) -> Iterator[None]:
    """Within the block, a loader of experts that leaves a tensor to another rank says so.

    Under expert parallelism a rank is given every expert and keeps its own.  The loader's name for an expert that is
    not here is -1, in every release (vLLM 0.11 to 0.28, `_map_global_expert_id_to_local_expert_id`).
    """
    replaced: list[tuple[torch.nn.Parameter, str, Any]] = []
    for parameter in model.parameters():
        # vLLM's own parameter classes have a property over `_weight_loader`.
        attribute = "_weight_loader" if hasattr(parameter, "_weight_loader") else "weight_loader"
        original = getattr(parameter, attribute, None)
        layer = getattr(_below_vllms(original), "__self__", None)
        local_expert = getattr(layer, "_map_global_expert_id_to_local_expert_id", None)
        if local_expert is not None:
            replaced.append((parameter, attribute, original))
            setattr(parameter, attribute, _telling(original, local_expert, recorder))
    try:
        yield
    finally:
        for parameter, attribute, original in replaced:
            setattr(parameter, attribute, original)


def _below_vllms(loader: Any) -> Any:
    """Return a parameter's own loader, below the one of vLLM's layerwise reload."""
    while getattr(loader, "__name__", "") == "online_process_loader":
        loader = loader.__wrapped__
    return loader


def _telling(loader: Any, local_expert: Callable[[int], int], recorder: Recorder) -> Any:
    # Under the loader's own name, by which vLLM knows those of its layerwise reload.
    @functools.wraps(loader)
    def telling(param: Any, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        before = recorder.writes
        answer = loader(param, loaded_weight, *args, **kwargs)
        expert = kwargs.get("expert_id", args[2] if len(args) > 2 else None)
        if recorder.writes == before and expert is not None and local_expert(expert) == -1:
            recorder.elsewhere(loaded_weight)
        return answer

    return telling
