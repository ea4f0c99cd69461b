"""Whether the rollout is registered in this process, and why not: written by `plugin`, read by the driver's check."""

from __future__ import annotations

import os
import sys

from verl_ascend_rollout import ROLLOUT_NAME

registered: list[str] = []
"""What was registered, one sentence each; empty where nothing was."""

refusals: list[str] = []
"""Why the rollout could not be registered, one sentence each time."""


def stop_if_refused() -> None:
    """Stop a driver whose job runs our rollout where it could not be registered.

    Without it such a job fails in an actor, with an error that does not say why, after Ray and the model are up.

    Raises:
        SystemExit: with code 2, after one sentence on standard error.
    """
    if refusals and not registered:
        print(f"{ROLLOUT_NAME}: the rollout is not registered in process {os.getpid()}: {refusals[0]}", file=sys.stderr)
        raise SystemExit(2)
