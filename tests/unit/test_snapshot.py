"""The copy of the last weights in host memory: what is read is what was written, or it is refused."""

from __future__ import annotations

import os

import pytest
import torch

from verl_ascend_rollout.transport import snapshot
from verl_ascend_rollout.transport.messages import ProtocolError, TransportError
from verl_ascend_rollout.transport.snapshot import Snapshot, SnapshotWriter
from verl_ascend_rollout.transport.tensors import DTYPES

CPU = torch.device("cpu")


def weights(seed: int) -> list[tuple[str, torch.Tensor]]:
    """Every dtype, an empty tensor, a scalar, and one whose memory is not in its order."""
    generator = torch.Generator().manual_seed(seed)
    found = [
        (f"of.{name}", torch.randint(0, 2 if name == "bool" else 250, (3 * dtype.itemsize,), generator=generator))
        for name, dtype in DTYPES.items()
    ]
    tensors = [(name, tensor.to(torch.uint8).view(DTYPES[name[3:]])) for name, tensor in found]
    return [
        *tensors,
        ("empty", torch.empty(0, 4)),
        ("scalar", torch.tensor(1.5)),
        ("turned", torch.randn(40, 30, generator=generator).to(torch.bfloat16).T),
    ]


def written(writer: SnapshotWriter, sync: int) -> Snapshot:
    writer.begin(sync)
    for name, tensor in weights(sync):
        writer.add(name, tensor)
    return writer.finish()


@pytest.mark.parametrize("bucket", [1, 1000, 2**24])
def test_each_sync_is_read_as_it_was_written(bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "BUCKET_BYTES", bucket)
    writer = SnapshotWriter()
    for sync in (1, 2):
        kept = written(writer, sync)
        # As it comes by message.
        found = [pair for part in Snapshot(**kept.as_dict()).read(CPU) for pair in part]
        for (name, tensor), (read_name, read) in zip(weights(sync), found, strict=True):
            assert (read_name, read.dtype, read.shape) == (name, tensor.dtype, tensor.shape)
            assert bytes(read.contiguous().view(-1).view(torch.uint8)) == bytes(
                tensor.contiguous().view(-1).view(torch.uint8)
            )
        assert kept.sync == sync and kept.bytes == sum(tensor.nbytes for _, tensor in weights(sync))


def test_a_byte_that_changed_is_found() -> None:
    kept = written(SnapshotWriter(), 1)
    name, _, _, offset, _ = kept.tensors[-1]
    descriptor = os.open(kept.path, os.O_RDWR)
    byte = os.pread(descriptor, 1, offset)
    os.pwrite(descriptor, bytes([byte[0] ^ 1]), offset)
    os.close(descriptor)
    with pytest.raises(ProtocolError, match=f"{name} in the snapshot of weight sync 1 is not what was written"):
        list(kept.read(CPU))


def test_one_that_is_being_written_over_is_not_taken() -> None:
    writer = SnapshotWriter()
    kept = written(writer, 1)
    writer.begin(2)
    writer.add(*weights(2)[0])
    with pytest.raises(ProtocolError, match="not what was written"):
        list(kept.read(CPU))


def test_one_whose_process_is_gone_is_said() -> None:
    gone = Snapshot("/proc/self/fd/999999", 4, 0, 0.0, [])
    with pytest.raises(TransportError, match="snapshot of weight sync 4 cannot be read"):
        list(gone.read(CPU))
