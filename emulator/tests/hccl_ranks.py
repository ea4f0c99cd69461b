"""One rank of a torch.distributed job over the stand-in HCCL: hccl_ranks.py CASES SEED, with torchrun's variables set.

Stands in for a user's training script.  Each case is a function of the seed and of nothing else, so that every rank
knows all ranks' inputs and computes the expected result by itself, with plain torch on the CPU.  Prints one JSON line
{case: "ok" or the error} and exits with 0 when all are "ok".
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401

STAGING_BYTES = 1 << 20  # hccl_channel.h: FAKE_HCCL_STAGING_BYTES
REDUCIBLE = [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.int8]
MOVABLE = [*REDUCIBLE, torch.uint8, torch.bool, torch.float64]
OPERATIONS = {
    "sum": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "product": dist.ReduceOp.PRODUCT,
}


def rank() -> int:
    return dist.get_rank()


def world() -> int:
    return dist.get_world_size()


def values(seed: int, source: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Rank `source`'s input: small integers, so that sums and products of 8 of them are exact in every dtype."""
    generator = torch.Generator().manual_seed(seed * 1009 + source)
    low = -1 if dtype.is_signed else 0
    return torch.randint(low, 3, shape, generator=generator).to(dtype)


def folded(parts: list[torch.Tensor], operation: str) -> torch.Tensor:
    """The reduction over ranks, in the widest type of the kind, cast back once."""
    dtype = parts[0].dtype
    wide = torch.stack([part.double() if dtype.is_floating_point else part.long() for part in parts])
    result = {"sum": wide.sum(0), "product": wide.prod(0), "max": wide.amax(0), "min": wide.amin(0)}[operation]
    return result.to(dtype)


def shapes(seed: int) -> list[tuple[int, ...]]:
    chance = random.Random(seed)
    return [(1,), (chance.randint(2, 40), chance.randint(1, 40)), (chance.randint(1, 9), chance.randint(1, 9), 7)]


