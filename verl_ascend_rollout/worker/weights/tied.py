"""Parameters that a model has under two names: a head that is tied to the embedding.

A trainer may send both, since its state_dict has both.  vLLM up to 0.28 then loads the parameter twice; 0.30 drops the
head, and raises where the embedding is not in the same call of `load_weights` (models/utils.py,
`_check_skipped_aliases`), that is, where it is not in the same bucket.  Here whichever comes first is loaded, under the
embedding's name, and the other has to be the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

NamedTensor = tuple[str, torch.Tensor]


HEAD = "lm_head.weight"
"""How the name of a head ends.  Other parameters with two names, such as those of shared experts that two modules hold,
have one in a checkpoint."""


def aliases(model: torch.nn.Module) -> dict[str, str]:
    """The names of heads that are tied, each with the first name of its parameter."""
    first: dict[int, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name and name.endswith(HEAD):
            found[name] = known
    return found


def once(
    weights: Iterable[NamedTensor],
    names: Mapping[str, str],
    arrived: dict[str, str],
    refuse: Callable[[str, str], None],
) -> Iterator[NamedTensor]:
    """The same tensors, a tied one under the first name of its parameter, and only the first that comes of it.

    Names are the model's own; a model that maps a checkpoint's names to others (`hf_to_vllm_mapper`) loads its tied
    head as its release does.

    Args:
        weights: names and tensors.
        names: what `aliases` found.
        arrived: checksums of the tied tensors that this sync has brought, by first name; filled here.
        refuse: called with name and reason where head and embedding came and are not the same.
    """
    tied = set(names.values())
    for name, tensor in weights:
        first = names.get(name, name)
        if first not in tied:
            yield name, tensor
            continue
        content = tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy()
        checksum = hashlib.blake2b(content.data, digest_size=16).hexdigest()
        if first not in arrived:
            arrived[first] = checksum
            yield first, tensor
        elif arrived[first] != checksum:
            also = " and ".join(alias for alias, of in names.items() if of == first)
            refuse(
                name,
                f"is not the same as the other of {first} and {also}, which are one parameter in this model "
                "(tie_word_embeddings): this is another model, or the trainer has untied them",
            )
