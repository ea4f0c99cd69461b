"""Strided parts of tensors, and a sum that tells whether parts make up a whole."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

PRIME = 2**61 - 1
BASE = 1_147_395_283_465_823_941
"""The element at position n of a storage counts as BASE**n modulo PRIME, see `Tally`."""


def storage_of(tensor: torch.Tensor) -> int:
    """Return what tells the storage of a tensor from all others that exist at the same time, with or without memory."""
    return int(tensor.untyped_storage()._cdata)


@dataclass(frozen=True)
class Region:
    """A strided part of a tensor, in elements."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, view: torch.Tensor, base: int = 0) -> Region:
        """Return the region that a view is, its offset counted from `base` in the storage."""
        return cls(tuple(view.shape), view.stride(), int(view.storage_offset()) - base)

    def in_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this region of a tensor."""
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)

    @functools.cached_property
    def elements(self) -> int:
        """How many elements it has."""
        return math.prod(self.size)

    @functools.cached_property
    def checksum(self) -> int:
        """The sum over its elements of BASE**position modulo PRIME, worked out without looking at each."""
        return _box(self.size, self.stride) * pow(BASE, self.offset, PRIME) % PRIME


@functools.lru_cache(maxsize=4096)
def _box(size: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Return the checksum of a region that begins at position 0: a product of geometric series."""
    product = 1
    for count, step in zip(size, stride, strict=True):
        ratio = pow(BASE, step, PRIME)
        series = count if ratio == 1 else (pow(ratio, count, PRIME) - 1) * pow(ratio - 1, -1, PRIME)
        product = product * series % PRIME
    return product


@dataclass
class Tally:
    """What has been written into one storage: how many elements, and which.

    Two tallies are equal if the same elements were written equally often.  That is decided by the number of elements
    and by a polynomial over their positions, taken at one point of a field of 2**61 elements: different sets of n
    elements agree by chance with a probability below n / 2**61.  So "every element exactly once" costs two additions
    for a write, and no memory.
    """

    elements: int = 0
    checksum: int = 0

    def add(self, region: Region) -> None:
        """Count the elements of a region."""
        self.elements += region.elements
        self.checksum += region.checksum

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tally):
            return NotImplemented
        return self.elements == other.elements and (self.checksum - other.checksum) % PRIME == 0

    def plus(self, other: Tally) -> Tally:
        """Return what both have counted."""
        return Tally(self.elements + other.elements, self.checksum + other.checksum)
