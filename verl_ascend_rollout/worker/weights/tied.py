"""Parameters that a model has under two names: a head that is tied to the embedding.

A trainer may send both, since its state_dict has both.  vLLM up to 0.28 then loads the parameter twice; 0.30 drops the
head, and raises where the embedding is not in the same call of `load_weights` (models/utils.py,
`_check_skipped_aliases`), that is, where it is not in the same bucket.  Here the head is loaded under the embedding's
name, and has to be the same tensor.

vLLM's layerwise reload takes the two for two parameters (0.28, reload/layerwise.py): a head that did not come would
stay packed with the old weights on a CPU, with a warning.  There both get the one tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from verl_ascend_rollout.worker.weights.verify import WeightSyncError

NamedTensor = tuple[str, torch.Tensor]


RECORD = "_ascend_safe_tied"
"""The attribute of a model that holds what `aliases` found."""

HEAD = "lm_head.weight"
"""How the name of a head ends.  Other parameters with two names, such as those of shared experts that two modules hold,
have one in a checkpoint."""


def aliases(model: torch.nn.Module) -> dict[str, str]:
    """The names of heads that are tied, each with the first name of its parameter.

    Found once, at the first sync of a model: after a layerwise reload that broke off, the two are two until one passes.
    """
    recorded: dict[str, str] | None = getattr(model, RECORD, None)
    if recorded is not None:
        return recorded
    first: dict[int, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name and name.endswith(HEAD):
            found[name] = known
    setattr(model, RECORD, found)
    return found


def renamed(weights: Iterable[NamedTensor], names: Mapping[str, str]) -> Iterator[NamedTensor]:
    """The same tensors, each under the first name of its parameter.

    Names are the model's own; a model that maps a checkpoint's names to others (`hf_to_vllm_mapper`) loads its tied
    head as its release does.
    """
    for name, tensor in weights:
        yield names.get(name, name), tensor


def doubled(
    weights: Iterable[NamedTensor], names: Mapping[str, str], received: dict[str, torch.Tensor]
) -> Iterator[NamedTensor]:
    """The same tensors, those of tied parameters under each of their names, whichever of them came.

    Args:
        weights: names and tensors.
        names: what `aliases` found.
        received: the tied tensors that this sync has brought; filled here.

    Raises:
        WeightSyncError: head and embedding came, and are not the same.
    """
    for name, tensor in weights:
        first = names.get(name, name)
        if first not in names.values():
            yield name, tensor
        elif first not in received:
            received[first] = tensor
            yield first, tensor
            yield from ((alias, tensor) for alias, of in names.items() if of == first)
        elif not torch.equal(received[first], tensor):
            also = " and ".join(alias for alias, of in names.items() if of == first)
            raise WeightSyncError(
                f"The stream has two different tensors for {first} and {also}, which are one parameter in this model "
                "(tie_word_embeddings): this is another model, or the trainer has untied them"
            )
