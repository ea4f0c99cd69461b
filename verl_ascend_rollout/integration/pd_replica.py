"""`AscendSafePDReplica`: prefill and decode apart, which verl has from 0.9.0 on."""

from __future__ import annotations

from typing import Any

from verl.workers.rollout.vllm_rollout.vllm_pd_replica import vLLMPDReplica

from verl_ascend_rollout.integration.replica import AscendSafeReplica


class AscendSafePDReplica(AscendSafeReplica, vLLMPDReplica):
    """The same with prefill and decode apart.  Read, not run: it needs NIXL or Mooncake."""

    def _spawn_pd_server(self, *args: Any, **kwargs: Any) -> Any:
        # verl 0.9.1 writes the actor names out here (vllm_pd_replica.py:154 and :185).
        kwargs["actor_name"] = self._get_server_name_prefix() + kwargs["actor_name"].removeprefix("vllm_")
        return super()._spawn_pd_server(*args, **kwargs)
