"""The ways in which a checkpoint is sent: names, order, bucket, memory layout, dtype."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from checkpoint_pair import Checkpoint
from loaded_model import NamedTensor

Stream = list[NamedTensor]


def published(checkpoint: Checkpoint) -> Stream:
    return list(checkpoint.published.items())


def state_dict(checkpoint: Checkpoint) -> Stream:
    return list(checkpoint.state_dict.items())


def verl_fsdp(checkpoint: Checkpoint) -> Stream:
    """What verl's FSDP engine sends: the state_dict with merged experts taken apart, each into memory of its own."""
    from verl.workers.engine.fsdp.utils import unfuse_moe_params

    return list(unfuse_moe_params(checkpoint.state_dict.items()))


@dataclass(frozen=True)
class Way:
    """One way to send a checkpoint, sync after sync.

    Attributes:
        name: what the tests call it.
        names: makes the stream's names.
        tensor: what becomes of each tensor.
        shuffled: whether each sync has an order of its own.
        bucket: how many tensors come at once.
        syncs: which checkpoint each sync brings; the model holds A before the first.
    """

    name: str
    names: Callable[[Checkpoint], Stream] = published
    tensor: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    shuffled: bool = False
    bucket: int = 16
    syncs: str = "BA"

    def streams(self, checkpoints: Callable[[str], Checkpoint]) -> Iterator[tuple[str, Stream]]:
        """For each sync, which checkpoint it brings and the tensors in their order."""
        order = random.Random(self.name)
        for which in self.syncs:
            stream = [(name, self.tensor(tensor)) for name, tensor in self.names(checkpoints(which))]
            if self.shuffled:
                order.shuffle(stream)
            yield which, stream


def turned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, the last two dimensions the other way round in memory; a vector with gaps."""
    if tensor.dim() >= 2:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def wider(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in fp32, as a trainer's master weights are."""
    return tensor.float() if tensor.is_floating_point() else tensor


EVERYWHERE = (
    Way("in_order"),
    Way("A_B_A_B_shuffled", shuffled=True, syncs="BABA"),
    Way("one_tensor_at_a_time", bucket=1),
    Way("all_at_once", shuffled=True, bucket=10**9),
    Way("not_contiguous", tensor=turned),
    Way("fp32_values", tensor=wider, shuffled=True),
)
"""For every family."""

BY_OTHER_NAMES = (
    Way("state_dict", names=state_dict),
    Way("state_dict_shuffled_one_at_a_time", names=state_dict, shuffled=True, bucket=1),
    Way("verl_fsdp", names=verl_fsdp),
)
"""For families whose state_dict has other names than their files."""
