"""A saboteur for the control: every weight sync after the first is dropped, and nobody is told.

Loaded in every process of a run by VERL_USE_EXTERNAL_MODULES=drop_syncs.
"""

from __future__ import annotations

from typing import Any

import wrapt


def _drop(module: Any) -> None:
    adapter = module.AscendSafeServerAdapter
    send = adapter.update_weights

    async def update_weights(self: Any, weights: Any, global_steps: int | None = None, **kwargs: Any) -> None:
        if not global_steps:
            await send(self, weights, global_steps=global_steps, **kwargs)
        elif self._ensure_server_handle():
            await self.server_handle.set_global_steps.remote(global_steps)

    adapter.update_weights = update_weights


wrapt.register_post_import_hook(_drop, "verl_ascend_rollout.integration.adapter")
