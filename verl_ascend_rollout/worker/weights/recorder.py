"""Watching a model's loader: what it writes into parameters, and which tensor of the stream that came from.

A write is traced to its tensor by memory: what is copied lies within a tensor of the stream, or within one that was
made of it.  So it does not matter when a loader writes, at once or after it has taken all it is given (vLLM's
Granite-MoE collects them in a dictionary).  A write that nothing explains leaves the sync right, since it is counted,
and the plan unusable, since it cannot be repeated.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from verl_ascend_rollout.transport.stream import NamedTensor
from verl_ascend_rollout.worker.weights.account import Account, Places, Writer
from verl_ascend_rollout.worker.weights.cpu.packed_experts import DirectWrites
from verl_ascend_rollout.worker.weights.plan import Copy, Fill, Route, joined
from verl_ascend_rollout.worker.weights.region import Region, Tally, storage_of

_COPY = torch.ops.aten.copy_.default
_COPIES = torch.ops.aten._foreach_copy_.default
_FILLS = (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default)
_ITEM = torch.ops.aten._local_scalar_dense.default

UNEXPLAINED = "(unexplained)"
"""Stands for the name of the tensor where a write came from none."""

_FLOATS = frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64})
"""Between these a cast keeps the meaning of a value.  Integers, booleans and complex numbers are no weights, and a
float of one byte means nothing without its scale."""


PADDED_TO = 64
"""vLLM pads a vocabulary to a multiple of this (0.11 to 0.28, vocab_parallel_embedding.py), so ranks may get no row."""


def castable(source: torch.dtype, destination: torch.dtype) -> bool:
    """Return whether values of one dtype are what a parameter of the other wants."""
    return source == destination or (source in _FLOATS and destination in _FLOATS)


@dataclass
class Incoming:
    """One tensor of the stream on its way to the loader."""

    name: str  # the stream's
    tensor: torch.Tensor  # contiguous
    # What the loader is given instead, under names of its own: views that together are the tensor; or it itself.
    parts: Sequence[NamedTensor] = ()
    copies: list[Copy] = field(default_factory=list)  # what was copied of it, so far as it was only copied
    other: str | None = None  # what else was done with it
    read: dict[Region, None] = field(default_factory=dict)  # the parts of it that something else was made of
    elsewhere: set[str] = field(default_factory=set)  # its parts that a loader said belong to other ranks
    refused: str | None = None  # why the model does not take it

    def __post_init__(self) -> None:
        """Without parts, it is its own only one."""
        self.parts = self.parts or ((self.name, self.tensor),)

    def route(self, shapes: Callable[[str], tuple[int, ...]]) -> Route:
        """Return what became of it; `shapes` gives that of a parameter."""
        return Route(tuple(self.tensor.shape), self.tensor.dtype, joined(self.copies, shapes))


@dataclass(frozen=True)
class _Part:
    """A part of an incoming tensor, and the bytes of its storage that it takes."""

    of: Incoming
    name: str
    storage: int
    begin: int
    end: int

    def has(self, storage: int, begin: int, end: int) -> bool:
        """Return whether these bytes are of it."""
        return storage == self.storage and begin >= self.begin and end <= self.end


_KINDS: dict[Any, str] = {}


def _kind(func: Any) -> str:
    """Return what an operator does to its arguments: `writes` into one, makes a `view` of one, or `reads` them."""
    kind = _KINDS.get(func)
    if kind is None:
        aliases = any(argument.alias_info is not None for argument in func._schema.arguments)
        kind = _KINDS[func] = "writes" if func._schema.is_mutable else "view" if aliases else "reads"
    return kind


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches a loader's writes into parameters, within a `with`.

    Attributes:
        writers: for each parameter the tensors that were written into it, in order, with their places.
        fills: what was filled with a constant.
        not_plain: tensors with which more was done than copy parts of them, each with what.
        late: names of tensors that came for a layer that had been rebuilt, each with the parameter.
        refused: parameters into which something of another shape was to be copied.
    """

    def __init__(
        self,
        places: Places,
        account: Account | None = None,
        temporary: Set[int] = frozenset(),
        closed: Mapping[int, str] = MappingProxyType({}),
        on_write: Callable[[int], None] = lambda storage: None,
        write: bool = True,
        direct: Mapping[int, DirectWrites] = MappingProxyType({}),
    ) -> None:
        """Begin.

        Args:
            places: the parameters, in the form in which the loader sees them.
            account: is told of every write.
            temporary: storages of parameters that are there for one sync only, so that a constant written into them
                must be written again.
            closed: names by storage of parameters that are whole, and not in checkpoint form any more.
            on_write: called with the storage of each write into a parameter.
            write: whether writes into parameters happen; without, the loader is only asked where it would write.
            direct: by storage, parameters in blocks into which copies go without a detour.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = places.names
        self._bases = places.bases
        self._account = account if account is not None else Account({})
        self._temporary = temporary
        self._closed = closed
        self._on_write = on_write
        self._write = write
        self._direct = dict(direct)
        self._sources: dict[int, tuple[list[int], list[_Part]]] = {}
        self._made: dict[int, frozenset[str]] = {}
        self._kept: list[torch.Tensor] = []
        self._incoming: dict[str, Incoming] = {}
        self._current: _Part | None = None
        self._read: tuple[_Part, Region] | None = None
        self._unexplained = False
        self._writes = 0
        self._before_call: dict[str, int] = {}  # by parameter, the copies before this call of the loader
        self.writers: dict[str, list[Writer]] = {}
        self.fills: list[Fill] = []
        self.not_plain: dict[str, str] = {}
        self.late: list[str] = []
        self.refused: set[str] = set()

    # ----------------------------------------------------------------------------------------------------------------
    # what comes in

    def expect(self, batch: Iterable[Incoming]) -> None:
        """Know these tensors from now on, and no others: the next call of the loader."""
        self._incoming = {incoming.name: incoming for incoming in batch}
        parts: dict[int, list[_Part]] = {}
        for incoming in self._incoming.values():
            for name, tensor in incoming.parts:
                storage, begin = storage_of(tensor), int(tensor.storage_offset()) * tensor.element_size()
                parts.setdefault(storage, []).append(_Part(incoming, name, storage, begin, begin + _span(tensor)))
        self._sources = {}
        for storage, found in parts.items():
            found.sort(key=lambda part: part.begin)
            self._sources[storage] = [part.begin for part in found], found
        self._made.clear()
        self._kept.clear()
        self._unexplained = False
        self._before_call = {name: len(written) for name, written in self.writers.items()}

    def stream(self) -> Iterator[NamedTensor]:
        """Yield the weights for the loader, as it takes them, one at a time."""
        for incoming in self._incoming.values():
            for name, tensor in incoming.parts:
                self._read = None
                self._current = self._source(tensor)
                yield name, tensor
        self._current = self._read = None

    def current(self) -> Incoming | None:
        """Return the tensor that the loader took last; none where it has taken all."""
        return self._current.of if self._current is not None else None

    def elsewhere(self, tensor: torch.Tensor) -> None:
        """Note that a loader has said of a tensor (or a part) that it belongs to another rank."""
        part = self._source(tensor)
        if part is not None:
            part.of.elsewhere.add(part.name)

    @property
    def writes(self) -> int:
        """How many writes there have been."""
        return self._writes

    @property
    def unexplained(self) -> bool:
        """Whether this call of the loader wrote something that no tensor explains."""
        return self._unexplained

    def _source(self, tensor: torch.Tensor) -> _Part | None:
        """Return the part of the stream that a tensor lies in."""
        storage = storage_of(tensor)
        known = self._sources.get(storage)
        if known is None:
            return None
        begin = int(tensor.storage_offset()) * tensor.element_size()
        end = begin + _span(tensor)
        # First, since two names may have one memory: tied weights of a trainer in the same process.
        if self._current is not None and self._current.has(storage, begin, end):
            return self._current
        index = bisect.bisect_right(known[0], begin) - 1
        part = known[1][index] if index >= 0 else None
        return part if part is not None and part.has(storage, begin, end) else None

    def _origins(self, tensor: torch.Tensor) -> frozenset[str]:
        """Return the names of the tensors that a tensor was made of."""
        made = self._made.get(storage_of(tensor))
        if made is not None:
            return made
        part = self._source(tensor)
        return frozenset((part.of.name,)) if part is not None else frozenset()

    # ----------------------------------------------------------------------------------------------------------------
    # what the loader does

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch wraps every call of a mode otherwise, for the sake of torch.compile (torch 2.13, _python_dispatch.py);
        # a loader is not compiled, and there are tens of thousands of calls.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Carry out one operator, and note what it wrote."""
        kwargs = kwargs or {}
        kind = _kind(func)
        if kind == "view":
            return func(*args, **kwargs)
        if kind == "reads":
            return self._reads(func, args, kwargs)
        if func is _COPIES:
            for destination, source in zip(args[0], args[1], strict=True):
                destination.copy_(source)
            return None
        if func is _COPY or func in _FILLS:
            return self._writes_whole(func, args, kwargs)
        return self._writes_somehow(func, args, kwargs)

    def _reads(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        self._leave_direct(args, kwargs)
        result = func(*args, **kwargs)
        if func is _ITEM:
            part = self._source(args[0])
            self._read = (part, self._region(part, args[0])) if part is not None else None
        else:
            self._follow((args, kwargs), result)
        return result

    def _follow(self, inputs: Any, outputs: Any) -> None:
        """Remember what tensors were made of."""
        made = [value for value in tree_leaves(outputs) if isinstance(value, torch.Tensor)]
        origins: frozenset[str] = frozenset()
        if made:
            for value in tree_leaves(inputs):
                if isinstance(value, torch.Tensor):
                    origins |= self._origins(value)
                    part = self._source(value)
                    if part is not None:
                        part.of.read[self._region(part, value)] = None
        if origins:
            for value in made:
                storage = storage_of(value)
                if storage not in self._names and storage not in self._sources:
                    self._made[storage] = self._made.get(storage, frozenset()) | origins
                    self._kept.append(value)  # or another tensor may get its place

    def _writes_whole(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        written = args[0]
        storage = storage_of(written)
        if storage in self._closed:
            self.late.append(f"{self._blamed(args)} ({self._closed[storage]} was whole)")
            return written
        if storage not in self._names:
            self._leave_direct(args, kwargs)
            result = func(*args, **kwargs)
            self._changed(func, written)
            self._follow(args[1:], written)
            return result
        self._writes += 1
        if func is _COPY:
            accepted = self._note_copy(written, args[1], storage)
        elif self._read is not None and written.numel() == 1:
            # How vLLM loads a parameter of one element (0.28, weight_utils.py, default_weight_loader).
            accepted = self._note_scalar(written, storage)
        else:
            accepted = self._note_fill(written, float(args[1]) if len(args) > 1 else 0.0, storage)
        if not self._write or not accepted:
            return written
        if not (func is _COPY and self._written_directly(args, storage)):
            self._leave_direct(args, kwargs)
            func(*args, **kwargs)
        self._on_write(storage)
        return written

    def _writes_somehow(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Note an operator of which it is not known what it writes: it is not counted as having written."""
        self._leave_direct(args, kwargs)
        touched = [value for value in _written_by(func, args, kwargs) if storage_of(value) in self._names]
        for value in touched:
            self._writes += 1
            self._note_other(f"{func} into {self._names[storage_of(value)]}", self._origins_of((args, kwargs)))
        if touched and not self._write:
            return args[0] if args else None
        result = func(*args, **kwargs)
        outputs = [value for value in _written_by(func, args, kwargs) if storage_of(value) not in self._names]
        for value in outputs:
            self._changed(func, value)
        self._follow((args, kwargs), outputs)
        for value in touched:
            if _is_out(func):
                # Of what an `out=` is given, all is written.
                self._count(storage_of(value), Region.of(value, self._bases[storage_of(value)]), None)
                self._on_write(storage_of(value))
        return result

    def _changed(self, func: Any, written: torch.Tensor) -> None:
        """Note a tensor of the stream that a loader changes before it copies it: it is not copied as it came."""
        part = self._source(written)
        if part is not None:
            self._note_other(f"{func} on it", (part.of.name,))

    def _written_directly(self, args: tuple[Any, ...], storage: int) -> bool:
        direct = self._direct.get(storage)
        if direct is None or storage_of(args[1]) in self._direct:
            return False
        return direct.write(Region.of(args[0], self._bases[storage]), args[1])

    def _leave_direct(self, args: tuple[Any, ...], kwargs: Any) -> None:
        """Something is done with parameters in blocks that is no copy into them: it finds what it expects."""
        if not self._direct:
            return
        for value in tree_leaves((args, kwargs)):
            direct = self._direct.pop(storage_of(value), None) if isinstance(value, torch.Tensor) else None
            if direct is not None:
                direct.leave()

    # ----------------------------------------------------------------------------------------------------------------
    # what is noted of it

    def _note_copy(self, written: torch.Tensor, source: torch.Tensor, storage: int) -> bool:
        """Note a copy into a parameter; whether it may happen."""
        name = self._names[storage]
        if _without_ones(source.shape) != _without_ones(written.shape):
            # Broadcasting would make a whole weight of a row.
            self.refused.add(name)
            raise RuntimeError(f"its place in {name} has shape {tuple(written.shape)}")
        source = source.reshape(written.shape)  # axes of one element more or less
        region = Region.of(written, self._bases[storage])
        part = self._source(source)
        origins = self._origins(source)
        made_of = (self._incoming[origin] for origin in origins)
        wrong = [incoming for incoming in made_of if not castable(incoming.tensor.dtype, written.dtype)]
        for incoming in wrong:
            incoming.refused = incoming.refused or f"is {incoming.tensor.dtype}, and {name} is {written.dtype}"
        if part is None:
            self._note_other(f"a copy of something made of it into {name}", origins)
        elif source.dtype != part.of.tensor.dtype:
            self._note_other(f"a copy of its bytes as {source.dtype} into {name}", origins)
        else:
            whole = source.shape == part.of.tensor.shape and source.stride() == part.of.tensor.stride()
            part.of.copies.append(Copy(name, region, None if whole else self._region(part, source)))
        self._count(storage, region, part, origins)
        return not wrong

    def _note_scalar(self, written: torch.Tensor, storage: int) -> bool:
        assert self._read is not None
        part, source = self._read
        name, region = self._names[storage], Region.of(written, self._bases[storage])
        accepted = castable(part.of.tensor.dtype, written.dtype)
        if not accepted:
            part.of.refused = f"is {part.of.tensor.dtype}, and {name} is {written.dtype}"
        part.of.copies.append(Copy(name, region, Region(region.size, (1,) * len(region.size), source.offset)))
        self._count(storage, region, part)
        return accepted

    def _note_fill(self, written: torch.Tensor, value: float, storage: int) -> bool:
        region = Region.of(written, self._bases[storage])
        if region.elements:
            name = self._names[storage]
            after = len(self.writers.get(name, ()))
            self._account.filled(storage, region)
            self.fills.append(Fill(name, region, value, after, after > self._before_call.get(name, 0)))
        return True

    def _note_other(self, what: str, origins: Iterable[str]) -> None:
        """Note that something was done that is no copy out of the stream, with the tensors that it was done with."""
        origins = list(origins)
        if not origins:
            self._unexplained = True
            origins = [self._current.of.name] if self._current is not None else []
        for name in origins:
            self._incoming[name].other = what
        for name in origins or [UNEXPLAINED]:
            self.not_plain.setdefault(name, what)

    def _count(self, storage: int, region: Region, part: _Part | None, origins: frozenset[str] = frozenset()) -> None:
        self._account.copied(storage, region)
        current = {self._current.of.name} if self._current is not None else {UNEXPLAINED}
        for name in {part.of.name} if part is not None else origins or current:
            self.writers.setdefault(self._names[storage], []).append((name, region))

    def _origins_of(self, values: Any) -> frozenset[str]:
        found: frozenset[str] = frozenset()
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor):
                found |= self._origins(value)
        return found

    def _blamed(self, values: Any) -> str:
        return next(iter(sorted(self._origins_of(values))), UNEXPLAINED)

    def _region(self, part: _Part, tensor: torch.Tensor) -> Region:
        return Region.of(tensor, int(part.of.tensor.storage_offset()))


def used_whole(incoming: Incoming, ranks: Sequence[tuple[int, int]]) -> str | None:
    """Return why an incoming tensor was not used, or not all of it; `None` where it was.

    Args:
        incoming: after the loader has had it.
        ranks: the groups over which a tensor may be split: this rank in each, and how many there are.
    """
    base = int(incoming.tensor.storage_offset())
    by_part = _by_part(incoming, base)
    unused = [name for name, _ in incoming.parts if name not in by_part and name not in incoming.elsewhere]
    if len(unused) == len(incoming.parts):
        return "no parameter of this model takes it"
    if unused:
        return f"no parameter of this model takes its part {unused[0]}"
    for name, view in incoming.parts:
        sources = by_part.get(name)
        if sources is None:
            continue
        whole, used = Tally(), Tally()
        whole.add(Region.of(view, base))
        for region in sources:
            used.add(region)
        if incoming.other is not None and used.elements > whole.elements:
            continue  # parts of it were read more than once
        if used != whole and not _is_share(Region.of(view, base), sources, ranks):
            return f"only {used.elements} of the {whole.elements} elements of shape {tuple(view.shape)} were used"
    return None


def _by_part(incoming: Incoming, base: int) -> dict[str, list[Region]]:
    """Return what was copied of each part, or read to make something of it, each place once."""
    found: dict[str, dict[Region, None]] = {}
    whole = Region.of(incoming.tensor, base)
    begins = sorted((int(view.storage_offset()) - base, name) for name, view in incoming.parts)
    read = incoming.read if incoming.other is not None else ()
    for source in (*(copy.source or whole for copy in incoming.copies), *read):
        index = bisect.bisect_right(begins, (source.offset, "\U0010ffff")) - 1
        found.setdefault(begins[index][1], {})[source] = None
    return {name: list(regions) for name, regions in found.items()}


def _is_share(whole: Region, used: Sequence[Region], ranks: Sequence[tuple[int, int]]) -> bool:
    """Return whether what was used of a tensor is this rank's share, and the other ranks' shares are the rest."""
    boxes = [_box_in(whole, region) for region in used]
    if any(box is None for box in boxes):
        return False
    axes = [axis for axis, size in enumerate(whole.size) if any(box[axis] != (0, size) for box in boxes if box)]
    if not axes:
        return False
    for axis in axes:
        pieces = sorted({box[axis] for box in boxes if box})
        if not any(_shares(pieces, whole.size[axis], rank, ranks_) for rank, ranks_ in ranks if ranks_ > 1):
            return False
    return True


def _box_in(whole: Region, region: Region) -> tuple[tuple[int, int], ...] | None:
    """Begin and end of a region along each axis of a contiguous tensor; `None` if it is no box in it."""
    left = region.offset - whole.offset
    sizes = dict(zip(region.stride, region.size, strict=True))
    box = []
    for size, stride in zip(whole.size, whole.stride, strict=True):
        begin, left = divmod(left, stride)
        length = 1 if size == 1 else sizes.get(stride, 1)
        if begin + length > size:
            return None
        box.append((begin, begin + length))
    elements = 1
    for begin, end in box:
        elements *= end - begin
    return tuple(box) if left == 0 and elements == region.elements else None


def _shares(pieces: Sequence[tuple[int, int]], size: int, rank: int, ranks: int, begin: int = 0) -> bool:
    """Return whether pieces are what one rank takes of an axis that is split piece by piece: q, k and v in one, for
    example.

    A piece may be split over all ranks or over a part of them (keys and values of fewer heads than there are ranks,
    each held by several), and the last share may be smaller (a padded vocabulary).
    """
    if not pieces:
        return begin == size
    (start, end), rest = pieces[0], pieces[1:]
    if start == end == size and rank and not rest:
        return True  # the rows are gone before it is this rank's turn
    for shares in (each for each in range(1, ranks + 1) if ranks % each == 0):
        index = rank // (ranks // shares)
        length = end - start if index == 0 else (start - begin) // index
        if length <= 0 or start != begin + index * length:
            continue
        until = begin + shares * length
        if end == start + length and _shares(rest, size, rank, ranks, until):
            return True
        # A vocabulary: split over all ranks, and the last ones have less or nothing.
        padding = until - size
        least = max(length, PADDED_TO if size > PADDED_TO else 0)
        if not rest and shares == ranks and end == min(start + length, size) and 0 < padding < least:
            return True
    return False


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]


def _span(view: torch.Tensor) -> int:
    """Return the bytes from the first element of a tensor to the end of its last."""
    if not view.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
    return int(last + 1) * view.element_size()


def _written_by(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Return the tensors that an operator may write into."""
    found: list[torch.Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found.extend(each for each in tree_leaves(value) if isinstance(each, torch.Tensor))
    return found


def _is_out(func: Any) -> bool:
    return any(argument.is_out for argument in func._schema.arguments)