def expect(got: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    assert got.device.type == "npu", f"{what}: on {got.device}"
    torch.testing.assert_close(got.cpu(), wanted, rtol=0, atol=0, msg=lambda text: f"{what}: {text}")


def all_reduce(seed: int) -> None:
    for dtype in REDUCIBLE:
        for shape in shapes(seed):
            for name, operation in OPERATIONS.items():
                parts = [values(seed, source, shape, dtype) for source in range(world())]
                tensor = parts[rank()].npu()
                dist.all_reduce(tensor, operation)
                expect(tensor, folded(parts, name), f"all_reduce {name} {dtype} {shape}")


def all_reduce_rounds_16_bit_floats_once(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for dtype in (torch.bfloat16, torch.float16):
        parts = [torch.randn(999, generator=generator).mul(3).to(dtype) for _ in range(world())]
        tensor = parts[rank()].npu()
        dist.all_reduce(tensor)
        total = torch.zeros(999)
        for part in parts:
            total += part.float()
        expect(tensor, total.to(dtype), f"all_reduce {dtype}")


def larger_than_the_staging_area(seed: int) -> None:
    length = STAGING_BYTES // 4 * 3 + 17
    parts = [values(seed, source, (length,), torch.float32) for source in range(world())]
    tensor = parts[rank()].npu()
    dist.all_reduce(tensor)
    expect(tensor, folded(parts, "sum"), "all_reduce")
    gathered = torch.empty(world() * length, device="npu")
    dist.all_gather_into_tensor(gathered, parts[rank()].npu())
    expect(gathered, torch.cat(parts), "all_gather_into_tensor")
    received = torch.empty(length // world() * world(), device="npu")
    dist.all_to_all_single(received, parts[rank()][: received.numel()].npu())
    step = length // world()
    expect(received, torch.cat([part[rank() * step : (rank() + 1) * step] for part in parts]), "all_to_all_single")


def broadcast(seed: int) -> None:
    for dtype in MOVABLE:
        for source in range(world()):
            tensor = values(seed, rank(), (13, 5), dtype).npu()
            dist.broadcast(tensor, source)
            expect(tensor, values(seed, source, (13, 5), dtype), f"broadcast {dtype} from {source}")


def reduce(seed: int) -> None:
    for name, operation in OPERATIONS.items():
        for root in range(world()):
            parts = [values(seed, source, (11, 3), torch.float32) for source in range(world())]
            tensor = parts[rank()].npu()
            dist.reduce(tensor, root, operation)
            if rank() == root:
                expect(tensor, folded(parts, name), f"reduce {name} to {root}")


def all_gather(seed: int) -> None:
    for dtype in MOVABLE:
        for shape in shapes(seed):
            parts = [values(seed, source, shape, dtype) for source in range(world())]
            into = torch.zeros((world() * shape[0], *shape[1:]), dtype=dtype, device="npu")
            dist.all_gather_into_tensor(into, parts[rank()].npu())
            expect(into, torch.cat(parts), f"all_gather_into_tensor {dtype} {shape}")
            pieces = [torch.zeros(shape, dtype=dtype, device="npu") for _ in range(world())]
            dist.all_gather(pieces, parts[rank()].npu())
            for source, piece in enumerate(pieces):
                expect(piece, parts[source], f"all_gather {dtype} {shape} from {source}")


def all_gather_of_different_lengths(seed: int) -> None:
    lengths = [3 * source + 1 for source in range(world())]
    parts = [values(seed, source, (lengths[source], 4), torch.float32) for source in range(world())]
    pieces = [torch.zeros((length, 4), device="npu") for length in lengths]
    dist.all_gather(pieces, parts[rank()].npu())
    for source, piece in enumerate(pieces):
        expect(piece, parts[source], f"all_gather from {source}")


def reduce_scatter(seed: int) -> None:
    for dtype in REDUCIBLE:
        for shape in shapes(seed):
            whole = (world() * shape[0], *shape[1:])
            parts = [values(seed, source, whole, dtype) for source in range(world())]
            into = torch.zeros(shape, dtype=dtype, device="npu")
            dist.reduce_scatter_tensor(into, parts[rank()].npu())
            wanted = folded(parts, "sum").chunk(world())[rank()]
            expect(into, wanted, f"reduce_scatter_tensor {dtype} {shape}")
            into.zero_()
            dist.reduce_scatter(into, [piece.contiguous() for piece in parts[rank()].npu().chunk(world())])
            expect(into, wanted, f"reduce_scatter {dtype} {shape}")


def scatter(seed: int) -> None:
    for root in range(world()):
        parts = [values(seed, target, (7, 2), torch.bfloat16) for target in range(world())]
        into = torch.zeros((7, 2), dtype=torch.bfloat16, device="npu")
        dist.scatter(into, [part.npu() for part in parts] if rank() == root else None, src=root)
        expect(into, parts[rank()], f"scatter from {root}")


def all_to_all(seed: int) -> None:
    for dtype in MOVABLE:
        parts = [values(seed, source, (world() * 5, 3), dtype) for source in range(world())]
        into = torch.zeros((world() * 5, 3), dtype=dtype, device="npu")
        dist.all_to_all_single(into, parts[rank()].npu())
        expect(into, torch.cat([part.chunk(world())[rank()] for part in parts]), f"all_to_all_single {dtype}")


def all_to_all_uneven(seed: int) -> None:
    chance = random.Random(seed)
    counts = [[chance.randint(0, 6) for _ in range(world())] for _ in range(world())]  # [source][target]
    parts = [values(seed, source, (sum(counts[source]), 2), torch.float32) for source in range(world())]
    sent, received = counts[rank()], [row[rank()] for row in counts]
    wanted = [parts[source].split(counts[source])[rank()] for source in range(world())]
    into = torch.zeros((sum(received), 2), device="npu")
    dist.all_to_all_single(into, parts[rank()].npu(), received, sent)
    expect(into, torch.cat(wanted), f"all_to_all_single {counts}")
    pieces = [torch.zeros((length, 2), device="npu") for length in received]
    dist.all_to_all(pieces, [piece.contiguous() for piece in parts[rank()].npu().split(sent)])
    for source, piece in enumerate(pieces):
        expect(piece, wanted[source], f"all_to_all {counts} from {source}")


def meet_neighbours() -> None:
    """Makes the communicators of all neighbours, in the order of ranks.

    torch-npu makes one for each pair at its first message, and waits for the other side there: a ring of ranks that all
    send first would wait for ever, on hardware too.
    """
    token = torch.zeros(1, device="npu")
    if rank() > 0:
        dist.recv(token, rank() - 1)
    dist.send(token, (rank() + 1) % world())
    if rank() == 0:
        dist.recv(token, world() - 1)


def send_before_receive(seed: int) -> None:
    """Every rank sends to the next one before anybody receives, several messages, one larger than the staging area."""
    following, previous = (rank() + 1) % world(), (rank() - 1) % world()
    lengths = [5, STAGING_BYTES // 4 + 3, 1, 700]
    if world() == 1:
        return
    meet_neighbours()
    for i, length in enumerate(lengths):
        dist.send(values(seed + i, rank(), (length,), torch.float32).npu(), following)
    for i, length in enumerate(lengths):
        into = torch.zeros(length, device="npu")
        dist.recv(into, previous)
        expect(into, values(seed + i, previous, (length,), torch.float32), f"message {i}")


def batch_isend_irecv(seed: int) -> None:
    following, previous = (rank() + 1) % world(), (rank() - 1) % world()
    if world() == 1:
        return
    into = torch.zeros(40, device="npu")
    outgoing = values(seed, rank(), (40,), torch.float32).npu()
    operations = [dist.P2POp(dist.irecv, into, previous), dist.P2POp(dist.isend, outgoing, following)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    expect(into, values(seed, previous, (40,), torch.float32), "batch_isend_irecv")


def barrier_and_objects(seed: int) -> None:
    dist.barrier()
    everybody: list[object] = [None] * world()
    dist.all_gather_object(everybody, {"rank": rank(), "seed": seed})
    assert everybody == [{"rank": source, "seed": seed} for source in range(world())], everybody


def sub_groups(seed: int) -> None:
    """All groups of equal parity, and one that is ordered differently; every rank takes part in the making of each."""
    members = [list(range(start, world(), 2)) for start in range(min(2, world()))]
    for group_members in [*members, list(reversed(range(world())))]:
        group = dist.new_group(group_members)
        if rank() not in group_members:
            continue
        parts = [values(seed, source, (9,), torch.float32) for source in group_members]
        tensor = values(seed, rank(), (9,), torch.float32).npu()
        dist.all_reduce(tensor, group=group)
        expect(tensor, folded(parts, "sum"), f"all_reduce in {group_members}")


def pyhccl(seed: int) -> None:
    """vllm-ascend's own ctypes binding of libhccl.so, over a gloo group."""
    from vllm.distributed.utils import StatelessProcessGroup
    from vllm_ascend.distributed.device_communicators.pyhccl import PyHcclCommunicator

    port = int(os.environ["MASTER_PORT"]) + 1
    group = StatelessProcessGroup.create("127.0.0.1", port, rank(), world())
    communicator = PyHcclCommunicator(group, device=torch.device("npu", rank()))
    if world() == 1:
        assert communicator.disabled  # vllm-ascend: "For world_size == 1, do nothing"
        return
    parts = [values(seed, source, (33,), torch.float32) for source in range(world())]
    expect(communicator.all_reduce(parts[rank()].npu()), folded(parts, "sum"), "pyhccl all_reduce")
    tensor = parts[rank()].npu()
    communicator.broadcast(tensor, 0)
    torch.npu.synchronize()
    expect(tensor, parts[0], "pyhccl broadcast")


def fsdp2(seed: int) -> None:
    """Two steps of a small MLP under fully_shard, against the same steps of the whole batch on the CPU."""
    from torch.distributed.fsdp import fully_shard

    def model() -> torch.nn.Module:
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(12, 33), torch.nn.GELU(), torch.nn.Linear(33, 5))

    batch = torch.randn(4 * world(), 12, generator=torch.Generator().manual_seed(seed + 1))
    plain, sharded = model(), model().npu()
    for layer in sharded:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer)
    fully_shard(sharded)
    mine = batch.chunk(world())[rank()].npu()
    optimizers = [torch.optim.SGD(plain.parameters(), lr=0.1), torch.optim.SGD(sharded.parameters(), lr=0.1)]
    for _ in range(2):
        for network, inputs, optimizer in zip((plain, sharded), (batch, mine), optimizers, strict=True):
            optimizer.zero_grad()
            network(inputs).square().mean().backward()
            optimizer.step()
    for wanted, got in zip(plain.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(got.full_tensor().cpu(), wanted.detach(), rtol=1e-5, atol=1e-6)


def killed_rank(seed: int) -> None:
    """The last rank dies in the middle of things; the others must get an error, and soon."""
    tensor = torch.ones(10, device="npu")
    dist.all_reduce(tensor)
    if rank() == world() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        for _ in range(3):
            dist.all_reduce(tensor)
            torch.npu.synchronize()
    except RuntimeError as error:
        seconds = time.monotonic() - began
        assert seconds < 20, f"the error came after {seconds:.0f} s"
        assert "HCCL" in str(error), str(error)
        return
    raise AssertionError("all_reduce went on without the killed rank")


def late_rank(seed: int) -> None:
    """The last rank never comes, though its process lives: FAKE_CANN_TIMEOUT_S ends the wait."""
    tensor = torch.ones(10, device="npu")
    dist.all_reduce(tensor)
    store = dist.distributed_c10d._get_default_store()
    if rank() == world() - 1:
        store.wait(["waited"])
        store.set("seen", "yes")
        return
    try:
        dist.all_reduce(tensor)
        torch.npu.synchronize()
    except RuntimeError as error:
        store.set("waited", "yes")
        # The store is this process's, and the other rank still reads it.
        store.wait(["seen"])
        assert "HCCL" in str(error), str(error)
        return
    raise AssertionError("all_reduce ended without the rank that never called it")


def different_calls(seed: int) -> None:
    """Ranks that disagree about the collective are told so, instead of hanging or adding up nonsense."""
    tensor = torch.ones(10 + rank(), device="npu")
    try:
        dist.all_reduce(tensor)
        torch.npu.synchronize()
    except RuntimeError:
        return
    raise AssertionError("all_reduce of different lengths went through")


CASES: dict[str, Callable[[int], None]] = {
    function.__name__: function
    for function in (
        all_reduce,
        all_reduce_rounds_16_bit_floats_once,
        larger_than_the_staging_area,
        broadcast,
        reduce,
        all_gather,
        all_gather_of_different_lengths,
        reduce_scatter,
        scatter,
        all_to_all,
        all_to_all_uneven,
        send_before_receive,
        batch_isend_irecv,
        barrier_and_objects,
        sub_groups,
        pyhccl,
        fsdp2,
        killed_rank,
        late_rank,
        different_calls,
    )
}


def main() -> int:
    names, seed = sys.argv[1].split(","), int(sys.argv[2])
    torch.npu.set_device(int(os.environ["RANK"]))
    dist.init_process_group("hccl")
    results: dict[str, str] = {}
    for name in names:
        try:
            CASES[name](seed)
            results[name] = "ok"
        except Exception:
            results[name] = traceback.format_exc()
    print("RESULTS " + json.dumps(results), flush=True)
    if all(result == "ok" for result in results.values()) and names[0] not in (
        "killed_rank",
        "late_rank",
        "different_calls",
    ):
        dist.destroy_process_group()
        return 0
    sys.stdout.flush()
    os._exit(0 if all(result == "ok" for result in results.values()) else 1)  # a broken group is not worth waiting for


if __name__ == "__main__":
    sys.exit(main())
