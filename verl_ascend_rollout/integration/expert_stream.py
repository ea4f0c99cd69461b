"""Experts on their way out of the trainer: merged, as transformers 5 keeps them, or one by one, as verl sends them.

A layer's experts are two tensors of a transformers 5 model, and two of vLLM's.  verl 0.9.1 takes them apart in between
(workers/engine/fsdp/utils.py:90): Qwen1.5-MoE's 24 layers of 60 experts become 4,320 tensors, each of them sent,
checked and copied by itself.  `patches.experts` makes verl's function return an `ExpertStream`.  Whoever iterates over
it gets what verl gives; our adapter asks it for `merged` where the rollout's workers take that.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

from verl_ascend_rollout.transport.stream import NamedTensor, slice_name

MERGED = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
"""How the names of merged experts end: of those that verl takes apart, and that our workers take merged."""


class ExpertStream(Generator[NamedTensor, None, None]):
    """verl's stream of experts one by one, with the merged ones within reach.  One of the two can be used, once."""

    def __init__(
        self, unfuse: Callable[[Iterable[NamedTensor]], Generator[NamedTensor, None, None]], weights: Iterable[Any]
    ) -> None:
        """Keep both; nothing is taken from the stream yet.

        Args:
            unfuse: verl's function, which takes the merged experts of a stream apart.
            weights: the stream.
        """
        self._unfuse = unfuse
        self._weights = weights
        self._apart = unfuse(weights)

    def send(self, value: None) -> NamedTensor:
        """Return the next of verl's weights; see `Generator.send`."""
        return self._apart.send(value)

    def throw(self, *error: Any) -> NamedTensor:
        """Raise within verl's generator; see `Generator.throw`."""
        return self._apart.throw(*error)

    def merged(self, largest: int, slices: bool) -> Iterator[NamedTensor]:
        """Yield the same weights, with merged experts as they are.

        Args:
            largest: bytes that a tensor of experts may have; merged experts that have more go in parts.
            slices: whether a part is as many experts as fit, under a name of `transport.stream`.  Without it, and where
                one expert does not fit, it is what verl makes of them.

        Yields:
            Names and tensors, some of them views.  While the next one is gathered the one before is held, no more.
        """
        for name, tensor in self._weights:
            if not name.endswith(MERGED) or tensor.dim() != 3 or tensor.nbytes <= largest:
                yield name, tensor
            elif slices and (count := largest // tensor[0].nbytes):
                for first in range(0, len(tensor), count):
                    part = tensor[first : first + count]
                    yield slice_name(name, first, first + len(part)), part
                del part
            else:
                yield from self._unfuse([(name, tensor)])
