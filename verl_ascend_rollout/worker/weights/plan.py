"""Where each tensor of a weight sync goes, written down once, so that later syncs are copies and nothing else.

A model's own `load_weights` finds the place of each tensor by comparing names, tens of microseconds for each of
thousands of experts.  It always finds the same place.  So while it loads, every write into a parameter is watched (see
`recorder`): a plain copy of a part of the incoming tensor into a part of a parameter becomes a `Route`, and the next
sync copies along the routes.  Tensor and expert parallelism, fused projections and tied weights need no code here: they
are in what the loader did.

What is no plain copy (arithmetic, a write that no tensor of the stream explains) makes the plan not replayable, and
every sync goes through the model's loader.  A tensor that does not come as it was written down (a new name, another
shape or dtype) is given to the loader once more, without letting it write, to see where it goes now.

A plan is taken from a sync in which every element was written once and every tensor was used, or not at all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from verl_ascend_rollout.worker.weights.cpu.packed_experts import PackedLayout
from verl_ascend_rollout.worker.weights.layout import recorded_layers
from verl_ascend_rollout.worker.weights.region import Region, Tally

logger = logging.getLogger("verl_ascend_rollout.worker")


@dataclass(frozen=True)
class Copy:
    """One copy: from a part of an incoming tensor (`None`: all of it, as it is) into a part of a parameter."""

    target: str
    destination: Region
    source: Region | None


@dataclass(frozen=True)
class Fill:
    """A part of a parameter that a loader fills with a constant: padding, or what it clears before it copies."""

    target: str
    destination: Region
    value: float
    after: int = 0  # how many copies into the parameter came before it
    in_call: bool = False  # whether one of them came in the same call of the loader


@dataclass(frozen=True)
class Route:
    """What becomes of one tensor of the stream.  Without copies, if this rank takes nothing of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    copies: tuple[Copy, ...]

    def takes(self, tensor: torch.Tensor) -> bool:
        """Return whether a contiguous tensor comes as it was written down."""
        return tensor.dtype == self.dtype and tensor.shape == self.shape


@dataclass
class Plan:
    """The routes of a whole sync."""

    routes: dict[str, Route] = field(default_factory=dict)  # by the name that the stream has for a tensor
    fills: tuple[Fill, ...] = ()  # padding of parameters that are there for one sync only
    # The parameters that are written to, by name, each with what the routes of a whole sync write into it.
    targets: dict[str, Tally] = field(default_factory=dict)
    # Tensors that the model's loader does more with than copy; with any, the plan is not replayed.
    not_plain: dict[str, str] = field(default_factory=dict)
    # Blocked parameters into which nothing but whole blocks is copied, each with how it lies.
    packed: dict[str, PackedLayout] = field(default_factory=dict)
    # For each parameter what was written into it in the last sync that passed, also after `forget`: by this an error
    # names what is missing.
    known: Mapping[str, Sequence[tuple[str, Region]]] = field(default_factory=dict)
    asked_again: bool = False  # whether it has been said that tensors came that were not as written down

    @property
    def replayable(self) -> bool:
        """Whether a later sync can go by this plan."""
        return bool(self.routes) and not self.not_plain

    def take(
        self,
        routes: dict[str, Route],
        fills: Iterable[Fill],
        not_plain: dict[str, str],
        writers: Mapping[str, Sequence[tuple[str, Region]]],
        model: torch.nn.Module,
    ) -> None:
        """Take over what a sync did that was whole."""
        first = not self.routes and not self.not_plain
        self.routes, self.known = routes, writers
        self.fills = tuple(fills)
        self.not_plain = not_plain
        self.targets = {}
        regions: dict[str, list[Region]] = {}
        for route in routes.values():
            for copy in route.copies:
                self.targets.setdefault(copy.target, Tally()).add(copy.destination)
                regions.setdefault(copy.target, []).append(copy.destination)
        self.packed = {
            name: blocks
            for name, blocks, shape in _blocked(model)
            if all(blocks.fits(region, shape) for region in regions.get(name, ()))
        }
        if not_plain and first:
            name, reason = next(iter(not_plain.items()))
            logger.info(
                "Every weight sync goes through the model's own loader, which does more than copy with %d tensors "
                "(the first: %s, %s)",
                len(not_plain),
                name,
                reason,
            )

    def forget(self) -> None:
        """Start over: the next sync goes through the model's own loader."""
        self.routes, self.fills, self.targets, self.not_plain, self.packed = {}, (), {}, {}, {}


