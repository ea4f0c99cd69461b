"""Our server where verl has no hooks: verl 0.7.1.

What later releases ask a hook for is given as data: verl merges `engine_kwargs.vllm` last into vLLM's arguments, the
worker extension among them (verl 0.7.1, vllm_async_server.py:325).  And its adapter puts the engine to sleep and wakes
it past the server's own methods, through `collective_rpc` (vllm_rollout.py:139-152), which we lead back to them.
"""

from __future__ import annotations

from typing import Any

from verl_ascend_rollout.integration.own_gate import AscendSafeGatedHttpServer
from verl_ascend_rollout.integration.patch import assert_intact
from verl_ascend_rollout.integration.server import WORKER_EXTENSION
from verl_ascend_rollout.policy import engine_args


class AscendSafePlainHttpServer(AscendSafeGatedHttpServer):
    """Our server with a gate of its own, and its decisions in verl's configuration."""

    def __init__(self, config: Any, model_config: Any, *args: Any, **kwargs: Any) -> None:
        """See verl's `vLLMHttpServer`.

        Raises:
            DriftError: verl has drifted away from something that we rely on.
            OptionError: an unknown option of ours, or a bad value.
        """
        assert_intact()
        super().__init__(config, model_config, *args, **kwargs)
        config = self._take_config(self.config)
        self._decide()
        engine_kwargs = dict(self.config.get("engine_kwargs", {}).get("vllm", {}) or {})
        engine_args.add_to(engine_kwargs, self._decisions)
        engine_kwargs["worker_extension_cls"] = WORKER_EXTENSION
        object.__setattr__(config, "engine_kwargs", {**config.engine_kwargs, "vllm": engine_kwargs})
        # The decision has them.  verl would name them once more, as an argument that vLLM 0.13 does not know.
        object.__setattr__(config, "cudagraph_capture_sizes", None)

    async def collective_rpc(
        self,
        method: Any,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Call a method on every worker; sleep and wake-up go through the engine's state."""
        if method == "sleep":
            await self.sleep()  # by our level
        elif method == "wake_up":
            await self.wake_up(*args, **(kwargs or {}))
        else:
            await super().collective_rpc(method, timeout, args, kwargs)
