"""Expert weights that a CPU kernel wants in blocks: loaded through a view, like weights that are transposed.

vLLM 0.28 packs `w13_weight` and `w2_weight` (experts/cpu_moe.py) into a tensor of the same shape, where each block of
rows lies column by column: element by element, or for AMX in pairs of columns.  So the packed tensor is a permutation
of the checkpoint's, and a strided view of the one as the other exists: a tensor of a weight sync is copied straight to
its place, without the rest of its layer and without a second copy, and in less time than vLLM's own packing of one
expert after the other takes (see `block_copy`; AMX, bf16, one thread: 0.5 to 0.7 plain copies instead of 1.9).

Which blocks a weight has is found by looking at what the packing did, and where that is no such permutation, or could
be more than one, the layer is rebuilt instead (see `staging`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from verl_ascend_rollout.worker.weights.cpu.block_copy import compile_for, copy_into_blocks
from verl_ascend_rollout.worker.weights.region import Region, storage_of

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class PackedLayout:
    """How an expert's rows lie in a packed weight."""

    rows: int  # of a block
    group: int  # elements of a row that stay together

    def packed(self, weight: torch.Tensor) -> torch.Tensor:
        """Return whole experts of a packed weight, as a view.

        Args:
            weight: shape (..., rows, columns), contiguous.

        Returns:
            Integers of shape (..., blocks, groups, rows of a block).
        """
        *experts, rows, columns = weight.shape
        return self.integers(weight).view(*experts, rows // self.rows, columns // self.group, self.rows)

    def plain(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return rows in checkpoint form, as a view of the shape that `packed` has.

        Args:
            tensor: shape (..., rows, columns); copied where groups of its elements do not lie together.
        """
        if tensor.storage_offset() % self.group or not _groups_lie_together(self, tensor.stride()):
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        return self.integers(tensor).as_strided(*_plain(self, tensor.shape, tensor.stride()))

    def pack(self, tensor: torch.Tensor, weight: torch.Tensor) -> None:
        """Copy whole experts, shape (..., rows, columns), in checkpoint form into a packed weight."""
        copy_into_blocks([self.packed(weight)], [self.plain(tensor)])

    def compile_for(self, dtype: torch.dtype) -> None:
        """Compile what packs a weight of a dtype, which takes about a second, before it is needed."""
        compile_for(_INTEGERS[self.group * dtype.itemsize])

    def region(self, integers: torch.Tensor, region: Region) -> torch.Tensor:
        """Return a region of a packed weight, which `fits`, as a view.

        Args:
            integers: the whole of it, contiguous, as `integers` gives it.
            region: in checkpoint form.

        Returns:
            As from `packed`.
        """
        return integers.as_strided(
            *_packed(self, region.size, region.stride), integers.storage_offset() + region.offset // self.group
        )

    def fits(self, region: Region, weight: tuple[int, ...]) -> bool:
        """Return whether a region of a weight of shape (experts, rows, columns) is one of whole blocks."""
        rows, columns = weight[-2], weight[-1]
        size, stride = region.size, region.stride
        if len(size) == 3 and (size[0] == 1 or stride[0] == rows * columns):
            size, stride = size[1:], stride[1:]
        if len(size) != 2 or size[1] != columns or stride != (columns, 1) or region.offset % columns:
            return False
        first = region.offset // columns % rows
        return first % self.rows == 0 and size[0] % self.rows == 0 and first + size[0] <= rows

    def integers(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor with one integer for each group of elements in a row."""
        return tensor.view(_INTEGERS[self.group * tensor.element_size()])


# Worked out once for each geometry: there are thousands of experts in a sync.


@functools.lru_cache
def _packed(
    blocks: PackedLayout, size: tuple[int, ...], stride: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return size and strides, in integers, of whole blocks in a packed weight, from those in checkpoint form."""
    *experts, rows, columns = size
    columns //= blocks.group
    return (
        (*experts, rows // blocks.rows, columns, blocks.rows),
        (*[each // blocks.group for each in stride[:-2]], blocks.rows * columns, blocks.rows, 1),
    )


@functools.lru_cache
def _plain(
    blocks: PackedLayout, size: tuple[int, ...], stride: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the same of rows in checkpoint form."""
    *experts, rows, columns = size
    *strides, row = [each // blocks.group for each in stride[:-1]]
    return (
        (*experts, rows // blocks.rows, columns // blocks.group, blocks.rows),
        (*strides, row * blocks.rows, 1, row),
    )


@functools.lru_cache
def _groups_lie_together(blocks: PackedLayout, stride: tuple[int, ...]) -> bool:
    return stride[-1] == 1 and all(each % blocks.group == 0 for each in stride[:-1])


class DirectWrites:
    """A packed weight that a loader writes into without knowing: it sees a parameter in checkpoint form, whose memory
    is never touched, and its writes are carried out in the packed one.

    If a loader does anything else with that parameter than copy whole blocks into it, `leave` gives it what it would
    have found there, and from then on it is written to and packed as a whole.

    Attributes:
        blocks: how the packed weight lies.
        storage: of what the loader sees (see `storage_of`).
    """

    def __init__(self, blocks: PackedLayout, kernel: torch.Tensor, staged: torch.Tensor) -> None:
        """Begin.

        Args:
            blocks: how the packed weight lies.
            kernel: the packed weight, contiguous.
            staged: what the loader sees, of the same shape, contiguous, in a storage of its own.
        """
        self.blocks = blocks
        self._kernel = kernel
        self._integers = blocks.integers(kernel)
        self._staged = staged
        self.storage = storage_of(staged)
        self._shape = tuple(staged.shape)
        self._left = False

    def place(self, region: Region) -> torch.Tensor | None:
        """Return the region of the packed weight, shaped as by `PackedLayout.plain`; `None` if not of whole blocks."""
        if self._left or not self.blocks.fits(region, self._shape):
            return None
        return self.blocks.region(self._integers, region)

    def write(self, region: Region, source: torch.Tensor) -> bool:
        """Copy into a region; whether that was possible."""
        place = self.place(region)
        if place is None or tuple(source.shape) != region.size:
            return False
        copy_into_blocks([place], [self.blocks.plain(source.to(self._kernel.dtype))])
        return True

    def leave(self) -> None:
        """Unpack what there is.  A second call does nothing."""
        if not self._left:
            self._left = True
            self.blocks.plain(self._staged).copy_(self.blocks.packed(self._kernel))

    def finish(self) -> None:
        """Pack the weight as a whole, where that is left to do, and let go of what the loader saw."""
        if self._left:
            self.blocks.pack(self._staged, self._kernel)
            self._staged = self._staged.new_empty(0)


CANDIDATES = tuple(PackedLayout(rows, group) for rows in (8, 16, 32, 64) for group in (1, 2, 4))
"""What is looked for.  vLLM 0.28 has blocks of 16 rows, for AMX in pairs; others were not met."""


@dataclass(frozen=True)
class Sample:
    """The first and the last expert of a weight in checkpoint form: two tensors of shape (rows, columns)."""

    experts: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def of(cls, name: str, weight: torch.Tensor) -> Sample | None:
        """Return a sample of an expert weight on a CPU, of shape (experts, rows, columns); `None` of any other."""
        if name not in ("w13_weight", "w2_weight") or weight.dim() != 3 or weight.device.type != "cpu":
            return None
        return cls((weight.data[0].clone(), weight.data[-1].clone()))

    def blocks_in(self, after: torch.Tensor | None) -> PackedLayout | None:
        """Return how the sampled weight lies in a packed one.

        Args:
            after: the weight now.

        Returns:
            `None` if not in blocks, or if that cannot be told: a constant weight looks alike in all of them.
        """
        first, last = self.experts
        if after is None or tuple(after.shape[1:]) != tuple(first.shape) or not after.is_contiguous():
            return None
        if after.dtype != first.dtype:
            return None
        found = list(self._matching(first, after.data[0]))
        if len(found) != 1 or found != list(self._matching(last, after.data[-1])):
            return None
        return found[0]

    @staticmethod
    def _matching(expert: torch.Tensor, packed: torch.Tensor) -> Iterator[PackedLayout]:
        rows, columns = expert.shape
        for blocks in CANDIDATES:
            whole = rows % blocks.rows == 0 and columns % blocks.group == 0
            size = blocks.group * expert.element_size()
            if whole and size in _INTEGERS and torch.equal(blocks.packed(packed), blocks.plain(expert)):
                yield blocks
