"""`KitWorker`: what weight_paths.py asks for inside vLLM's worker process, where the weights are."""

from __future__ import annotations

from pathlib import Path

import torch
from weight_state import state_of

from verl_ascend_rollout.integration import verl_sequence
from verl_ascend_rollout.tools.smoke.worker import SmokeWorker
from verl_ascend_rollout.worker.weights import sync


class KitWorker(SmokeWorker):
    """Smoke's worker, which also says what it holds, byte for byte, and can load as verl 0.9.1 does."""

    def kit_state(self) -> dict[str, tuple[str, int]]:
        """See `weight_state.state_of`."""
        return state_of(sync.unwrapped(self.model_runner))

    def kit_verl_sync(self, path: str) -> dict[str, int]:
        """One full set of weights by verl's own sequence."""
        from safetensors.torch import load_file
        from vllm.config import set_current_vllm_config

        runner = self.model_runner
        tensors = [pair for file in sorted(Path(path).glob("*.safetensors")) for pair in load_file(file).items()]
        with torch.no_grad(), set_current_vllm_config(runner.vllm_config):
            on_device = ((name, tensor.to(runner.device)) for name, tensor in tensors)
            verl_sequence.load(runner, on_device)
        return {"tensors": len(tensors)}
