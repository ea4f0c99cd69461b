"""Copies between rows and blocks at the speed of memory.

A block has 16 rows, turned so that what lay under each other lies side by side.  torch copies such a view element by
element.  Here a square of 16 x 16 is loaded row by row, turned in registers in four steps, and stored past the cache as
whole lines, which a plain copy reads before it writes them.

What it is worth: a later weight sync of two layers of Qwen1.5-MoE (2.2 GiB, a small vocabulary) in a real engine takes
1.88 s with torch's copies instead of 0.70 s, 2.7 times as long, and 3.0 with experts merged (medians of five pairs in
one run; one thread, AVX-512).  With all of the vocabulary beside one layer it is 1.3 times: the model has 24 layers to
one vocabulary.  With two threads 1.5 times; at toy widths nothing.

The code for it is LLVM's own language, compiled for the processor at hand by numba, which vLLM requires on all of them
but s390x (0.28; for drafting tokens), so no C compiler is asked for.  Where there is no numba, or a copy has another
form, torch copies: the same bytes, more slowly.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

logger = logging.getLogger("verl_ascend_rollout.worker")

SQUARE = 16
"""Rows of a block, and columns that are turned at once."""

CACHE_LINE = 64
"""Bytes.  Packed weights begin at one, or are left to torch: a store past the cache must not straddle two."""

MOST_THREADS = 3
"""What is compiled here runs in one thread and does 7 to 9 GB/s; torch does 2.5 with one and 4.6 with two (one cloud
machine), and so should do more with four.  Threads of our own would wait for torch's, which stay on their cores.
"""

_Job = tuple[int, int, int, int, int, int]
"""Addresses of destination and source, blocks, groups, and from block to block and row to row in the source: bytes."""


def copy_into_blocks(destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy each source into its destination, like `torch._foreach_copy_`.

    Args:
        destinations: integers on a CPU, shape (..., blocks, groups, rows of a block), as from `PackedLayout.packed`.
        sources: the same, as from `PackedLayout.plain`; none overlaps a destination.
    """
    turned: dict[_Kernels, list[_Job]] = {}
    others: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    few_threads = torch.get_num_threads() <= MOST_THREADS
    for destination, source in zip(destinations, sources, strict=True):
        kernels = _kernels_for(destination, source) if few_threads else None
        if kernels is not None:
            turned.setdefault(kernels, []).extend(_jobs(destination, source))
        else:
            others[0].append(destination)
            others[1].append(source)
    for kernels, jobs in turned.items():
        kernels.copy(numpy.array(jobs, dtype=numpy.int64))
    if others[0]:
        torch._foreach_copy_(*others)


def blocks_differ(written: torch.Tensor, sent: torch.Tensor) -> bool:
    """Return whether blocks are not what was copied into them; the arguments are as for `copy_into_blocks`."""
    kernels = _kernels_for(written, sent)
    if kernels is None:
        return not torch.equal(written, sent)
    return bool(kernels.differs(numpy.array(list(_jobs(written, sent)), dtype=numpy.int64)))


def compile_for(dtype: torch.dtype) -> None:
    """Compile what copies integers of a dtype, about a second, before it is in a hurry.  A second call does nothing."""
    _kernels(dtype)


# --------------------------------------------------------------------------------------------------------------------
# which copies


def _kernels_for(destination: torch.Tensor, source: torch.Tensor) -> _Kernels | None:
    """Return what copies the one into the other; `None` where that is torch's."""
    groups = source.shape[-2]
    suits = (
        source.shape[-1] == SQUARE
        and groups % SQUARE == 0
        and source.numel() > 0
        and source.stride(-2) == 1
        and destination.stride()[-3:] == (SQUARE * groups, SQUARE, 1)
        and destination.data_ptr() % CACHE_LINE == 0
        and destination.shape == source.shape
        and destination.dtype == source.dtype
        and destination.device.type == source.device.type == "cpu"
    )
    return _kernels(source.dtype) if suits else None


def _jobs(destination: torch.Tensor, source: torch.Tensor) -> Iterator[_Job]:
    if source.dim() > 3:
        for each_destination, each_source in zip(destination, source, strict=True):
            yield from _jobs(each_destination, each_source)
    else:
        size = source.element_size()
        blocks, groups, _ = source.shape
        block, _, row = source.stride()
        yield destination.data_ptr(), source.data_ptr(), blocks, groups, block * size, row * size


# --------------------------------------------------------------------------------------------------------------------
# the code that does it


@dataclass(frozen=True)
class _Kernels:
    """Compiled functions of an array of jobs."""

    copy: Callable[[Any], None]  # does them
    differs: Callable[[Any], bool]  # whether any of them has not been done


@functools.cache
def _kernels(dtype: torch.dtype) -> _Kernels | None:
    """Return the functions for integers of a dtype; `None`, and said once, where there are none."""
    try:
        kernels = _compiled(dtype.itemsize)
        if _right(kernels, dtype):
            return kernels
        # What is compiled writes and reads back: so it is held against torch before either is believed.
        reason = "what it compiled does not copy what torch does"
    except Exception as error:  # numba raises whatever LLVM, numpy and its own import may
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    logger.info("Experts are copied into their blocks by torch, at about a third of the speed: numba: %s", reason)
    return None


