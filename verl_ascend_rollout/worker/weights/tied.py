"""Parameters that a model has under two names: a head that is tied to the embedding.

A trainer may send both, since its state_dict has both.  vLLM up to 0.28 then loads the parameter twice; 0.30 drops the
head, and raises where the embedding is not in the same call of `load_weights` (models/utils.py,
`_check_skipped_aliases`), that is, where it is not in the same bucket; models that have no head of their own (Gemma)
pass over it.  Here whichever comes first is loaded, under the embedding's name, and the other has to be the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from verl_ascend_rollout.transport.stream import NamedTensor

Refuse = Callable[[str, str], None]


HEAD = "lm_head.weight"
"""How the name of a head ends.  Other parameters with two names, such as those of shared experts that two modules hold,
have one in a checkpoint."""


def aliases(model: torch.nn.Module) -> dict[str, str]:
    """Return the names of heads that are tied, each with the first name of its parameter."""
    first: dict[int, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name and name.endswith(HEAD):
            found[name] = known
    return found


class Heads:
    """The tied heads of a model in one sync."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Look which heads are tied."""
        self._model = model
        self._aliases = aliases(model)
        self._arrived: dict[str, str] = {}
        self._own = {name for name, _ in model.named_parameters() if name.endswith(HEAD)}
        self._left_out: dict[str, str] = {}

    def once(self, weights: Iterable[NamedTensor], refuse: Refuse) -> Iterator[NamedTensor]:
        """Yield the same tensors, a tied one under the first name of its parameter, and only the first that comes.

        Args:
            weights: names and tensors.
            refuse: called with name and reason where head and embedding came and are not the same.
        """
        tied = set(self._aliases.values())
        for name, tensor in weights:
            first = self._aliases.get(name, name)
            if first not in tied:
                if self._has_no_place(name):
                    # Its memory may be used again before the embedding comes.
                    self._left_out[name] = _checksum(_share_of(tensor, _embedding(self._model)))
                else:
                    yield name, tensor
                continue
            checksum = _checksum(tensor)
            if first not in self._arrived:
                self._arrived[first] = checksum
                yield first, tensor
            elif self._arrived[first] != checksum:
                also = " and ".join(alias for alias, of in self._aliases.items() if of == first)
                refuse(name, f"is not the same as the other of {first} and {also}, {UNTIED}")

    def check(self, refuse: Refuse) -> None:
        """Compare heads that were left out with the embedding that the model has now.

        Args:
            refuse: called with name and reason where they are not the same.
        """
        if not self._left_out:
            return
        embedding = _embedding(self._model)
        rows = _rows(embedding)
        checksum = _checksum(embedding.weight.data[: rows.stop - rows.start])
        for name, came in self._left_out.items():
            if came != checksum:
                refuse(name, f"is not the same as the embedding, {UNTIED}")

    def _has_no_place(self, name: str) -> bool:
        """Return whether it is a head that the model takes from its embedding, under whatever name."""
        if not name.endswith(HEAD) or self._own:
            return False
        config: Any = getattr(self._model, "config", None)
        configs = (config, getattr(config, "text_config", None))
        is_tied = any(getattr(each, "tie_word_embeddings", False) for each in configs)
        return is_tied and _embedding(self._model) is not None


UNTIED = (
    "which are one parameter in this model (tie_word_embeddings): this is another model, or the trainer has untied them"
)


def _embedding(model: torch.nn.Module) -> Any:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    found = (each for each in model.modules() if isinstance(each, VocabParallelEmbedding))
    return next((each for each in found if not isinstance(each, ParallelLMHead)), None)


def _rows(embedding: Any) -> slice:
    """Return what a rank has of the vocabulary."""
    indices = embedding.shard_indices
    return slice(int(indices.org_vocab_start_index), int(indices.org_vocab_end_index))


def _share_of(head: torch.Tensor, embedding: Any) -> torch.Tensor:
    """Return what a rank's embedding would hold of a whole head."""
    return head[_rows(embedding)].to(embedding.weight.dtype)


def _checksum(tensor: torch.Tensor) -> str:
    content = tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy()
    return hashlib.blake2b(content.data, digest_size=16).hexdigest()
