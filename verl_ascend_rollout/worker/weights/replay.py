"""A weight sync along the routes that an earlier one wrote down: copies, and nothing else.

On a CPU, experts that the kernel wants in blocks are copied straight out of the bucket into their blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from verl_ascend_rollout.worker.weights.block_copy import blocks_differ, copy_into_blocks
from verl_ascend_rollout.worker.weights.blocks import Blocks
from verl_ascend_rollout.worker.weights.plan import Copy, NamedTensor, Plan, Recorder, Route, logger
from verl_ascend_rollout.worker.weights.staging import Staging, back
from verl_ascend_rollout.worker.weights.storage import storage_of
from verl_ascend_rollout.worker.weights.verify import Manifest, differs, first_line


@dataclass(frozen=True)
class _Target:
    """A parameter for the time of a sync.

    Attributes:
        parameter: which it is.
        integers: of one in blocks, as `Blocks.integers` gives them.
        blocks: how it lies, where it is in blocks.
        storage: see `storage_of`.
    """

    parameter: torch.nn.Parameter
    integers: torch.Tensor | None
    blocks: Blocks | None
    storage: int

    @classmethod
    def of(cls, parameter: torch.nn.Parameter, blocks: Blocks | None) -> _Target:
        # Nothing is kept of a staged parameter's memory: its layer lets go of it in the middle of the sync.
        integers = None if blocks is None else blocks.integers(parameter.data)
        return cls(parameter, integers, blocks, storage_of(parameter))


@dataclass
class _Copies:
    """Copies of one bucket that are done together."""

    destinations: list[torch.Tensor] = field(default_factory=list)
    sources: list[torch.Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def add(self, destination: torch.Tensor, source: torch.Tensor, name: str) -> None:
        self.destinations.append(destination)
        self.sources.append(source)
        self.names.append(name)

    def not_done(self, unlike: Callable[[torch.Tensor, torch.Tensor], bool]) -> Iterator[str]:
        """The names of those whose destinations are not as their sources are."""
        for name, destination, source in zip(self.names, self.destinations, self.sources, strict=True):
            if unlike(destination, source):
                yield name


@dataclass
class _Batch:
    """The copies of one bucket: plain ones, and those into blocks."""

    plain: _Copies = field(default_factory=_Copies)
    blocked: _Copies = field(default_factory=_Copies)

    def copy(self) -> None:
        if self.plain.destinations:
            # One call for all: on a CPU a loop without Python, on CUDA one kernel for many copies.
            torch._foreach_copy_(self.plain.destinations, self.plain.sources)
        copy_into_blocks(self.blocked.destinations, self.blocked.sources)

    def not_done(self) -> Iterator[str]:
        """The names of tensors that are not where they were copied to, read through the view that they were written
        through."""
        yield from self.plain.not_done(differs)
        yield from self.blocked.not_done(blocks_differ)


class ReplayPass:
    """One sync along a plan."""

    def __init__(self, model: torch.nn.Module, manifest: Manifest, plan: Plan, staging: Staging) -> None:
        """Begin; the model's weights are in checkpoint form, except those that are packed directly.

        Args:
            model: whose loader is asked where a tensor goes that did not come as it was written down.
            manifest: is told what comes and what is refused.
            plan: replayable.
            staging: is told what is written.
        """
        self._model = model
        self._manifest = manifest
        self._plan = plan
        self._staging = staging
        self._parameters = dict(model.named_parameters())
        self._targets = {
            name: _Target.of(parameter, plan.packed.get(name)) for name, parameter in self._parameters.items()
        }
        self._covered = dict.fromkeys(plan.targets, 0)
        self._asked: dict[str, Route] = {}

    def load(self, weights: Iterable[NamedTensor]) -> None:
        """Copy pairs in checkpoint form to their places; each tensor is copied before this returns."""
        batch = _Batch()
        written: dict[int, int] = {}
        for name, tensor in weights:
            if not self._manifest.receive(name, tensor):
                continue
            if not tensor.is_contiguous():
                tensor = tensor.contiguous()
            route = self._plan.routes.get(name)
            if route is None or not route.takes(tensor):
                route = self._ask(name, tensor)
            for copy in route.copies if route is not None else ():
                elements, storage = self._add(batch, name, copy, tensor)
                self._covered[copy.target] = self._covered.get(copy.target, 0) + elements
                written[storage] = written.get(storage, 0) + elements
        batch.copy()
        if self._manifest.compare:
            for name in batch.not_done():
                self._manifest.not_as_sent(name)
        del batch  # it has views of what layers let go of now
        for storage, elements in written.items():
            self._staging.came(storage, elements)
        self._staging.process_whole_layers()

    def missing(self) -> list[str]:
        """The stream's names of tensors that never came, where nothing else came for their places."""
        short = {target for target, wanted in self._plan.targets.items() if self._covered[target] < wanted}
        names = [
            name
            for name, route in self._plan.routes.items()
            if name not in self._manifest.names and any(copy.target in short for copy in route.copies)
        ]
        refused = [name for name in self._manifest.refused if name in self._plan.routes]
        explained = {copy.target for name in [*names, *refused] for copy in self._plan.routes[name].copies}
        return sorted([*names, *(short - explained)])

    def written_twice(self) -> list[str]:
        """Parts of parameters that more than one tensor was written into."""
        if not self._asked:
            return []  # the names are other names than before, or none, and each came once
        seen: dict[tuple[str, Any], str] = {}
        twice = []
        for name in self._manifest.names:
            route = self._asked.get(name) or self._plan.routes.get(name)
            for copy in route.copies if route is not None else ():
                first = seen.setdefault((copy.target, copy.destination), name)
                if first != name:
                    twice.append(f"{name} (the place of {first})")
        return twice

    def keep_plan(self) -> None:
        """The sync was whole: what came otherwise than written down is written down."""
        if not self._asked:
            return
        self._plan.routes = {name: self._asked.get(name) or self._plan.routes[name] for name in self._manifest.names}
        if not self._plan.asked_again:
            self._plan.asked_again = True
            name, route = next(iter(self._asked.items()))
            logger.info(
                "%d tensors of this weight sync did not come as in the one before (the first: %s, %s of shape %s): the "
                "model's own loader was asked where they go",
                len(self._asked),
                name,
                route.dtype,
                route.shape,
            )

    def close(self) -> None:
        """Nothing to let go of."""

    # ----------------------------------------------------------------------------------------------------------------

    def _ask(self, name: str, tensor: torch.Tensor) -> Route | None:
        """Where the model's own loader would put a tensor now; `None`, and noted, where it refuses it."""
        self._staging.back()
        recorder = Recorder(self._parameters, self._staging.storages(), write=False)
        load_weights: Any = self._model.load_weights
        try:
            with recorder:
                load_weights(recorder.watched([(name, tensor)]))
        except Exception as error:
            known = self._plan.routes.get(name)
            change = f"came as {tensor.dtype} of shape {tuple(tensor.shape)}"
            before = f" instead of {known.dtype} of shape {known.shape}" if known is not None else ""
            self._manifest.refuse(name, f"{change}{before}: {first_line(error)}")
            return None
        route = recorder.routes.get(name)
        wrong = recorder.not_plain.get(name)
        if route is not None:
            for copy in route.copies:
                target = self._targets[copy.target]
                shape = tuple(target.parameter.shape)
                if target.blocks is not None and not target.blocks.fits(copy.destination, shape):
                    wrong = f"a part of {copy.target} that cannot be packed alone"
        if wrong is not None or route is None:
            self._manifest.refuse(name, f"came otherwise than before, and its loader does {wrong}; sync again")
            return None
        self._asked[name] = route
        return route

    def _add(self, batch: _Batch, name: str, copy: Copy, tensor: torch.Tensor) -> tuple[int, int]:
        """Put a copy into the batch; the number of elements, and the storage that they go to."""
        target = self._targets[copy.target]
        source = tensor if copy.source is None else copy.source.in_tensor(tensor)
        if target.blocks is not None and target.integers is not None:
            source = source if source.dtype == target.parameter.dtype else source.to(target.parameter.dtype)
            place = target.blocks.region(target.integers, copy.destination)
            batch.blocked.add(place, target.blocks.plain(source), name)
        else:
            back(target.parameter)
            batch.plain.add(copy.destination.in_tensor(target.parameter.data), source, name)
        return copy.destination.elements, target.storage
