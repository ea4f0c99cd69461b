"""Where each tensor of a weight sync goes, written down once, so that later syncs are copies and nothing else.

A model's own `load_weights` finds the place of each tensor by comparing names, tens of microseconds for each of
thousands of experts.  It always finds the same place.  So while it loads, every write into a parameter is watched
(`Recorder`): a plain copy of a part of the incoming tensor into a part of a parameter becomes a `Route`, and the next
sync copies along the routes.  Tensor and expert parallelism, fused projections and tied weights need no code here: they
are in what the loader did.

What is no plain copy (a cast to another layout, arithmetic) makes the plan not replayable, and every sync goes through
the model's loader.  A tensor that does not come as it was written down (a new name, another shape or dtype) is given to
the loader once more, without letting it write, to see where it goes now.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from verl_ascend_rollout.worker.weights.blocks import Blocks, DirectWrites
from verl_ascend_rollout.worker.weights.layout import recorded_layers
from verl_ascend_rollout.worker.weights.storage import storage_of

logger = logging.getLogger("verl_ascend_rollout.worker")

NamedTensor = tuple[str, torch.Tensor]


@dataclass(frozen=True)
class Region:
    """A strided part of a tensor, in elements."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, view: torch.Tensor, base: int = 0) -> Region:
        """The region that a view is, its offset counted from `base` in the storage."""
        return cls(tuple(view.shape), view.stride(), int(view.storage_offset()) - base)

    def in_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """This region of a tensor."""
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)

    @functools.cached_property
    def elements(self) -> int:
        """How many elements it has."""
        return math.prod(self.size)


@dataclass(frozen=True)
class Copy:
    """One copy: from a part of an incoming tensor (`None`: all of it, as it is) into a part of a parameter."""

    target: str
    destination: Region
    source: Region | None


@dataclass(frozen=True)
class Route:
    """What becomes of one tensor of the stream.  Without copies, if this rank takes nothing of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    copies: tuple[Copy, ...]

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether a contiguous tensor comes as it was written down."""
        return tensor.dtype == self.dtype and tensor.shape == self.shape


@dataclass
class Plan:
    """The routes of a whole sync.

    Attributes:
        routes: by the name that the stream has for a tensor.
        targets: the parameters that are written to, by name, each with the elements that a whole sync writes into it.
        not_plain: tensors that the model's loader does more with than copy; with any, the plan is not replayed.
        packed: blocked parameters into which nothing but whole blocks is copied, each with how it lies.
        asked_again: whether it has been said that tensors came that were not as written down.
    """

    routes: dict[str, Route] = field(default_factory=dict)
    targets: dict[str, int] = field(default_factory=dict)
    not_plain: dict[str, str] = field(default_factory=dict)
    packed: dict[str, Blocks] = field(default_factory=dict)
    asked_again: bool = False

    @property
    def replayable(self) -> bool:
        """Whether a later sync can go by this plan."""
        return bool(self.routes) and not self.not_plain

    def take(self, found: Plan, model: torch.nn.Module) -> None:
        """Take over the routes of a sync that was whole."""
        first = not self.routes and not self.not_plain
        self.routes = found.routes
        self.not_plain = found.not_plain
        self.targets = {}
        regions: dict[str, list[Region]] = {}
        for route in self.routes.values():
            for copy in route.copies:
                self.targets[copy.target] = self.targets.get(copy.target, 0) + copy.destination.elements
                regions.setdefault(copy.target, []).append(copy.destination)
        self.packed = {
            name: blocks
            for name, blocks, shape in _blocked(model)
            if all(blocks.fits(region, shape) for region in regions.get(name, ()))
        }
        if self.not_plain and first:
            name, reason = next(iter(self.not_plain.items()))
            logger.info(
                "Every weight sync goes through the model's own loader, which does more than copy with %d tensors "
                "(the first: %s, %s)",
                len(self.not_plain),
                name,
                reason,
            )

    def forget(self) -> None:
        """Start over: the next sync goes through the model's own loader."""
        self.routes, self.targets, self.not_plain, self.packed = {}, {}, {}, {}


def _blocked(model: torch.nn.Module) -> Iterator[tuple[str, Blocks, tuple[int, ...]]]:
    for prefix, _, record in recorded_layers(model):
        for name, weight in record.weights.items():
            if weight.blocks is not None:
                yield f"{prefix}.{name}", weight.blocks, weight.shape


_KINDS: dict[Any, str] = {}


