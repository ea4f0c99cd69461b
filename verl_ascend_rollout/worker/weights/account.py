"""Every element of every parameter is written exactly once in a weight sync, or the sync is refused.

What is counted are elements, storage by storage, as they are written; not names, and not what a loader says that it has
loaded: vLLM's loaders of experts take half of an expert's rows without a word, for the sake of padded sizes (0.28,
fused_moe/routed_experts.py, `_narrow_expert_data_for_padding`).
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from verl_ascend_rollout.worker.weights.plan import Fill
from verl_ascend_rollout.worker.weights.region import Region, Tally, storage_of

Writer = tuple[str, Region]
"""The name of a tensor of the stream, and a part of a parameter that it was written into."""


@dataclass
class _Entry:
    """One storage."""

    wanted: Tally  # what a whole sync writes into it
    began: bool = False  # whether something came, were it the no rows of a rank that has padding only
    copied: Tally = field(default_factory=Tally)  # what came out of the stream
    cleared: Tally = field(default_factory=Tally)  # filled with a constant before anything came: may be copied over
    padded: Tally = field(default_factory=Tally)  # filled afterwards

    def is_whole(self) -> bool:
        written = self.copied.plus(self.padded)
        return written == self.wanted or (self.began and written.plus(self.cleared) == self.wanted)


class Account:
    """What one sync has written so far."""

    def __init__(self, wanted: Mapping[int, Tally]) -> None:
        """Begin.

        Args:
            wanted: for each storage (see `storage_of`) what a whole sync writes into it.
        """
        self._entries = {storage: _Entry(tally) for storage, tally in wanted.items()}

    def copied(self, storage: int, region: Region) -> None:
        """Count what came out of the stream."""
        entry = self._entries.get(storage)
        if entry is not None:
            entry.began = True
            entry.copied.add(region)

    def filled(self, storage: int, region: Region) -> None:
        """Count what was filled with a constant."""
        entry = self._entries.get(storage)
        if entry is not None:
            (entry.padded if entry.began else entry.cleared).add(region)

    def is_whole(self, storage: int) -> bool:
        """Return whether each element of a storage that has to be written has been, once."""
        entry = self._entries.get(storage)
        return entry is None or entry.is_whole()


class Places:
    """The parameters of a model, by the storage that holds them: tied ones are one place, under the first name.

    Attributes:
        names: by storage.
        bases: by storage, the offset from which regions are counted.
        tensors: by name.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], padded: Mapping[str, Sequence[torch.Tensor]] = MappingProxyType({})
    ) -> None:
        """Look at each tensor, in the form in which a loader sees it.

        Args:
            tensors: by name.
            padded: of those that are larger than the checkpoint's, what is to be filled, as views.
        """
        self.names: dict[int, str] = {}
        self.bases: dict[int, int] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self._regions: dict[int, dict[Region, None]] = {}
        # A layer that is processed within a sync lets its parameters go, and what a loader makes next could get the
        # identity of one of them: its writes would be counted as a parameter's.  A weak reference keeps the identity
        # and no memory.
        self._identities = [
            StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            for tensor in tensors.values()
        ]
        for name, tensor in tensors.items():
            storage = storage_of(tensor)
            if storage not in self.names:
                self.names[storage] = name
                self.bases[storage] = int(tensor.storage_offset())
                self.tensors[name] = tensor
            for part in padded.get(name, (tensor,)):
                self._regions.setdefault(storage, {})[Region.of(part, self.bases[storage])] = None

    def regions(self, storage: int) -> list[Region]:
        """Return the parts of a storage that parameters are."""
        return list(self._regions[storage])

    def wanted(self) -> dict[int, Tally]:
        """Return what there is to be written, for `Account`."""
        found: dict[int, Tally] = {}
        for storage, regions in self._regions.items():
            tally = found[storage] = Tally()
            for region in regions:
                tally.add(region)
        return found


@dataclass
class Findings:
    """What is wrong with the places that were not written whole."""

    missing: list[str] = field(default_factory=list)  # names that should have come; of parameters, if nobody knows
    twice: list[str] = field(default_factory=list)  # names whose place another had been written into, with its name
    displaced: set[str] = field(default_factory=set)  # names of tensors whose place another one was written into
    short: dict[str, str] = field(default_factory=dict)  # tensors that brought less than their place takes, with why


