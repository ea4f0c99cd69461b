"""Whether a record of routing covers its answer: what is shorter or missing is dropped, counted and said."""

from __future__ import annotations

import logging
import types
from typing import Any

import numpy
import pytest

from verl_ascend_rollout.engine import routing_record


def record(rows: int) -> Any:
    return numpy.arange(rows * 2 * 4, dtype=numpy.uint8).reshape(rows, 2, 4)


def test_a_record_of_every_token_but_the_last_is_taken_as_it_is() -> None:
    whole = record(12)
    checked, reason = routing_record.checked(whole, 8, 5, (2, 4))
    assert checked is whole and reason == ""


@pytest.mark.parametrize(
    ("came", "says"),
    [
        # vLLM without the prompt's rows, and with those of a prefix cache only: verl would put them at token 0.
        (record(4), "has 4 tokens for a prompt of 8 and an answer of 5, which take 12"),
        (record(11), "has 11 tokens"),
        (record(13), "has 13 tokens"),
        (None, "vLLM gave no record of routing"),
    ],
)
def test_a_record_that_would_be_shifted_becomes_rows_that_say_not_recorded(came: Any, says: str) -> None:
    checked, reason = routing_record.checked(came, 8, 5, (2, 4))
    assert says in reason
    assert checked.shape == (12, 2, 4) and not checked.any()


def test_an_answer_that_was_aborted_before_its_first_token_needs_none() -> None:
    assert routing_record.checked(None, 8, 0, (2, 4)) == (None, "")


def test_records_are_counted_from_one_look_to_the_next() -> None:
    count = routing_record.Count()
    assert count.take() == {}, "a job without replay has no such numbers"
    for reason in ("", "short", ""):
        count.add(reason)
    assert count.take() == {"records": 3, "dropped": 1}
    assert count.take() == {"records": 0, "dropped": 0}


def test_the_server_says_the_first_that_it_drops(caplog: pytest.LogCaptureFixture) -> None:
    from verl_ascend_rollout.integration.server import AscendSafeHttpServer

    server = types.SimpleNamespace(
        _facts_of_model=types.SimpleNamespace(layers=2, top_k=4), _routing=routing_record.Count(), replica_rank=0
    )
    answers = [types.SimpleNamespace(routed_experts=came, token_ids=[1] * 5) for came in (record(12), record(4), None)]
    with caplog.at_level(logging.WARNING):
        for answer in answers:
            AscendSafeHttpServer._check_routing(server, [1] * 8, answer)
    assert [len(answer.routed_experts) for answer in answers] == [12, 12, 12]
    assert len([one for one in caplog.records if "routes its tokens for itself" in one.message]) == 1
    assert AscendSafeHttpServer.take_routing(server) == {"records": 3, "dropped": 2}