def _blocked(model: torch.nn.Module) -> Iterator[tuple[str, PackedLayout, tuple[int, ...]]]:
    for prefix, _, record in recorded_layers(model):
        for name, weight in record.weights.items():
            if weight.blocks is not None:
                yield f"{prefix}.{name}", weight.blocks, weight.shape


# --------------------------------------------------------------------------------------------------------------------
# few, large copies


def joined(copies: Iterable[Copy], shapes: Callable[[str], tuple[int, ...]]) -> tuple[Copy, ...]:
    """Return copies that do the same with fewer, larger ones, where a loader copied one tensor part by part.

    The experts of a layer, which come as one tensor and go to this rank's slice of each, are one copy or two.

    Args:
        copies: of one tensor.
        shapes: the shape of a parameter, by name.
    """
    found = list(dict.fromkeys(copies))
    while True:
        fewer = _in_rows(_side_by_side(found))
        if len(fewer) == len(found):
            return tuple(_by_expert(copy, shapes(copy.target)) for copy in fewer)
        found = fewer


def _by_expert(copy: Copy, shape: tuple[int, ...]) -> Copy:
    """Return the same copy with an axis for the experts, where it brings the rows of several: so blocks are packed."""
    source, destination = copy.source, copy.destination
    if source is None or len(shape) != 3 or len(destination.size) != 2 or destination.stride != (shape[2], 1):
        return copy
    experts, rest = divmod(destination.size[0], shape[1])
    if experts < 2 or rest or source.size != destination.size:
        return copy
    size = (experts, shape[1], destination.size[1])
    return replace(
        copy,
        destination=Region(size, (shape[1] * shape[2], *destination.stride), destination.offset),
        source=Region(size, (shape[1] * source.stride[0], *source.stride), source.offset),
    )


def _in_rows(copies: list[Copy]) -> list[Copy]:
    """Make one of each run of copies of one form that are equally far apart in source and destination."""
    result: list[Copy] = []
    first = 0
    while first < len(copies):
        last, step = first, None
        while last + 1 < len(copies):
            between = _distance(copies[last], copies[last + 1])
            if between is None or step not in (None, between) or min(between) <= 0:
                break
            last, step = last + 1, between
        result.append(copies[first] if step is None else _repeated(copies[first], last - first + 1, step))
        first = last + 1
    return result


def _distance(one: Copy, other: Copy) -> tuple[int, int] | None:
    """From one copy to another, in destination and source; `None` if they differ in more than their place."""
    if one.source is None or other.source is None or one.target != other.target:
        return None
    alike = (one.destination.size, one.destination.stride) == (other.destination.size, other.destination.stride) and (
        one.source.size,
        one.source.stride,
    ) == (other.source.size, other.source.stride)
    if not alike:
        return None
    return other.destination.offset - one.destination.offset, other.source.offset - one.source.offset


def _repeated(copy: Copy, count: int, step: tuple[int, int]) -> Copy:
    assert copy.source is not None
    destination, source = (
        Region((count, *region.size), (each, *region.stride), region.offset)
        for region, each in zip((copy.destination, copy.source), step, strict=True)
    )
    return replace(copy, destination=destination, source=source)


def _side_by_side(copies: list[Copy]) -> list[Copy]:
    """Make one of each pair of neighbours of which the second goes on where the first ends, along any axis."""
    result: list[Copy] = []
    for copy in copies:
        together = _extended(result[-1], copy) if result else None
        if together is None:
            result.append(copy)
        else:
            result[-1] = together
    return result


def _extended(one: Copy, other: Copy) -> Copy | None:
    if one.source is None or other.source is None or one.target != other.target:
        return None
    sizes = {one.destination.size, one.source.size}, {other.destination.size, other.source.size}
    strides = one.destination.stride == other.destination.stride and one.source.stride == other.source.stride
    if not strides or any(len(each) != 1 for each in sizes):
        return None
    before, after = one.destination.size, other.destination.size
    apart = other.destination.offset - one.destination.offset, other.source.offset - one.source.offset
    for axis, length in enumerate(before):
        steps = one.destination.stride[axis], one.source.stride[axis]
        rest = before[:axis] + before[axis + 1 :] == after[:axis] + after[axis + 1 :]
        if rest and apart == (length * steps[0], length * steps[1]):
            size = (*before[:axis], length + after[axis], *before[axis + 1 :])
            return replace(one, destination=replace(one.destination, size=size), source=replace(one.source, size=size))
    return None
