"""A weight sync along the routes that an earlier one wrote down: copies, and nothing else.

On a CPU, experts that the kernel wants in blocks are copied straight out of the bucket into their blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from verl_ascend_rollout.transport.stream import NamedTensor
from verl_ascend_rollout.worker.weights.account import Account, Findings, Places, Writer, find
from verl_ascend_rollout.worker.weights.cpu.block_copy import blocks_differ, copy_into_blocks
from verl_ascend_rollout.worker.weights.cpu.packed_experts import PackedLayout
from verl_ascend_rollout.worker.weights.load import Parts, complaint, groups, to_be_loaded, told_of_foreign_experts
from verl_ascend_rollout.worker.weights.manifest import Manifest, differs, first_line
from verl_ascend_rollout.worker.weights.plan import Copy, Fill, Plan, Route, logger
from verl_ascend_rollout.worker.weights.recorder import Incoming, Recorder, castable
from verl_ascend_rollout.worker.weights.region import Region, storage_of
from verl_ascend_rollout.worker.weights.staging import Staging, back


@dataclass(frozen=True)
class _Target:
    """A parameter (or a buffer) for the time of a sync."""

    tensor: torch.Tensor
    integers: torch.Tensor | None  # of one in blocks, as `PackedLayout.integers` gives them
    blocks: PackedLayout | None  # how it lies, where it is in blocks
    storage: int  # see `storage_of`

    @classmethod
    def of(cls, parameter: torch.Tensor, blocks: PackedLayout | None) -> _Target:
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
        """Yield the names of those whose destinations are not as their sources are."""
        for name, destination, source in zip(self.names, self.destinations, self.sources, strict=True):
            if unlike(destination, source):
                yield name


@dataclass
class _Batch:
    """The copies of one bucket: plain ones, and those into blocks."""

    plain: _Copies = field(default_factory=_Copies)
    blocked: _Copies = field(default_factory=_Copies)

    def __len__(self) -> int:
        return len(self.plain.names) + len(self.blocked.names)

    def copy(self) -> None:
        if self.plain.destinations:
            # One call for all: on a CPU a loop without Python, on CUDA one kernel for many copies.
            torch._foreach_copy_(self.plain.destinations, self.plain.sources)
        copy_into_blocks(self.blocked.destinations, self.blocked.sources)

    def not_done(self) -> Iterator[str]:
        """Yield the names of tensors that are not where they were copied to, read through the view that they were
        written through."""
        yield from self.plain.not_done(differs)
        yield from self.blocked.not_done(blocks_differ)


class ReplayPass:
    """One sync along a plan."""

    def __init__(self, model: torch.nn.Module, manifest: Manifest, plan: Plan, staging: Staging, parts: Parts) -> None:
        """Begin; the model's weights are in checkpoint form, except those that are packed directly.

        Args:
            model: whose loader is asked where a tensor goes that did not come as it was written down.
            manifest: is told what comes and what is refused.
            plan: replayable.
            staging: is told what is written.
            parts: takes merged tensors apart, for the loader.
        """
        self._model = model
        self._manifest = manifest
        self._plan = plan
        self._staging = staging
        self._parts = parts
        self._parameters: dict[str, torch.Tensor] = {**dict(model.named_buffers()), **to_be_loaded(model)}
        self._targets = {
            name: _Target.of(parameter, plan.packed.get(name)) for name, parameter in self._parameters.items()
        }
        self._account = Account(
            {self._targets[name].storage: tally for name, tally in plan.targets.items() if name in self._targets}
        )
        self._fills: dict[str, list[Fill]] = {}
        for fill in plan.fills:
            self._fills.setdefault(fill.target, []).append(fill)
        self._asked: dict[str, Route] = {}

    def load(self, weights: Iterable[NamedTensor]) -> None:
        """Copy weights in checkpoint form to their places; each tensor is copied before this returns."""
        batch = _Batch()
        written: dict[int, None] = {}
        for name, tensor in weights:
            if not self._manifest.receive(name, tensor):
                continue
            if not tensor.is_contiguous():
                tensor = tensor.contiguous()
            route = self._plan.routes.get(name)
            if route is None or not route.takes(tensor):
                route = self._ask(name, tensor)
            for copy in route.copies if route is not None else ():
                written[self._add(batch, name, copy, tensor)] = None
        batch.copy()
        self._manifest.copies += len(batch)
        if self._manifest.compare:
            for name in batch.not_done():
                self._manifest.not_as_sent(name)
        del batch  # it has views of what layers let go of now
        for storage in written:
            self._staging.came(storage, self._account)
        self._staging.process_whole_layers()

    def findings(self) -> Findings:
        """Return what is wrong with the parameters that are not whole."""
        found = Findings()
        routes = {**self._plan.routes, **self._asked}
        expected, writers = _by_target(self._plan.routes, self._plan.routes), _by_target(routes, self._manifest.names)
        for target in self._plan.targets:
            storage = self._targets[target].storage
            if not self._account.is_whole(storage):
                find(
                    target,
                    [region for _, region in expected[target]],
                    [writer for writer in writers.get(target, ()) if writer[0] not in self._manifest.refused],
                    (),
                    expected[target],
                    came=self._manifest.names,
                    refused=self._manifest.refused,
                    findings=found,
                )
        return found

    def keep_plan(self) -> None:
        """Write down, after a sync that was whole, what came otherwise than written down."""
        if not self._asked:
            return
        self._plan.routes = {name: self._asked.get(name) or self._plan.routes[name] for name in self._manifest.names}
        self._plan.known = _by_target(self._plan.routes, self._plan.routes)
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

    # ----------------------------------------------------------------------------------------------------------------

    def _ask(self, name: str, tensor: torch.Tensor) -> Route | None:
        """Return where the model's own loader would put a tensor now; `None`, and noted, where it refuses it."""
        self._staging.back()
        recorder = Recorder(Places(self._parameters), write=False)
        load_weights: Any = self._model.load_weights
        buffer = self._parameters.get(name)
        if isinstance(buffer, torch.Tensor) and not isinstance(buffer, torch.nn.Parameter):
            return self._ask_buffer(name, tensor, buffer)
        try:
            incoming = Incoming(name, tensor, self._parts(name, tensor))
            recorder.expect([incoming])
            with told_of_foreign_experts(self._model, recorder), recorder:
                load_weights(recorder.stream())
            wrong = incoming.refused or complaint(incoming, groups(), self._model)
        except Exception as error:
            wrong = first_line(error)
        if wrong is not None:
            known = self._plan.routes.get(name)
            change = f"came as {tensor.dtype} of shape {tuple(tensor.shape)}"
            before = f" instead of {known.dtype} of shape {known.shape}" if known is not None else ""
            self._manifest.refuse(name, f"{change}{before}: {wrong}")
            return None
        route = incoming.route(lambda target: tuple(self._targets[target].tensor.shape))
        otherwise = next(iter(recorder.not_plain.values()), None)
        for copy in route.copies:
            target = self._targets[copy.target]
            shape = tuple(target.tensor.shape)
            if target.blocks is not None and not target.blocks.fits(copy.destination, shape):
                otherwise = f"a copy of a part of {copy.target} that cannot be packed alone"
        if otherwise is not None:
            self._manifest.refuse(name, f"came otherwise than before, and its loader does {otherwise}; sync again")
            return None
        self._asked[name] = route
        self._manifest.look(name, tensor)
        return route

    def _ask_buffer(self, name: str, tensor: torch.Tensor, buffer: torch.Tensor) -> Route | None:
        if buffer.shape != tensor.shape or not castable(tensor.dtype, buffer.dtype):
            self._manifest.refuse(
                name, f"came as {tensor.dtype} of shape {tuple(tensor.shape)} for a buffer of {tuple(buffer.shape)}"
            )
            return None
        whole = Region.of(buffer, int(buffer.storage_offset()))
        route = self._asked[name] = Route(tuple(tensor.shape), tensor.dtype, (Copy(name, whole, None),))
        return route

    def _add(self, batch: _Batch, name: str, copy: Copy, tensor: torch.Tensor) -> int:
        """Put a copy into the batch, and count it; the storage that it goes to."""
        target = self._targets[copy.target]
        source = tensor if copy.source is None else copy.source.in_tensor(tensor)
        if self._manifest.finite or name in self._asked:
            self._manifest.look_after_cast(name, source, target.tensor.dtype)
        self._account.copied(target.storage, copy.destination)
        if target.blocks is not None and target.integers is not None:
            source = source if source.dtype == target.tensor.dtype else source.to(target.tensor.dtype)
            place = target.blocks.region(target.integers, copy.destination)
            batch.blocked.add(place, target.blocks.plain(source), name)
        else:
            if back(target.tensor):
                for fill in self._fills.get(copy.target, ()):
                    fill.destination.in_tensor(target.tensor.data).fill_(fill.value)
            batch.plain.add(copy.destination.in_tensor(target.tensor.data), source, name)
        return target.storage


def _by_target(routes: Mapping[str, Route], names: Iterable[str]) -> dict[str, list[Writer]]:
    """Return for each parameter what tensors write into it."""
    found: dict[str, list[Writer]] = {}
    for name in names:
        route = routes.get(name)
        for copy in route.copies if route is not None else ():
            found.setdefault(copy.target, []).append((name, copy.destination))
    return found
