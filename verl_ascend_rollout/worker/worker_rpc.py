"""Calls of vLLM's workers in which an error is a value.

With more than one worker, an exception in one of them makes vLLM's executor stop reading: the answers of the others
stay in their queues, and the next call takes them for its own (vLLM 0.18 to 0.32, v1/executor/multiproc_executor.py,
`get_response`: it raises at the first failure and leaves the remaining queues as they are).  So our own calls never
raise in a worker: they answer, and whoever called raises.  Nothing of torch or vLLM is imported here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

logger = logging.getLogger("verl_ascend_rollout.worker.worker_rpc")

_VALUE, _ERROR = "ascend_safe_value", "ascend_safe_error"


class WorkerError(RuntimeError):
    """A call failed on a worker.  The message has each failure; the log of the worker has the traceback."""


def capture(call: Callable[[], Any], what: str) -> dict[str, Any]:
    """Return the result of `call`, or its error, as a value that vLLM can send."""
    try:
        return {_VALUE: call()}
    except Exception as error:
        logger.exception("%s failed", what)
        return {_ERROR: f"{type(error).__name__}: {error}"}


def unwrap(what: str, answers: Sequence[dict[str, Any]]) -> list[Any]:
    """Return the results of all workers.

    Raises:
        WorkerError: a worker answered with an error; every failure is in the message.
    """
    failures = {rank: answer[_ERROR] for rank, answer in enumerate(answers) if _ERROR in answer}
    if failures:
        where = len(answers) > 1
        said = "; ".join(f"worker {rank}: {text}" if where else text for rank, text in failures.items())
        raise WorkerError(f"{what} failed: {said}")
    return [answer[_VALUE] for answer in answers]
