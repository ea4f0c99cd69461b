"""Copies into blocks: the compiled ones do what torch's do, byte for byte, and touch nothing else."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_ascend_rollout.worker.weights.cpu import block_copy
from verl_ascend_rollout.worker.weights.cpu.block_copy import CACHE_LINE, SQUARE, blocks_differ, copy_into_blocks

DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64)


@pytest.fixture(autouse=True, scope="module")
def _few_threads() -> Iterator[None]:
    """On a machine with many cores torch would copy, and these tests would hold it against itself."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    block_copy._kernels.cache_clear()
    yield
    block_copy._kernels.cache_clear()


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max, shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def within(shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A contiguous tensor that begins `offset` bytes after a cache line, and all the memory that it lies in."""
    elements = torch.Size(shape).numel()
    room = numbers((elements + 4 * CACHE_LINE,), dtype, seed=7)
    first = (-room.data_ptr() % CACHE_LINE + offset) // dtype.itemsize
    return room[first : first + elements].view(shape), room


@settings(max_examples=60)
@given(
    dtype=st.sampled_from(DTYPES),
    experts=st.lists(st.integers(1, 3), max_size=1),
    blocks=st.integers(1, 4),
    squares=st.integers(1, 5),
    beside=st.integers(0, 3),
    offset=st.sampled_from((0, 0, 0, 8, 32)),
    ragged=st.sampled_from((0, 0, 0, 5)),
)
def test_as_torch_copies_and_nothing_beside_it(
    dtype: torch.dtype, experts: list[int], blocks: int, squares: int, beside: int, offset: int, ragged: int
) -> None:
    groups = squares * SQUARE + ragged
    rows = numbers((*experts, blocks, SQUARE, groups + beside), dtype)
    source = rows[..., beside:].transpose(-1, -2)
    destination, room = within((*experts, blocks, groups, SQUARE), dtype, offset)
    before = room.clone()
    assert blocks_differ(destination, source)

    copy_into_blocks([destination], [source])

    assert torch.equal(destination, source)
    assert not blocks_differ(destination, source)
    first = int(destination.storage_offset())
    last = first + destination.numel()
    assert torch.equal(room[:first], before[:first]) and torch.equal(room[last:], before[last:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_common_case_is_compiled(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*tensors: object) -> None:
        raise AssertionError("torch copied")

    monkeypatch.setattr(torch, "_foreach_copy_", forbidden)
    source = numbers((2, SQUARE, 3 * SQUARE), dtype).transpose(-1, -2)
    destination, _ = within((2, 3 * SQUARE, SQUARE), dtype, 0)
    copy_into_blocks([destination], [source])
    assert torch.equal(destination, source)


@pytest.mark.parametrize("shape", [(0, 2, SQUARE, SQUARE), (2, 0, SQUARE, SQUARE), (2, SQUARE, 0)])
def test_nothing_to_copy(shape: tuple[int, ...]) -> None:
    source = numbers(shape, torch.int32).transpose(-1, -2)
    destination, _ = within(tuple(source.shape), torch.int32, 0)
    copy_into_blocks([destination], [source])
    assert not blocks_differ(destination, source)
    copy_into_blocks([], [])


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_element_that_is_another_is_seen(dtype: torch.dtype) -> None:
    source = numbers((2, SQUARE, 2 * SQUARE), dtype).transpose(-1, -2)
    destination, _ = within((2, 2 * SQUARE, SQUARE), dtype, 0)
    copy_into_blocks([destination], [source])
    flat = destination.view(-1)
    for element in range(flat.numel()):
        flat[element] ^= 1 << (element % (8 * dtype.itemsize - 1))
        assert blocks_differ(destination, source), element
        flat[element] = source.reshape(-1)[element]
    assert not blocks_differ(destination, source)


def test_with_many_threads_torch_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(dtype: torch.dtype) -> None:
        raise AssertionError("compiled")

    source = numbers((2, SQUARE, SQUARE), torch.int32).transpose(-1, -2)
    destination, _ = within((2, SQUARE, SQUARE), torch.int32, 0)
    monkeypatch.setattr(block_copy, "_kernels", forbidden)
    monkeypatch.setattr(torch, "get_num_threads", lambda: block_copy.MOST_THREADS + 1)
    copy_into_blocks([destination], [source])
    assert torch.equal(destination, source)


@pytest.mark.usefixtures("nothing_compiled")
def test_without_numba_torch_copies_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    source = numbers((2, SQUARE, SQUARE), torch.int32).transpose(-1, -2)
    destination, _ = within((2, SQUARE, SQUARE), torch.int32, 0)
    with caplog.at_level(logging.INFO, logger="verl_ascend_rollout.worker"):
        copy_into_blocks([destination], [source])
        copy_into_blocks([destination], [source])
    assert torch.equal(destination, source)
    assert not blocks_differ(destination, source)
    (line,) = caplog.messages
    assert "copied into their blocks by torch" in line and "numba" in line


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("wrong", ["copies nothing", "sees no difference"])
def test_compiled_code_that_is_wrong_is_not_used(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = block_copy._compiled

    def compiled(size: int) -> block_copy._Kernels:
        kernels = original(size)
        if wrong == "copies nothing":
            return block_copy._Kernels(lambda jobs: None, kernels.differs)
        return block_copy._Kernels(kernels.copy, lambda jobs: False)

    monkeypatch.setattr(block_copy, "_compiled", compiled)
    assert block_copy._kernels(torch.int32) is None
    source = numbers((2, SQUARE, SQUARE), torch.int32).transpose(-1, -2)
    destination, _ = within((2, SQUARE, SQUARE), torch.int32, 0)
    copy_into_blocks([destination], [source])
    assert torch.equal(destination, source)
