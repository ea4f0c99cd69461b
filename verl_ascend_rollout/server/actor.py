"""The rollout server as Ray sees it: its methods by name, and no import of vLLM.

Ray imports an actor's class in every process that is handed a handle to the actor (ray 2.60, `make_actor_handle`): with
`AscendSafeHttpServer` itself, the load balancer and each agent-loop worker would import all of vLLM's server, more than
ten seconds of work, to call one method.  So the actor is this class, and the server is made inside it.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Coroutine
from typing import Any

from verl_ascend_rollout import import_fix
from verl_ascend_rollout.server.step_metrics import StepMetrics, step_of

METHODS = (
    # What verl 0.9.1 calls on a rollout server, and what it defines without calling it.
    "abort_all_requests",
    "abort_request",
    "clear_kv_cache",
    "collective_rpc",
    "generate",
    "get_master_address",
    "get_rollout_config",
    "get_server_address",
    "launch_server",
    "open_submission_gate",
    "release_kv_cache",
    "resume_engine_generation",
    "resume_generation",
    "resume_kv_cache",
    "run_headless",
    "run_server",
    "set_global_steps",
    "set_pd_peer",
    "sleep",
    "start_profile",
    "stop_profile",
    "wait_for_requests_to_drain",
    "wake_up",
    # Ours.
    "doubt_weights",
    "explain",
    "free_cache_engine",
    "init_cache_engine",
    "memory",
)
"""Every public method of `AscendSafeHttpServer`; tests/contract/ compares the two."""


class AscendSafeServerActor:
    """Forwards each of `METHODS` to an `AscendSafeHttpServer`, which only the actor's own process imports."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make the server; see verl's `vLLMHttpServer`.

        Raises:
            ImportFixError: another package named `vllm` than the installed one is in use in this process.
        """
        # Also where verl was kept from loading our plug-in, which does the same.
        import_fix.apply(strict=True)
        from verl_ascend_rollout.server.http_server import AscendSafeHttpServer

        self._server = AscendSafeHttpServer(*args, **kwargs)
        self._metrics = StepMetrics(self._server.replica_rank, prometheus=bool(self._server.config.prometheus.enable))

    async def step_metrics(self) -> dict[str, Any]:
        """For the trackers: `seconds` by step since the last call, and the `memory` of each worker."""
        # The servers of a replica's further nodes have no engine to ask (verl 0.9.1, run_headless).
        memory = await self._server.memory() if self._server.node_rank == 0 else []
        return {"seconds": self._metrics.take(), "memory": memory}


def _forward(name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
    async def method(self: AscendSafeServerActor, *args: Any, **kwargs: Any) -> Any:
        step = step_of(name, args, kwargs)
        started = time.perf_counter()
        try:
            result = getattr(self._server, name)(*args, **kwargs)
            return await result if inspect.isawaitable(result) else result
        finally:
            # One that fails has taken its time too.
            if step is not None:
                self._metrics.add(step, time.perf_counter() - started)

    method.__name__ = name
    method.__qualname__ = f"{AscendSafeServerActor.__name__}.{name}"
    return method


for _name in METHODS:
    setattr(AscendSafeServerActor, _name, _forward(_name))
