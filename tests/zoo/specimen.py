"""A loaded model of one family and dtype, with what fresh loads of its two checkpoints are."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from checkpoint_pair import Checkpoint, Pair
from loaded_model import LoadedModel, Refused, State, differences

LISTED = 4
"""How many tensors a failure lists."""


@dataclass(frozen=True, repr=False)
class Specimen:
    """A model that was built from checkpoint A.

    Attributes:
        name: family and dtype, for messages.
        dtype: the engine's, by vLLM's name.
        pair: the checkpoints A and B.
        loaded: the model, and its worker.
        fresh: by checkpoint, what a fresh load of it is.
    """

    name: str
    dtype: str
    pair: Pair
    loaded: LoadedModel
    fresh: dict[str, State]

    @classmethod
    def of(cls, pair: Pair, dtype: str) -> Specimen:
        """Load both checkpoints in turn, the second to stay."""
        b = LoadedModel(pair.b.folder, dtype, **pair.family.engine).state()
        loaded = LoadedModel(pair.a.folder, dtype, **pair.family.engine)
        return cls(f"{pair.family.name}, {dtype}", dtype, pair, loaded, {"A": loaded.state(), "B": b})

    def __repr__(self) -> str:
        # pytest prints the arguments of a test that fails.
        return f"Specimen({self.name})"

    def checkpoint(self, which: str) -> Checkpoint:
        """Checkpoint A or B."""
        return self.pair[which]

    def unlike_fresh(self, which: str) -> str:
        """What is not bit for bit as in a fresh load of checkpoint A or B; empty where everything is."""
        found = differences(self.loaded.state(), self.fresh[which])
        more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
        return f"{len(found)} unlike a fresh load of {which}: {', '.join(found[:LISTED])}{more}" if found else ""


def named(said: str) -> set[str]:
    """The names of tensors in a sentence, and every other word with it; not those whose place another one took."""
    accused = re.sub(r"\(the place of [^)]*\)", "", said)
    return {word.rstrip(".") for word in re.findall(r"[\w.]+", accused)}


def refusal(sync: Callable[[], object]) -> str:
    """What the product says when it refuses a sync; empty where it takes it."""
    try:
        sync()
    except Refused as error:
        return str(error)
    return ""