def _kind(func: Any) -> str:
    """What an operator does to its arguments: `writes` into one, makes a `view` of one, or `reads` them."""
    kind = _KINDS.get(func)
    if kind is None:
        aliases = any(argument.alias_info is not None for argument in func._schema.arguments)
        kind = _KINDS[func] = "writes" if func._schema.is_mutable else "view" if aliases else "reads"
    return kind


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches a loader's writes into parameters.

    Attributes:
        routes: of the tensors that were loaded, so far as they were plain copies.
        not_plain: of the others, what was done instead.
        late: names of parameters that were whole before a tensor came for them.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        temporary: Set[int] = frozenset(),
        closed: Mapping[int, str] = MappingProxyType({}),
        on_write: Callable[[int, int], None] = lambda storage, elements: None,
        write: bool = True,
        direct: Mapping[int, DirectWrites] = MappingProxyType({}),
    ) -> None:
        """Watch from here on, within a `with`.

        Args:
            parameters: by name, in the form in which the loader sees them.
            temporary: storages of parameters that are there for one sync only, so that a constant written into them
                must be written again.
            closed: names by storage of parameters that are whole, and not in checkpoint form any more.
            on_write: called with the storage and the number of elements of each write into a parameter.
            write: whether writes into parameters happen; without, the loader is only asked where it would write.
            direct: by storage, parameters in blocks into which copies go without a detour.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        # Tied weights are one storage; the first name stands for all.
        self._names: dict[int, str] = {}
        self._bases: dict[int, int] = {}
        for name, parameter in parameters.items():
            storage = storage_of(parameter)
            if storage not in self._names:
                self._names[storage] = name
                self._bases[storage] = int(parameter.storage_offset())
        self._temporary = temporary
        self._closed = closed
        self._on_write = on_write
        self._write = write
        self._direct = dict(direct)
        self._current: NamedTensor | None = None
        self._copies: list[Copy] = []
        self._other: str | None = None
        self.routes: dict[str, Route] = {}
        self.not_plain: dict[str, str] = {}
        self.late: list[str] = []

    def watched(self, pairs: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
        """The pairs as the loader takes them, one at a time: what it writes in between belongs to the last."""
        for name, tensor in pairs:
            self._end()
            self._current = (name, tensor)
            yield name, tensor
        self._end()

    def refused(self) -> str | None:
        """The name of the tensor that the loader was at when it raised; it gets no route."""
        name = self._current[0] if self._current is not None else None
        self._current = None
        self._copies, self._other = [], None
        return name

    def _end(self) -> None:
        if self._current is not None:
            name, tensor = self._current
            if self._other is None:
                self.routes[name] = Route(tuple(tensor.shape), tensor.dtype, tuple(self._copies))
            else:
                self.not_plain[name] = self._other
        self._current = None
        self._copies, self._other = [], None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch wraps every call of a mode otherwise, for the sake of torch.compile (torch 2.13, _python_dispatch.py);
        # a loader is not compiled, and there are tens of thousands of calls.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kind = _kind(func)
        if kind == "view":
            return func(*args, **(kwargs or {}))
        if kind == "reads" or not args or not isinstance(args[0], torch.Tensor):
            self._leave_direct(args, kwargs)
            return func(*args, **(kwargs or {}))
        storage = storage_of(args[0])
        if storage in self._closed:
            self.late.append(self._closed[storage])
            return args[0]
        if storage not in self._names:
            self._leave_direct(args, kwargs)
            return func(*args, **(kwargs or {}))
        self._note(func, args, storage)
        if not self._write:
            if func is torch.ops.aten.copy_.default and args[1].shape != args[0].shape:
                raise RuntimeError(f"its place in {self._names[storage]} has shape {tuple(args[0].shape)}")
            return args[0]
        result = args[0] if self._written_directly(func, args, kwargs, storage) else func(*args, **(kwargs or {}))
        self._on_write(storage, args[0].numel())
        return result

    def _written_directly(self, func: Any, args: tuple[Any, ...], kwargs: Any, storage: int) -> bool:
        direct = self._direct.get(storage)
        plain = func is torch.ops.aten.copy_.default and storage_of(args[1]) not in self._direct
        if direct is not None and plain and direct.write(Region.of(args[0], self._bases[storage]), args[1]):
            return True
        self._leave_direct(args, kwargs)
        return False

    def _leave_direct(self, args: tuple[Any, ...], kwargs: Any) -> None:
        """Something is done with parameters in blocks that is no copy into them: it finds what it expects."""
        if not self._direct:
            return
        for value in tree_leaves((args, kwargs)):
            direct = self._direct.pop(storage_of(value), None) if isinstance(value, torch.Tensor) else None
            if direct is not None:
                direct.leave()

    def _note(self, func: Any, args: tuple[Any, ...], storage: int) -> None:
        if self._current is None:
            return
        if func in (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default) and storage not in self._temporary:
            return  # padding, which stays as it is from then on
        tensor = self._current[1]
        if func is not torch.ops.aten.copy_.default:
            self._other = f"{func} into {self._names[storage]}"
            return
        written, source = args[0], args[1]
        if not _is_part(source, tensor) or source.shape != written.shape or not tensor.is_contiguous():
            self._other = f"a copy of something made of it into {self._names[storage]}"
            return
        whole = source.shape == tensor.shape and source.stride() == tensor.stride()
        self._copies.append(
            Copy(
                target=self._names[storage],
                destination=Region.of(written, self._bases[storage]),
                source=None if whole else Region.of(source, int(tensor.storage_offset())),
            )
        )


def _is_part(view: Any, tensor: torch.Tensor) -> bool:
    """Whether a tensor is a view of another, and lies within it."""
    if not isinstance(view, torch.Tensor) or storage_of(view) != storage_of(tensor) or view.dtype != tensor.dtype:
        return False
    first = view.storage_offset() - tensor.storage_offset()
    last = first + sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
    return first >= 0 and last < max(tensor.numel(), 1)
