"""Routing replay (R3) with FSDP: the trainer's routers use the experts that the rollout has recorded.

verl hands vLLM's record of each token's experts to every trainer, and only those of Megatron and VeOmni use it (verl
0.9.1, workers/engine_workers.py:496).  Here a router's `torch.topk` is answered with the recorded experts: their
probabilities, normalisation and gradients stay the router's own, and the same holds for transformers 4.57, where the
block picks the experts, for 5, where a router does, and for verl's own blocks on an NPU.

A record that is not this model's would train it on noise without a word, so each pass compares it with what the router
would have picked, and stops before the optimizer's step where the two have nothing to do with each other.
"""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from verl_ascend_rollout import PATCHED, events

KEY = "actor_rollout_ref.rollout.enable_rollout_routing_replay"

ROUTERS = ("Qwen2MoeTopKRouter", "Qwen3MoeTopKRouter")
"""What picks the experts in transformers 5."""

BLOCKS = ("Qwen2MoeSparseMoeBlock", "Qwen3MoeSparseMoeBlock")
"""What picks them in transformers 4.57."""

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
"""The decoder layer in a router's name: vLLM records by it, over all layers, also those without experts (vLLM 0.28,
routed_experts_capturer.py)."""

FLOOR = 0.7
"""The share of a sequence's recorded experts that the trainer's own router picks as well, below which the record cannot
be of this policy.  On toys right records came to 0.974 and more, those that were shifted by a token to 0.31 to 0.41,
and those of another model, or shifted by a layer, to 0.07, which is chance."""

FEWEST = 64
"""Recorded experts below which a sequence is not judged for itself: chance has no say above it."""

LOG_PROB, UPDATE = "log_prob", "update"
"""The passes over a batch: before the updates, with the weights that the rollout had, and in them."""

TOPK = (torch.topk, torch.Tensor.topk)

_events: str | None = None


class RoutingReplayError(RuntimeError):
    """The routing cannot be replayed, or the record is not this model's."""


def switch_on(file: str | None, functions: Sequence[Callable[..., Any]]) -> None:
    """Replay in this process, and write events to `file`.

    Args:
        file: of events; `None` writes none.
        functions: verl's, which have to be patched for it.

    Raises:
        RoutingReplayError: one is not, so that records would be ignored without a word.
    """
    global _events
    _events = file
    bare = [function.__qualname__ for function in functions if not hasattr(function, PATCHED)]
    if bare:
        raise RoutingReplayError(
            f"{KEY}=True cannot be kept: {' and '.join(bare)} of this verl is not the one that is known, and the "
            "record would be ignored; set it to False, or use a verl release that the support matrix lists"
        )


# --- the routers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Router:
    """A module that picks experts by one `torch.topk`."""

    layer: int
    module: torch.nn.Module
    top_k: int
    experts: int


def routers_of(model: torch.nn.Module) -> list[Router]:
    """Return the routers of a model, wrapped by FSDP and PEFT or not, by the number of their decoder layer.

    Raises:
        RoutingReplayError: it has none that is known.
    """
    found = []
    for name, module in model.named_modules():
        layer = LAYER.search(name)
        picks = _is(module, ROUTERS) or (
            _is(module, BLOCKS) and not any(_is(child, ROUTERS) for child in module.modules())
        )
        if layer and picks:
            found.append(Router(int(layer[1]), module, int(module.top_k), int(module.num_experts)))
    if not found:
        raise RoutingReplayError(
            f"{KEY}=True cannot work: {type(model).__name__} has no router of Qwen2-MoE or Qwen3-MoE; set it to False"
        )
    return found


def _is(module: torch.nn.Module, names: Sequence[str]) -> bool:
    return any(kind.__name__ in names for kind in type(module).__mro__)  # FSDP2 makes a subclass of each


