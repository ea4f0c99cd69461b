"""`KitWorker`: what weight_paths.py asks for inside vLLM's worker process, where the weights are."""

from __future__ import annotations

from pathlib import Path

import torch
from weight_state import state_of

from verl_ascend_rollout.tools.smoke.worker import SmokeWorker
from verl_ascend_rollout.worker.weights import sync


class KitWorker(SmokeWorker):
    """Smoke's worker, which also says what it holds, byte for byte, and can load as verl 0.9.1 does."""

    def kit_state(self) -> dict[str, tuple[str, int]]:
        """See `weight_state.state_of`."""
        return state_of(sync.unwrapped(self.model_runner))

    def kit_verl_sync(self, path: str) -> dict[str, int]:
        """verl 0.9.1's own sequence for one full set of weights (workers/rollout/vllm_rollout/utils.py:292-353)."""
        from safetensors.torch import load_file
        from verl.utils.vllm.patch import patch_vllm_moe_model_weight_loader
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.utils import process_weights_after_loading

        runner = self.model_runner
        model = sync.unwrapped(runner)
        device: torch.device = getattr(self, "device", None) or torch.device("cpu")
        tensors = [pair for file in sorted(Path(path).glob("*.safetensors")) for pair in load_file(file).items()]
        with torch.no_grad(), set_current_vllm_config(runner.vllm_config):
            patch_vllm_moe_model_weight_loader(model)
            model.load_weights((name, tensor.to(device)) for name, tensor in tensors)
            process_weights_after_loading(model, runner.vllm_config.model_config, device)
        return {"tensors": len(tensors)}
