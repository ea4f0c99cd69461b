"""Weights through shared memory, to real processes: every byte, every shape, in order, in bounded memory."""

from __future__ import annotations

import os
import tempfile
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transport_processes import Peer

from verl_ascend_rollout.transport import rendezvous
from verl_ascend_rollout.transport.receiver import receive_weights
from verl_ascend_rollout.transport.sender import WeightSender
from verl_ascend_rollout.transport.tensors import DTYPES

MIB = 2**20


@pytest.fixture(scope="module")
def receivers() -> Iterator[list[Peer]]:
    peers = [Peer("receive"), Peer("receive")]
    yield peers
    for peer in peers:
        peer.close()


def sync(peers: list[Peer], tensors: list[tuple[str, torch.Tensor]], bucket_bytes: int, **how: Any) -> list[Any]:
    """Send the tensors; what each receiver says."""
    checksums = how.pop("checksums", False)
    with WeightSender(receivers=len(peers), bucket_bytes=bucket_bytes, checksums=checksums, timeout=60) as sender:
        for rank, peer in enumerate(peers):
            peer.ask(name=sender.name, rank=rank, **how)
        sender.connect()
        for name, tensor in tensors:
            sender.send(name, tensor)
        summary = sender.finish()
    answers = [peer.line() for peer in peers]
    for answer in answers:
        assert "error" not in answer, answer
        assert (answer["bytes"], answer["checksum"]) == (summary.bytes, summary.checksum)
    return answers


def contents(tensor: torch.Tensor) -> str:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes().hex()


def described(tensors: list[tuple[str, torch.Tensor]]) -> list[Any]:
    return [[name, str(tensor.dtype), list(tensor.shape), contents(tensor)] for name, tensor in tensors]


@st.composite
def named_tensors(draw: st.DrawFn) -> list[tuple[str, torch.Tensor]]:
    found = []
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    for number in range(draw(st.integers(0, 12))):
        dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
        shape = draw(st.lists(st.integers(0, 17), max_size=4))
        count = int(torch.Size(shape).numel())
        # Random bytes: NaNs and denormals among them.  A bool has two values only.
        raw = torch.randint(0, 2 if dtype is torch.bool else 256, (count * dtype.itemsize,), generator=generator)
        tensor = raw.to(torch.uint8).view(dtype).view(shape)
        if len(shape) >= 2 and draw(st.booleans()):
            tensor = tensor.transpose(0, -1)
        found.append((f"layers.{number}.größe", tensor))
    return found


@settings(max_examples=60, deadline=None)
@given(
    tensors=named_tensors(),
    bucket_bytes=st.sampled_from([64, 192, 1000, 4096, 10**6]),
    checksums=st.booleans(),
    copy=st.booleans(),
)
def test_every_byte_arrives_in_order_whatever_the_shape_and_dtype(
    receivers: list[Peer],
    tensors: list[tuple[str, torch.Tensor]],
    bucket_bytes: int,
    checksums: bool,
    copy: bool,
) -> None:
    for answer in sync(receivers, tensors, bucket_bytes, contents=True, checksums=checksums, copy=copy):
        assert answer["tensors"] == described(tensors)
        assert (answer["checksum"] is not None) == checksums


def test_special_tensors(receivers: list[Peer]) -> None:
    base = torch.arange(24, dtype=torch.float32)
    tensors = [
        ("scalar", torch.tensor(1.5, dtype=torch.bfloat16)),
        ("nothing", torch.empty(0, 7)),
        ("expanded", torch.tensor([[1.0], [2.0]]).expand(2, 5)),
        ("every_other", base[::2]),
        ("a_parameter", torch.nn.Parameter(base.view(4, 6))),
        ("a_view_of_it", base.view(4, 6).t()),
        ("nan", torch.tensor([float("nan"), float("inf"), -0.0])),
    ]
    expected = described([(name, tensor.detach()) for name, tensor in tensors])
    assert sync(receivers[:1], tensors, 64, contents=True)[0]["tensors"] == expected


def test_a_tensor_of_64_mib_goes_through_buckets_of_1_mib_in_bounded_memory(receivers: list[Peer]) -> None:
    torch.manual_seed(0)
    big = torch.randint(-(2**15), 2**15, (4, 8 * MIB), dtype=torch.int16)
    small = ("small", torch.ones(3))
    peak = sync(receivers[:1], [small], MIB)[0]["peak"]
    answer = sync(receivers[:1], [small, ("big", big), ("after", torch.zeros(5))], MIB, copy=False, checksums=True)[0]
    assert [found[:3] for found in answer["tensors"]] == [
        ["small", "torch.float32", [3]],
        ["big", "torch.int16", [4, 8 * MIB]],
        ["after", "torch.float32", [5]],
    ]
    assert answer["tensors"][1][3] == zlib.crc32(big.view(-1).view(torch.uint8).numpy().data)
    # The tensor itself and both buckets; the rest is what Python and torch take for themselves.
    assert answer["peak"] - peak < (64 + 2 + 24) * MIB