def find(
    target: str,
    parts: Sequence[Region],
    writers: Sequence[Writer],
    fills: Sequence[Fill],
    expected: Iterable[Writer],
    came: Container[str],
    refused: Collection[str],
    findings: Findings,
) -> bool:
    """Find out why a place was not counted as whole, element by element: time and memory do not matter now.

    Args:
        target: the name of the parameter.
        parts: what of its storage has to be written.
        writers: what was written, in order.
        fills: what was filled with a constant.
        expected: the tensors that are known to belong into it, with their places.
        came: the names that were in the stream.
        refused: those of them that the model did not take, for a reason of their own.
        findings: is added to.

    Returns:
        Whether nothing is wrong after all: a loader has written parts of a tensor again that it had written before.
    """
    expected = list(expected)
    regions = [*parts, *(region for _, region in (*writers, *expected)), *(fill.destination for fill in fills)]
    written = torch.zeros(max(_end(region) for region in regions), dtype=torch.bool)
    once = _write(written, writers, findings)
    _fill(written, writers, fills)
    if all(bool(region.in_tensor(written).all()) for region in parts):
        return once
    lacking = dict.fromkeys(name for name, region in expected if not bool(region.in_tensor(written).all()))
    short: dict[str, int] = {}
    if lacking:
        findings.missing.extend(name for name in lacking if name not in came)
        brought = _brought(writers)
        short = {name: brought.get(name, 0) for name in lacking if name in came and name not in refused}
    elif writers:
        short = _short(writers, parts[0], written)
    elif target not in refused and not any(_same_end(target, name) for name in refused):
        findings.missing.append(target)
    for name, elements in short.items():
        findings.short.setdefault(
            name, f"brings {elements} elements, which do not fill its place in {target}: is it a shard, not gathered?"
        )
    return False


def _write(written: torch.Tensor, writers: Sequence[Writer], findings: Findings) -> bool:
    """Mark what was written, in order, and note what was written over another; whether nothing was."""
    had: list[Writer] = []
    twice = len(findings.twice)
    for name, region in writers:
        place = region.in_tensor(written)
        if bool(place.any()):
            first = next((other for other, known in had if other != name and _overlap(known, region)), None)
            if first is not None:
                findings.twice.append(f"{name} (the place of {first})")
                findings.displaced.add(first)
        place.fill_(True)
        had.append((name, region))
    return len(findings.twice) == twice


def _fill(written: torch.Tensor, writers: Sequence[Writer], fills: Sequence[Fill]) -> None:
    """Mark what was padded as written, and what was cleared and not copied again as not.

    Padding is what is filled beside what came with the same call of the loader, and nothing is copied over it later.
    """
    # From the last one on: what an element is in the end, the first that has it says.
    copied, seen = torch.zeros_like(written), torch.zeros_like(written)
    at = len(writers)
    for fill in reversed(fills):
        for _, region in writers[fill.after : at]:
            region.in_tensor(copied).fill_(True)
            region.in_tensor(seen).fill_(True)
        at = min(at, fill.after)
        place = fill.destination
        padding = fill.in_call and not bool(place.in_tensor(copied).any())
        place.in_tensor(written).copy_(torch.where(place.in_tensor(seen), place.in_tensor(written), padding))
        place.in_tensor(seen).fill_(True)


def _same_end(one: str, other: str) -> bool:
    """Return whether two names, of which one is a checkpoint's, are of one kind of weight of one layer."""
    numbers = [[part for part in name.split(".") if part.isdigit()] for name in (one, other)]
    return numbers[0] == numbers[1] and one.split(".")[-2:] == other.split(".")[-2:]


def _brought(writers: Iterable[Writer]) -> dict[str, int]:
    """Return the elements that each tensor brought."""
    brought: dict[str, int] = {}
    for name, region in writers:
        brought[name] = brought.get(name, 0) + region.elements
    return brought


def _short(writers: Sequence[Writer], part: Region, written: torch.Tensor) -> dict[str, int]:
    """Return those that may be to blame for what was not written, with the elements that each brought.

    Of experts, which have one place each, those that brought less than others of their layer did; where all brought the
    same, those whose expert is not whole.  Of other parameters, all that were written into it.
    """
    brought = _brought(writers)
    if len(part.size) != 3:
        return brought
    most = max(brought.values())
    less = {name: elements for name, elements in brought.items() if elements < most}
    if less:
        return less
    whole = part.in_tensor(written).flatten(1).all(dim=1)
    experts = [(name, (region.offset - part.offset) // part.stride[0]) for name, region in writers]
    return {name: brought[name] for name, expert in experts if not bool(whole[expert])}


def _end(region: Region) -> int:
    if not region.elements:
        return 1
    return region.offset + sum((size - 1) * stride for size, stride in zip(region.size, region.stride, strict=True)) + 1


def _overlap(one: Region, other: Region) -> bool:
    if one == other:
        return True
    both = torch.zeros(max(_end(one), _end(other)), dtype=torch.bool)
    one.in_tensor(both).fill_(True)
    return bool(other.in_tensor(both).any())
