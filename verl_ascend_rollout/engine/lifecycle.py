"""The states of a rollout engine, and what each request does in each of them: pure, a table and a frozen record.

Memory is given away and taken back in two parts, weights and KV cache, and the orders in which a trainer may ask for
that are many; what happens is written down here for every one of them.

- `awake`: weights and KV cache are there; the scheduler may run.
- `weights_only`: the KV cache is away; a weight sync can be received.
- `asleep`: both are away (with sleep mode; without, weights never leave and the engine is in this state just as well).
- `dirty`: a step failed half-way; nothing is generated until the KV cache has been taken back without an error.

Beside the state there are reasons for which a scheduler must not run although all memory is there: `abort_all_requests`
without the matching resume, a weight sync that failed, and weights that sleep level 2 threw away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

State = Literal["awake", "weights_only", "asleep", "dirty"]
Request = Literal["sleep", "free", "wake_weights", "wake_kv_cache", "wake_all"]
Action = Literal["sleep", "free", "wake_weights", "init"]


class EngineNotReadyError(RuntimeError):
    """The engine may hold half of a policy, or no KV cache: it generates nothing until the step has been repeated."""


@dataclass(frozen=True)
class Plan:
    """What a request does in a state.

    Attributes:
        actions: what is done with the engine, in this order; nothing, where there is nothing to do.
        then: the state after all of them passed.
        note: what is unusual about the request here, for the log.
    """

    actions: tuple[Action, ...]
    then: State
    note: str = ""


_EARLY = "the KV cache is asked back before the weights: the weights are woken first"
_AGAIN = "the KV cache is away already: it is taken back first, since vLLM lets nothing fall asleep twice"

TABLE: Mapping[tuple[State, Request], Plan] = {
    ("awake", "sleep"): Plan(("sleep",), "asleep"),
    ("awake", "free"): Plan(("free",), "weights_only"),
    ("awake", "wake_weights"): Plan((), "awake"),
    ("awake", "wake_kv_cache"): Plan((), "awake"),
    ("awake", "wake_all"): Plan((), "awake"),
    # vLLM's executor ignores a sleep while one tag is asleep (0.28, executor/abstract.py:30): the weights would stay.
    ("weights_only", "sleep"): Plan(("init", "sleep"), "asleep", _AGAIN),
    ("weights_only", "free"): Plan((), "weights_only"),
    ("weights_only", "wake_weights"): Plan((), "weights_only"),
    ("weights_only", "wake_kv_cache"): Plan(("init",), "awake"),
    ("weights_only", "wake_all"): Plan(("init",), "awake"),
    ("asleep", "sleep"): Plan((), "asleep"),
    ("asleep", "free"): Plan((), "asleep"),
    ("asleep", "wake_weights"): Plan(("wake_weights",), "weights_only"),
    # vllm-ascend restores buffers at whichever wake-up comes first, and vLLM 0.18 to 0.23 lets the scheduler run after
    # a part has woken.
    ("asleep", "wake_kv_cache"): Plan(("wake_weights", "init"), "awake", _EARLY),
    ("asleep", "wake_all"): Plan(("wake_weights", "init"), "awake"),
    # Every step may be tried again; only a KV cache that is back ends the doubt.
    ("dirty", "sleep"): Plan(("sleep",), "dirty"),
    ("dirty", "free"): Plan(("free",), "dirty"),
    ("dirty", "wake_weights"): Plan(("wake_weights",), "dirty"),
    ("dirty", "wake_kv_cache"): Plan(("wake_weights", "init"), "awake"),
    ("dirty", "wake_all"): Plan(("wake_weights", "init"), "awake"),
}


@dataclass(frozen=True)
class Lifecycle:
    """Where an engine stands.

    Attributes:
        state: see this module.
        failure: the step that made the engine dirty, as a sentence.
        weights_stale: why the weights cannot be trusted, as a sentence: the last sync failed.
        weights_discarded: sleep level 2 threw the weights away, and no full sync has passed since.
        aborted: all requests were aborted, and `resume_generation` has not come yet.
    """

    state: State = "awake"
    failure: str = ""
    weights_stale: str = ""
    weights_discarded: bool = False
    aborted: bool = False

    def plan(self, request: Request) -> Plan:
        """Return what `request` does now.

        Raises:
            EngineNotReadyError: the KV cache would be taken back, and the scheduler let go on, over weights that are
                not to be trusted.
        """
        plan = TABLE[self.state, request]
        if "init" in plan.actions and plan.then == "awake":
            if self.weights_stale:
                raise EngineNotReadyError(f"The KV cache is not made again: {self.weights_stale}")
            if self.weights_discarded and request == "wake_kv_cache":
                raise EngineNotReadyError(
                    "The KV cache is not made again: sleep level 2 discarded the weights, and no full weight sync has "
                    "passed since; wake the weights, sync, and then wake the KV cache"
                )
        return plan

    def passed(self, plan: Plan) -> Lifecycle:
        """After all actions of `plan` passed."""
        return replace(self, state=plan.then, failure=self.failure if plan.then == "dirty" else "")

    def failed(self, what: str) -> Lifecycle:
        """After an action failed; `what` is a sentence."""
        return replace(self, state="dirty", failure=what)

    def synced(self) -> Lifecycle:
        """After a full weight sync passed."""
        return replace(self, weights_stale="", weights_discarded=False)

    @property
    def weights_may_be_away(self) -> bool:
        """Whether the weights must be woken before a sync writes into them: writing into memory that is not mapped ends
        the worker."""
        return self.state in ("asleep", "dirty")

    @property
    def runs(self) -> bool:
        """Whether the scheduler may run."""
        return self.state == "awake" and not (self.weights_stale or self.weights_discarded or self.aborted)

    @property
    def refusal(self) -> str:
        """Why a request to generate is refused; empty where it is answered, or waits for memory to come back."""
        reasons = [reason for reason in (self.failure, self.weights_stale) if reason]
        if self.state == "awake" and self.weights_discarded:
            reasons.append("sleep level 2 discarded the weights, and no full weight sync has passed since")
        if not reasons:
            return ""
        return (
            f"This rollout engine refuses to generate: {'; '.join(reasons)}. A full weight sync that passes, and a KV "
            "cache that is there, end this"
        )

    @property
    def waits(self) -> bool:
        """Whether a request to generate waits until the KV cache is back."""
        return self.state in ("weights_only", "asleep") and not self.refusal