class _AnswerTopK(TorchFunctionMode):
    """Answers the first `torch.topk` within with the experts that `choose` makes of the native ones."""

    def __init__(self, choose: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.choose = choose
        self.answered = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in TOPK or self.answered:
            return func(*args, **(kwargs or {}))
        self.answered = True
        probabilities = args[0]
        with torch.no_grad():
            chosen = self.choose(func(*args, **(kwargs or {})).indices)
        return torch.return_types.topk((probabilities.gather(-1, chosen), chosen))


# --- one micro-batch --------------------------------------------------------------------------------------------------


@dataclass
class _MicroBatch:
    """The record of the tokens that the routers of this rank are about to see, and how far they agree with it.

    Attributes:
        record: (tokens, routers, top k), in the routers' order.
        missing: (tokens,): tokens without a record, which are routed natively.
        sequence: (tokens,): which sequence a token is of; the last number is padding's.
        sequences: how many there are, padding not counted.
        agreed: (tokens,): recorded experts that the router picks as well, over all layers.
        differed: in how many cells (token and layer) the two are not the same set.
        seen: the routers that have been through: a checkpoint's recomputation is not counted twice.
    """

    record: torch.Tensor
    missing: torch.Tensor
    sequence: torch.Tensor
    sequences: int
    agreed: torch.Tensor
    differed: torch.Tensor
    seen: set[int] = field(default_factory=set)

    def choose(self, place: int, native: torch.Tensor) -> torch.Tensor:
        """Return the experts to use, (tokens, top k), of the router at this place.

        Raises:
            RoutingReplayError: the router sees other tokens than those of the record.
        """
        recorded = self.record[:, place].long()
        if native.shape != recorded.shape:
            raise RoutingReplayError(
                f"the rollout's record of routing is for {tuple(recorded.shape)} (tokens, top k), and router {place} "
                f"picks {tuple(native.shape)}: set {KEY}=False, and report it with your model's configuration"
            )
        if place not in self.seen:
            self.seen.add(place)
            agreed = (native.unsqueeze(-1) == recorded.unsqueeze(-2)).any(-1).sum(-1)
            self.agreed += agreed
            self.differed += ((agreed < native.shape[-1]) & ~self.missing).sum()
        return torch.where(self.missing.unsqueeze(-1), native, recorded)


def lay_out(
    record: torch.Tensor, lengths: Sequence[int], shape: Sequence[int], packed: bool, padding: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay a record out as the model's tokens are.

    Args:
        record: (sequences, tokens, layers, top k): nested, or dense where all sequences are of one length.
        lengths: of each sequence, in tokens.
        shape: of the model's `input_ids`, before they are divided among ranks.
        packed: whether they are packed into one row (`use_remove_padding`), with the padding at its end.
        padding: how many tokens of padding that has.

    Returns:
        The record, (all tokens of `input_ids`, layers, top k), zeros where there is padding; and which sequence each
        token is of, with the number of sequences for padding.

    Raises:
        RoutingReplayError: the record has other lengths.
    """
    jagged: Any = record
    nested = bool(record.is_nested)
    # A nested tensor's `unbind` fails on more than two dimensions (pytorch#153238).
    values = record.values() if nested else record.flatten(0, 1)
    has = jagged.offsets().diff().tolist() if nested else [record.shape[1]] * record.shape[0]
    if has != list(lengths):
        raise RoutingReplayError(
            f"the rollout's record of routing is of {has[:4]}... tokens, and the sequences have "
            f"{list(lengths[:4])}...: it would be shifted; set {KEY}=False, and report it with your trainer's mode"
        )
    count = len(has)
    sequence = torch.repeat_interleave(torch.arange(count), torch.tensor(has)).to(values.device)
    if packed:
        values = torch.nn.functional.pad(values, (0, 0, 0, 0, 0, padding))
        return values, torch.nn.functional.pad(sequence, (0, padding), value=count)
    row, column = sequence, torch.cat([torch.arange(length) for length in has]).to(values.device)
    full = values.new_zeros(*shape, *values.shape[1:])
    owner = sequence.new_full(tuple(shape), count)
    full[row, column], owner[row, column] = values, sequence
    return full.flatten(0, 1), owner.flatten()


# --- one pass ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """What one pass over a batch has found.

    Attributes:
        tokens, native: tokens with a record and without; the latter are routed natively.
        cells, differed: tokens with a record times layers, and in how many the router would have picked other experts.
        share: of the recorded experts that the router picks as well, 0 to 1; 1 where there is no record.
        lowest: the same, of the sequence where it is lowest.
        sequences, unrecorded: of the batch, and how many of them have no record at all.
        poor: sequences whose share is below `FLOOR`.
    """

    tokens: int = 0
    native: int = 0
    cells: int = 0
    differed: int = 0
    share: float = 1.0
    lowest: float = 1.0
    sequences: int = 0
    unrecorded: int = 0
    poor: int = 0

    def metrics(self) -> dict[str, float]:
        """Return it by verl's names, which the trainer puts `actor/` before; `min` says how verl sums up."""
        return {
            "routing_replay/agreement": self.share,
            "routing_replay/agreement_min": self.lowest,
            "routing_replay/cells_differed": float(self.differed),
            "routing_replay/cells": float(self.cells),
            "routing_replay/tokens_without_record": float(self.native),
        }


class RoutingReplay:
    """The routers of one model: they use the record while a pass is on, and are their own else."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Put us between each router and its `torch.topk`.

        Raises:
            RoutingReplayError: see `routers_of`.
        """
        self.routers = routers_of(model)
        self.top_k, self.experts = self.routers[0].top_k, self.routers[0].experts
        self.fresh = True
        self._now: _MicroBatch | None = None
        self._done: list[_MicroBatch] = []
        for place, router in enumerate(self.routers):
            router.module.forward = self._forced(place, router.module.forward)

    def _forced(self, place: int, native: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(native)
        def forward(*args: Any, **kwargs: Any) -> Any:
            now = self._now
            if now is None:
                return native(*args, **kwargs)
            with _AnswerTopK(functools.partial(now.choose, place)) as mode:
                output = native(*args, **kwargs)
            if not mode.answered:
                raise RoutingReplayError(
                    f"{KEY}=True cannot be kept: router {place} does not pick its experts by torch.topk; set it to "
                    "False, and report it with the versions of transformers and verl"
                )
            return output

        return forward

    def use(self, record: torch.Tensor, sequence: torch.Tensor, sequences: int) -> None:
        """Let the routers use a record from now on: in the forward pass, and in a checkpoint's recomputation of it.

        Args:
            record: (tokens, decoder layers, top k); a token whose experts are all 0 has none.
            sequence: (tokens,): which sequence a token is of; `sequences` for padding.
            sequences: how many there are.

        Raises:
            RoutingReplayError: it is the record of another model.
        """
        layers = [router.layer for router in self.routers]
        if record.shape[1] <= layers[-1] or record.shape[2] != self.top_k:
            raise RoutingReplayError(
                f"the rollout's record of routing is of another model: it has {record.shape[1]} layers with "
                f"{record.shape[2]} experts a token, and the trainer's model has {layers[-1] + 1} with {self.top_k}; "
                f"let trainer and rollout use one model, or set {KEY}=False"
            )
        record = record[:, layers]
        ordered = record.sort(-1).values
        # A router never picks an expert twice, so zeros (what vLLM and verl write for "not recorded") are none's.
        missing = (ordered[..., 1:] == ordered[..., :-1]).any(-1)
        partly = missing.any(-1) != missing.all(-1)
        broken = missing & (record != 0).any(-1)
        outside = (record < 0) | (record >= self.experts)
        flags = torch.stack([partly.any(), broken.any(), outside.any()]).tolist()
        if any(flags):
            what = (
                "tokens recorded in some layers only",
                "an expert twice for a token",
                "experts that are not there",
            )
            raise RoutingReplayError(
                "the rollout's record of routing is no record of this model: it has "
                f"{' and '.join(words for words, there in zip(what, flags, strict=True) if there)} "
                f"({self.experts} experts, {self.top_k} a token); set {KEY}=False, and report it with your versions"
            )
        self._now = _MicroBatch(
            record,
            missing[:, 0],
            sequence,
            sequences,
            torch.zeros(len(record), dtype=torch.long, device=record.device),
            torch.zeros((), dtype=torch.long, device=record.device),
        )
        self._done.append(self._now)

    def finish(self) -> Agreement:
        """Let the routers be their own again, and return what was found since the last call."""
        done, self._done, self._now = self._done, [], None
        if not done:
            return Agreement()
        agreed, picks = [], []
        for batch in done:
            recorded = (~batch.missing).long()
            empty = recorded.new_zeros(batch.sequences + 1)
            agreed.append(empty.index_add(0, batch.sequence, batch.agreed * recorded)[:-1])
            picks.append(empty.index_add(0, batch.sequence, recorded)[:-1])
        each = len(self.routers) * self.top_k
        counts = torch.cat(picks).tolist()
        both = zip(torch.cat(agreed).tolist(), counts, strict=True)
        shares = [(one / (count * each), count * each) for one, count in both if count]
        tokens = sum(counts)
        judged = [share for share, weight in shares if weight >= FEWEST]
        return Agreement(
            tokens=tokens,
            native=sum(int((batch.sequence < batch.sequences).sum()) for batch in done) - tokens,
            cells=tokens * len(self.routers),
            differed=sum(int(batch.differed) for batch in done),
            share=sum(share * weight for share, weight in shares) / (tokens * each) if tokens else 1.0,
            lowest=min(judged, default=1.0),
            sequences=len(counts),
            unrecorded=counts.count(0),
            poor=sum(share < FLOOR for share in judged),
        )


def judge(found: Agreement, expected: bool, fresh: bool) -> None:
    """Stop where the record cannot be this policy's.

    A warning would not do: a step with experts that have nothing to do with the tokens ruins the weights, and nothing
    later can tell.

    Args:
        found: in one pass.
        expected: whether there should be a record: a rank whose sequences are all padding has none.
        fresh: whether the weights are those that the record was made with, as far as this rank can know: after an
            update the router has moved on (a toy with a learning rate of 3e-3 agreed to 0.40 in the second mini-batch),
            and that the record is used all the same is what replay is for.

    Raises:
        RoutingReplayError: it is not, or there is none.
    """
    if expected and not found.tokens:
        raise RoutingReplayError(
            f"{KEY}=True, and none of the {found.native} tokens of this batch has its experts recorded: this vLLM's "
            "kernel for experts does not record them; set it to False, or use a vLLM that the support matrix lists"
        )
    if fresh and (found.poor or found.share < FLOOR):
        raise RoutingReplayError(
            f"the rollout's record of routing is not of this policy: in {found.poor} of {found.sequences} sequences "
            f"the trainer's own router picks fewer than {FLOOR:.0%} of the recorded experts ({found.share:.2f} in all, "
            f"{found.lowest:.2f} at the lowest). It is of another model or of other weights (with an asynchronous "
            "trainer, of some updates ago), or shifted by some tokens, and nothing was trained with it: set "
            f"{KEY}=False to train without, or lower an asynchronous trainer's staleness; report it with the events "
            "file"
        )


@contextlib.contextmanager
def passing(engine: Any, name: str, expected: bool) -> Iterator[list[Agreement]]:
    """Replay while verl's engine goes over a batch.

    Args:
        engine: verl's FSDPEngine; `RoutingReplay` is kept in it as `_ascend_safe_replay`.
        name: of the pass, in the event: `LOG_PROB` or `UPDATE`.
        expected: see `judge`.

    Yields:
        A list, which has what was found when the pass is over.

    Raises:
        RoutingReplayError: see `judge` and `RoutingReplay`.
    """
    kept = getattr(engine, "_ascend_safe_model", None)
    if kept is not engine.module:
        engine._ascend_safe_model, engine._ascend_safe_routing = engine.module, RoutingReplay(engine.module)
    replay: RoutingReplay = engine._ascend_safe_routing
    fresh = replay.fresh or name == LOG_PROB
    started = time.perf_counter()
    results: list[Agreement] = []
    engine._ascend_safe_replay = replay
    try:
        yield results
    finally:
        engine._ascend_safe_replay = None
        found = replay.finish()
    # Where verl takes the rollout's log-probabilities as they are (bypass_mode), only the first update is judged.
    replay.fresh = name == LOG_PROB
    results.append(found)
    events.emit(
        events.Event(
            step="routing",
            process="trainer",
            seconds=time.perf_counter() - started,
            detail={"pass": name, **vars(found)},
        ),
        _events,
    )
    judge(found, expected, fresh)
