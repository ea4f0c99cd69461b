"""Every order in which memory can be given away and taken back has a defined result; none lets the scheduler run over
memory that is not there."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_ascend_rollout.engine.lifecycle import TABLE, Action, EngineNotReadyError, Lifecycle, Plan, Request, State

STATES = get_args(State)
REQUESTS = get_args(Request)


def after(life: Lifecycle, *requests: Request) -> Lifecycle:
    for request in requests:
        life = life.passed(life.plan(request))
    return life


def test_every_state_knows_every_request() -> None:
    assert set(TABLE) == {(state, request) for state in STATES for request in REQUESTS}
    assert {action for plan in TABLE.values() for action in plan.actions} == set(get_args(Action))


@pytest.mark.parametrize(
    ("requests", "state", "last"),
    [
        (["sleep"], "asleep", ("sleep",)),
        (["sleep", "sleep"], "asleep", ()),
        (["sleep", "free"], "asleep", ()),
        (["sleep", "wake_weights"], "weights_only", ("wake_weights",)),
        (["sleep", "wake_weights", "wake_kv_cache"], "awake", ("init",)),
        (["sleep", "wake_kv_cache"], "awake", ("wake_weights", "init")),
        (["sleep", "wake_all"], "awake", ("wake_weights", "init")),
        (["free"], "weights_only", ("free",)),
        (["free", "free"], "weights_only", ()),
        (["free", "wake_kv_cache"], "awake", ("init",)),
        (["free", "wake_kv_cache", "wake_kv_cache"], "awake", ()),
        (["free", "sleep"], "asleep", ("init", "sleep")),
        (["wake_all"], "awake", ()),
    ],
)
def test_orders(requests: list[Request], state: str, last: tuple[str, ...]) -> None:
    life = after(Lifecycle(), *requests[:-1])
    plan = life.plan(requests[-1])
    assert plan.actions == last
    assert life.passed(plan).state == state


def test_the_wrong_order_is_put_right_and_said() -> None:
    assert "weights first" not in Lifecycle(state="weights_only").plan("wake_kv_cache").note
    assert "before the weights" in Lifecycle(state="asleep").plan("wake_kv_cache").note


def test_a_failed_step_is_dirty_until_the_kv_cache_is_back() -> None:
    life = Lifecycle(state="weights_only").failed("init failed: no room")
    assert life.state == "dirty"
    assert "no room" in life.refusal
    for request in ("free", "wake_weights", "sleep"):
        life = after(life, request)
        assert life.state == "dirty"
        assert "no room" in life.refusal
    life = after(life, "wake_kv_cache")
    assert life == Lifecycle()
    assert life.runs and not life.refusal


def test_after_a_failed_sync_nothing_runs_and_no_kv_cache_is_made() -> None:
    life = dataclasses.replace(Lifecycle(state="weights_only"), weights_stale="the last weight sync failed: cut off")
    for request in ("wake_kv_cache", "wake_all"):
        with pytest.raises(EngineNotReadyError, match=r"not made again: the last weight sync failed: cut off"):
            life.plan(request)
    assert "cut off" in life.refusal and not life.waits
    assert after(life.synced(), "wake_kv_cache").runs


def test_weights_that_sleep_discarded_are_never_generated_with() -> None:
    life = dataclasses.replace(after(Lifecycle(), "sleep"), weights_discarded=True)
    assert life.waits, "a request that comes while asleep waits: the sync is still to come"
    with pytest.raises(EngineNotReadyError, match="level 2 discarded"):
        life.plan("wake_kv_cache")
    woken = after(life, "wake_all")
    assert woken.state == "awake" and not woken.runs
    assert "level 2 discarded" in woken.refusal
    assert woken.synced().runs
    assert after(after(life, "wake_weights").synced(), "wake_kv_cache").runs


def test_an_abort_holds_the_scheduler_over_a_sleep_and_a_wake_up() -> None:
    life = dataclasses.replace(Lifecycle(), aborted=True)
    life = after(life, "sleep", "wake_all")
    assert life.state == "awake" and not life.runs
    assert not life.waits and not life.refusal, "the request waits at verl's own gate"
    assert dataclasses.replace(life, aborted=False).runs


class Memory:
    """What vLLM's executor has of weights and KV cache, and what it does with a step that does not fit."""

    def __init__(self) -> None:
        self.weights, self.kv_cache = True, True

    def do(self, action: str) -> None:
        if action == "sleep":
            # vLLM 0.28, executor/abstract.py:30: "Executor is already sleeping", and nothing happens.
            assert self.weights and self.kv_cache, "a sleep of something that is partly asleep does nothing"
            self.weights = self.kv_cache = False
        elif action == "free":
            assert self.weights and self.kv_cache
            self.kv_cache = False
        elif action == "wake_weights":
            self.weights = True
        else:
            assert self.weights, "the KV cache comes after the weights"
            self.kv_cache = True


@given(st.lists(st.sampled_from([*REQUESTS, "fail", "sync", "fail_sync", "abort", "resume", "discard"]), max_size=40))
def test_whatever_is_called_in_whatever_order(steps: list[str]) -> None:
    """The record never says more than the memory has, each action fits what is there, and a way back always exists."""
    life, memory = Lifecycle(), Memory()
    for step in steps:
        if step == "sync":
            if life.weights_may_be_away:
                plan = life.plan("wake_weights")
                for action in plan.actions:
                    memory.do(action)
                life = life.passed(plan)
            assert memory.weights, "a sync writes into them"
            life = life.synced()
        elif step == "fail_sync":
            life = dataclasses.replace(life, weights_stale="cut off")
        elif step == "abort":
            life = dataclasses.replace(life, aborted=True)
        elif step == "resume":
            life = dataclasses.replace(life, aborted=False)
        elif step == "discard":
            life = dataclasses.replace(life, weights_discarded=life.state == "asleep" or life.weights_discarded)
        elif step == "fail":
            life = life.failed("broken")
        else:
            was = life
            try:
                plan = life.plan(step)  # type: ignore[arg-type]
            except EngineNotReadyError:
                assert life.weights_stale or life.weights_discarded
                continue
            for action in plan.actions:
                if was.state == "dirty" and action in ("sleep", "free") and not (memory.weights and memory.kv_cache):
                    continue  # vLLM, and our worker, do nothing then
                memory.do(action)
            life = life.passed(plan)
        if life.state != "dirty":
            assert memory.kv_cache == (life.state == "awake")
            assert memory.weights == (life.state != "asleep")
        if life.runs:
            assert memory.weights and memory.kv_cache and not life.refusal and not life.waits
        assert not (life.waits and life.refusal)
    back = dataclasses.replace(life.synced(), aborted=False)
    assert after(back, "wake_all").runs


@pytest.mark.parametrize(
    ("state", "away"), [("awake", False), ("weights_only", False), ("asleep", True), ("dirty", True)]
)
def test_a_sync_wakes_weights_that_a_failed_step_may_have_left_away(state: Any, away: bool) -> None:
    """Writing into memory that is not mapped ends the worker; a wake-up too many does nothing."""
    life = Lifecycle(state)
    assert life.weights_may_be_away is away
    if away:
        assert "wake_weights" in life.plan("wake_weights").actions


def test_plans_are_values() -> None:
    assert Plan((), "awake") == TABLE["awake", "wake_all"]