def test_many_tensors_of_no_elements_do_not_make_one_endless_message(receivers: list[Peer]) -> None:
    tensors = [(f"empty.{number}", torch.empty(0)) for number in range(25_000)]
    answer = sync(receivers[:1], tensors, 1000)[0]
    assert len(answer["tensors"]) == 25_000
    assert answer["buckets"] == 3


def test_the_next_bucket_is_filled_while_one_is_loaded() -> None:
    """The sender is one bucket ahead, and not two."""
    may_load = threading.Semaphore(0)
    loading = threading.Event()
    loaded: list[str] = []

    def load(tensors: list[tuple[str, torch.Tensor]]) -> None:
        loading.set()
        assert may_load.acquire(timeout=30)
        loaded.extend(name for name, _ in tensors)

    with WeightSender(receivers=1, bucket_bytes=1024, timeout=30) as sender:
        receiver = threading.Thread(target=receive_weights, args=(sender.name, load))
        receiver.start()
        sender.connect()
        for number in range(2):
            sender.send(f"weight.{number}", torch.full((1024,), number, dtype=torch.uint8))
        assert loading.wait(30)
        assert loaded == [], "buckets 0 and 1 are full, and none has been loaded"
        sent = threading.Event()

        def send_one_more() -> None:
            sender.send("weight.2", torch.zeros(1024, dtype=torch.uint8))
            sent.set()

        one_more = threading.Thread(target=send_one_more)
        one_more.start()
        assert not sent.wait(0.3)
        may_load.release(10)
        assert sent.wait(30)
        one_more.join()
        assert sender.finish().tensors == 3
        receiver.join()
    assert loaded == [f"weight.{number}" for number in range(3)]


def test_what_is_handed_over_is_not_changed_by_what_comes_later() -> None:
    kept: dict[str, torch.Tensor] = {}
    with WeightSender(receivers=1, bucket_bytes=256, timeout=30) as sender:
        receiver = threading.Thread(target=receive_weights, args=(sender.name, kept.update))
        receiver.start()
        sender.connect()
        for number in range(9):
            sender.send(f"weight.{number}", torch.full((200,), number, dtype=torch.uint8))
        sender.finish()
        receiver.join()
    assert [int(tensor.max()) for tensor in kept.values()] == [int(tensor.min()) for tensor in kept.values()]
    assert [int(tensor[0]) for tensor in kept.values()] == list(range(9))
    kept["weight.0"].add_(1)


def test_no_file_system_has_anything_of_a_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(tensors: list[tuple[str, torch.Tensor]]) -> None:
        named.append(sorted(os.listdir("/dev/shm")))
        named.append(os.listdir(tmp_path))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    named: list[list[str]] = []
    before = sorted(os.listdir("/dev/shm"))
    with WeightSender(receivers=1, bucket_bytes=MIB, timeout=30) as sender:
        assert list(tmp_path.iterdir()) == []
        assert f"@{rendezvous.PREFIX}{sender.name}\n" in Path("/proc/net/unix").read_text()
        receiver = threading.Thread(target=receive_weights, args=(sender.name, load))
        receiver.start()
        sender.connect()
        sender.send("weight", torch.ones(5))
        sender.finish()
        receiver.join()
    ours = [name for name in set(named[0]) - set(before) if "ascend_safe_weights" in name]
    assert (ours, named[1]) == ([], [])


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.zeros(3, dtype=torch.complex64), "odd has the dtype torch.complex64, which weights cannot have"),
        (None, "hold weight more than once: nothing says which one is right"),
    ],
)
def test_what_cannot_be_sent_is_one_sentence_on_both_sides(
    receivers: list[Peer], tensor: torch.Tensor | None, says: str
) -> None:
    def send() -> None:
        with WeightSender(receivers=1, bucket_bytes=1024, timeout=30) as sender:
            receivers[0].ask(name=sender.name)
            sender.connect()
            sender.send("weight", torch.ones(2))
            sender.send("weight" if tensor is None else "odd", torch.ones(2) if tensor is None else tensor)

    with pytest.raises(ValueError, match=says):
        send()
    answer = receivers[0].line()
    assert answer["kind"] == "PeerFailedError"
    assert f"broken off by the trainer (process {os.getpid()}): " in answer["error"]
    assert says in answer["error"]