def _right(kernels: _Kernels, dtype: torch.dtype) -> bool:
    source = torch.arange(2 * SQUARE * 3 * SQUARE).mul_(2654435761).to(dtype).view(2, SQUARE, 3 * SQUARE)
    room = torch.zeros(source.numel() + CACHE_LINE, dtype=dtype)
    begin = -room.data_ptr() % CACHE_LINE // room.element_size()
    destination = room[begin : begin + source.numel()].view(2, 3 * SQUARE, SQUARE)
    jobs = numpy.array(list(_jobs(destination, source.transpose(-1, -2))), dtype=numpy.int64)
    before = kernels.differs(jobs)
    kernels.copy(jobs)
    return before and not kernels.differs(jobs) and torch.equal(destination, source.transpose(-1, -2))


def _compiled(size: int) -> _Kernels:
    """Compile for elements of a size in bytes."""
    import numba

    turn, is_turned, written = _squares(size)
    step = SQUARE * size

    def copy(jobs):  # type: ignore[no-untyped-def]
        for job in range(jobs.shape[0]):
            destination, source, blocks, groups, block, row = jobs[job]
            for each in range(blocks):
                for first in range(0, groups, SQUARE):
                    turn(destination + (each * groups + first) * step, source + each * block + first * size, row)
        written()

    def differs(jobs):  # type: ignore[no-untyped-def]
        for job in range(jobs.shape[0]):
            destination, source, blocks, groups, block, row = jobs[job]
            for each in range(blocks):
                for first in range(0, groups, SQUARE):
                    place = destination + (each * groups + first) * step
                    if not is_turned(place, source + each * block + first * size, row):
                        return True
        return False

    # Compiled here and now, for this type of argument.
    jobs = numba.types.Array(numba.int64, 2, "C")
    return _Kernels(
        copy=numba.njit(numba.void(jobs), nogil=True)(copy),
        differs=numba.njit(numba.boolean(jobs), nogil=True)(differs),
    )


def _squares(size: int) -> tuple[Any, Any, Any]:
    """Return for elements of a size in bytes what turns one square and what says whether it has been turned, both of
    (destination, source, bytes from row to row); and what must follow before another thread reads."""
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    element, lane, address = ir.IntType(size * 8), ir.IntType(32), ir.IntType(64)
    vector = ir.VectorType(element, SQUARE)

    def at(builder: Any, begin: Any, offset: Any) -> Any:
        return builder.inttoptr(builder.add(begin, offset), vector.as_pointer())

    def turned(builder: Any, source: Any, row: Any) -> list[Any]:
        rows = [
            builder.load(at(builder, source, builder.mul(row, ir.Constant(address, each))), align=size)
            for each in range(SQUARE)
        ]
        distance = 1
        while distance < SQUARE:
            # Of two rows that are `distance` apart, swap the parts off the diagonal.
            lanes = ir.VectorType(lane, SQUARE)
            near = ir.Constant(lanes, [c if not c & distance else SQUARE + c - distance for c in range(SQUARE)])
            far = ir.Constant(lanes, [c + distance if not c & distance else SQUARE + c for c in range(SQUARE)])
            for first in range(SQUARE):
                if not first & distance:
                    second = first + distance
                    one, other = rows[first], rows[second]
                    rows[first] = builder.shuffle_vector(one, other, near)
                    rows[second] = builder.shuffle_vector(one, other, far)
            distance *= 2
        return rows

    def turn(typing: Any, destination: Any, source: Any, row: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            place, source, row = arguments
            past_the_cache = builder.module.add_metadata([ir.Constant(lane, 1)])
            for number, column in enumerate(turned(builder, source, row)):
                offset = ir.Constant(address, number * SQUARE * size)
                # Whole lines, or a part of one that does not straddle two.
                store = builder.store(column, at(builder, place, offset), align=min(SQUARE * size, CACHE_LINE))
                store.set_metadata("nontemporal", past_the_cache)
            return context.get_dummy_value()

        return types.void(destination, source, row), code

    def is_turned(typing: Any, destination: Any, source: Any, row: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            place, source, row = arguments
            difference = ir.Constant(vector, [0] * SQUARE)
            for number, column in enumerate(turned(builder, source, row)):
                offset = ir.Constant(address, number * SQUARE * size)
                there = builder.load(at(builder, place, offset), align=min(SQUARE * size, CACHE_LINE))
                difference = builder.or_(difference, builder.xor(there, column))
            unlike = builder.icmp_unsigned("!=", difference, ir.Constant(vector, [0] * SQUARE))
            return builder.icmp_unsigned("==", builder.bitcast(unlike, ir.IntType(SQUARE)), ir.IntType(SQUARE)(0))

        return types.boolean(destination, source, row), code

    def written(typing: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            builder.fence("seq_cst")  # stores past the cache are in no order otherwise
            return context.get_dummy_value()

        return types.void(), code

    return intrinsic(turn), intrinsic(is_turned), intrinsic(written)
