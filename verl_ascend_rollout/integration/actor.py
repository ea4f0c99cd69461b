"""The rollout server as Ray sees it: its methods by name, and no import of vLLM.

Ray imports an actor's class in every process that is handed a handle to the actor (ray 2.60, `make_actor_handle`): with
`AscendSafeHttpServer` itself, the load balancer and each agent-loop worker would import all of vLLM's server, more than
ten seconds of work, to call one method.  So the actor is this class, and the server is made inside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from typing import Any

from verl_ascend_rollout import import_fix
from verl_ascend_rollout.engine.metrics import StepMetrics, step_of
from verl_ascend_rollout.integration.contract import CONTRACT

OURS = (
    "mark_weights_stale",
    "explain",
    "free_cache_engine",
    "init_cache_engine",
    "memory",
    "engine_death",
    "keep_snapshot",
)
"""What our server adds."""

METHODS = (
    *(
        symbol.name.removeprefix("vLLMHttpServer.")
        for symbol in CONTRACT
        if symbol.key.startswith("server.") and symbol.use in ("override", "forward")
        if "._" not in symbol.name
    ),
    *OURS,
)
"""Every public method of the server, of verl's and ours; one that this verl does not have, it does not call."""


def server_class() -> Any:
    """Return the class of server for the verl that is imported, by what verl's own server has."""
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer

    from verl_ascend_rollout.integration import no_hooks, own_gate, server

    if hasattr(vLLMHttpServer, "_park_until_admitted"):
        return server.AscendSafeHttpServer
    hooks = hasattr(vLLMHttpServer, "_init_config")
    return own_gate.AscendSafeGatedHttpServer if hooks else no_hooks.AscendSafePlainHttpServer


class AscendSafeServerActor:
    """Forwards each of `METHODS` to an `AscendSafeHttpServer`, which only the actor's own process imports."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make the server; see verl's `vLLMHttpServer`.

        Raises:
            ImportFixError: another package named `vllm` than the installed one is in use in this process.
        """
        # Also where verl was kept from loading our plug-in, which does the same.
        import_fix.apply(strict=True)
        self._server = server_class()(*args, **kwargs)
        self._metrics = StepMetrics(self._server.replica_rank, prometheus=bool(self._server.config.prometheus.enable))

    async def step_metrics(self) -> dict[str, Any]:
        """For the trackers: `seconds` by step since the last call, the `memory` of each worker, how many `restarts`
        the engine has had, and how many records of `routing` came."""
        # The servers of a replica's further nodes have no engine to ask (verl 0.9.1, run_headless).
        memory = await self._server.call("memory", (), {}) if self._server.node_rank == 0 else []
        return {
            "seconds": self._metrics.take(),
            "memory": memory,
            "restarts": self._server.restarts,
            "routing": self._server.take_routing(),
        }


def _forward(name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
    async def method(self: AscendSafeServerActor, *args: Any, **kwargs: Any) -> Any:
        step = step_of(name, args, kwargs)
        started = time.perf_counter()
        try:
            return await self._server.call(name, args, kwargs)
        finally:
            # One that fails has taken its time too.
            if step is not None:
                self._metrics.add(step, time.perf_counter() - started)

    method.__name__ = name
    method.__qualname__ = f"{AscendSafeServerActor.__name__}.{name}"
    return method


for _name in METHODS:
    setattr(AscendSafeServerActor, _name, _forward(_name))
