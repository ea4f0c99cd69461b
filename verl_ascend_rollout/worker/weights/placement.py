"""Where a layer's processing puts the elements of a weight: enough of it to tell later that it still puts them there.

For weights whose kernel form is no view of the checkpoint's.  A few elements are looked for in what the processing made
of them the first time; each is found at a handful of places, since others have the same bits.  When the weight has been
loaded again, with other values, each has to be at one of its places.  A processing that moves elements to other places
passes by chance with a probability of about (places / elements) ** PROBES.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

PROBES = 32
"""Elements that are looked for."""

CHOSEN_FROM = 4096
"""Elements of which those with the largest values are taken, since few others have the same."""

SEARCHED = 2**26
"""Elements that are searched at most."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Probe:
    """A few elements of a weight in checkpoint form, before it is processed."""

    expert: int | None  # of which expert they are, of a weight of shape (experts, rows, columns); `None` of any other
    positions: torch.Tensor  # in that expert, or in the weight, in order of rows
    bits: torch.Tensor  # as integers

    @classmethod
    def of(cls, weight: torch.Tensor, filled: torch.Tensor | None = None) -> Probe | None:
        """Return a probe of a weight; `None` of an empty one, and of one that has other values than floats.

        Args:
            weight: in checkpoint form.
            filled: the part of it that a checkpoint fills, from its beginning, if that is not all.
        """
        if not weight.numel() or not weight.is_floating_point():
            return None
        expert = weight.shape[0] // 2 if weight.dim() == 3 else None
        part = _part(weight, expert)
        within = part if filled is None else _part(filled, expert)
        # A generator of its own: the engine's random numbers must not depend on being watched.
        generator = torch.Generator().manual_seed(0)
        drawn = torch.unique(torch.randint(within.numel(), (CHOSEN_FROM,), generator=generator)).to(part.device)
        drawn = _position(_indices(drawn, within.shape), part.shape)
        largest = _at(part, drawn).float().abs().topk(min(PROBES, drawn.numel())).indices
        positions = drawn[largest]
        return cls(expert, positions, _bits(_at(part, positions)))

    def find_in(self, kernel: torch.Tensor | None) -> Placement | None:
        """Return where the elements may lie now.

        Args:
            kernel: what the processing made of the weight.

        Returns:
            `None` if they are not there, or if there is more to search than is worth it.
        """
        if kernel is None or kernel.element_size() != self.bits.element_size():
            return None
        if self.expert is not None and (kernel.dim() < 2 or kernel.shape[0] <= self.expert):
            return None
        part = _part(kernel, self.expert)
        if not 0 < part.numel() <= SEARCHED:
            return None
        flat = _bits(part.contiguous().view(-1))
        found = [(flat == bits).nonzero().view(-1) for bits in self.bits]
        if not all(places.numel() for places in found):
            return None
        number = torch.repeat_interleave(torch.tensor([places.numel() for places in found]))
        return Placement(self.expert, self.positions.cpu(), torch.cat(found).cpu(), number, tuple(kernel.shape))


@dataclass(frozen=True)
class Placement:
    """Where elements of a weight may lie in its kernel's tensor."""

    expert: int | None  # and `positions`: see `Probe`
    positions: torch.Tensor
    places: torch.Tensor  # positions in the kernel's tensor (or its part for that expert), the first element's first
    number: torch.Tensor  # for each place the number of the element that may lie there
    shape: tuple[int, ...]  # of the kernel's tensor

    @classmethod
    def of_view(cls, shape: tuple[int, ...], layout: str) -> Placement | None:
        """Return the placement of a weight that lies as in the checkpoint (`identity`), or with its last two axes
        swapped (`transposed`); `None` of others."""
        elements = math.prod(shape)
        if not elements or layout not in ("identity", "transposed"):
            return None
        positions = torch.randint(elements, (PROBES,), generator=torch.Generator().manual_seed(0))
        if layout == "identity":
            return cls(None, positions, positions, torch.arange(PROBES), shape)
        rows, columns = shape[-2:]
        matrix, row, column = positions // (rows * columns), positions // columns % rows, positions % columns
        places = (matrix * columns + column) * rows + row
        return cls(None, positions, places, torch.arange(PROBES), (*shape[:-2], columns, rows))

    def probe(self, weight: torch.Tensor) -> Probe:
        """Return the same elements of a weight that has been loaded again, before it is processed."""
        positions = self.positions.to(weight.device)
        return Probe(self.expert, positions, _bits(_at(_part(weight, self.expert), positions)))

    def holds(self, probe: Probe, kernel: torch.Tensor) -> bool:
        """Return whether each element is at one of its places.

        Args:
            probe: from `probe`.
            kernel: what the processing made of the weight this time.
        """
        if tuple(kernel.shape) != self.shape:
            return False
        now = _bits(_at(_part(kernel, self.expert), self.places.to(kernel.device)))
        there = now == probe.bits[self.number.to(kernel.device)]
        counted = torch.zeros(len(self.positions), dtype=torch.int64, device=kernel.device)
        return bool(counted.index_add_(0, self.number.to(kernel.device), there.long()).all())


def _part(tensor: torch.Tensor, expert: int | None) -> torch.Tensor:
    return tensor.detach() if expert is None else tensor.detach()[expert]


def _at(tensor: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return elements at positions counted in order of rows, of a tensor of any strides."""
    return tensor.view(-1)[positions] if tensor.is_contiguous() else tensor[_indices(positions, tensor.shape)]


def _indices(positions: torch.Tensor, shape: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Along each axis, of positions counted in order of rows."""
    return tuple(positions // math.prod(shape[axis + 1 :]) % size for axis, size in enumerate(shape))


def _position(indices: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    """Return the positions in another shape, counted in order of rows."""
    found = torch.zeros_like(indices[0])
    for index, size in zip(indices, shape, strict=True):
        found = found * size + index
    return found


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])
