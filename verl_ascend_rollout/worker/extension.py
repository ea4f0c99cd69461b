"""`AscendSafeWorkerExtension`: what runs inside vLLM's worker process under verl, where the tensors are."""

from __future__ import annotations

from typing import Any

import torch
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from verl_ascend_rollout import plugin
from verl_ascend_rollout.transport.receiver import receive_weights
from verl_ascend_rollout.worker.lifecycle import AscendSafeLifecycle
from verl_ascend_rollout.worker.weights import bracket
from verl_ascend_rollout.worker.weights.verify import WeightSyncError


class AscendSafeWorkerExtension(AscendSafeLifecycle, vLLMColocateWorkerExtension):
    """verl's worker extension with a guarded KV cache and weight loading that is right on every reload."""

    def ascend_safe_configure(self, kv_rung: str, weight_path: str, verify: str) -> dict[str, Any]:
        """See `AscendSafeLifecycle`; also reports what the plug-in has `registered` in this process."""
        report = super().ascend_safe_configure(kv_rung, weight_path, verify)
        return {**report, "registered": list(plugin.register())}

    def update_weights_from_ipc(
        self,
        peft_config: dict[str, Any] | None = None,
        base_sync_done: bool = False,
        use_shm: bool = False,
        rendezvous: str | None = None,
        timeout: float = 600.0,
    ) -> None:
        """Receive a full set of weights and load it.  Overrides verl's method; two arguments more.

        Args:
            peft_config, base_sync_done, use_shm: see verl's method.
            rendezvous: where the trainer listens, if the weights come by our transport; `None` if by verl's.
            timeout: seconds that our transport waits for the trainer to send the next bucket.

        Raises:
            TransportError: the weights did not arrive; with the reason.
            WeightSyncError: the stream was not the whole model, or the engine holds more than plain weights (LoRA,
                quantization, a drafter), which this path does not load; the server then refuses to generate.
        """
        adapter_only = bool(peft_config) and base_sync_done
        by_verl = adapter_only or self._ascend_safe_path() == "verl"
        if by_verl and rendezvous is not None:
            raise WeightSyncError(
                "The trainer sends weights by this plug-in's transport and the rollout engine loads them by verl's own "
                f"sequence (weight path {self._ascend_safe_path()}): trainer and rollout must be on one kind of device"
            )
        if by_verl:
            super().update_weights_from_ipc(peft_config=peft_config, base_sync_done=base_sync_done, use_shm=use_shm)
            # An adapter-only sync processes nothing, and a wake-up may have left the experts in checkpoint form.
            self.ascend_safe_settle()
            return
        from verl.utils.vllm.vllm_quant_utils import is_quantized_model

        beyond = {
            "LoRA adapters": bool(peft_config),
            "quantized weights": is_quantized_model(self.model_runner.vllm_config),
            "an MTP drafter": self._use_mtp_drafter_weight_sync(),
        }
        found = [what for what, there in beyond.items() if there]
        if found:
            raise WeightSyncError(
                f"The weight sync of {' and '.join(found)} is not supported on this platform "
                f"(weight path {self._ascend_safe_path()}): train without"
            )
        # vLLM's CPU worker has its device; some others leave it unset (verl 0.9.1, vllm_rollout/utils.py:243).
        device: torch.device = getattr(self, "device", None) or torch.device("cpu")

        def receive(load: bracket.Loader) -> dict[str, Any]:
            # No copies: the bracket keeps nothing of what it is given.
            came = receive_weights(
                rendezvous or "", load, rank=int(self.rank), device=device, copy=False, timeout=timeout
            )
            return {"transfer_seconds": came.seconds, "checksum": came.checksum}

        def receive_by_verl(load: bracket.Loader) -> None:
            from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver

            receiver = BucketedWeightReceiver(zmq_handle=self._get_zmq_handle(), device=device, use_shm=use_shm)
            failures: list[Exception] = []

            def on_bucket_received(weights: list[bracket.NamedTensor], is_last: bool) -> None:
                if failures:
                    return
                try:
                    load(weights)
                except Exception as error:
                    # The rest of the stream is still taken off the sender's hands, or it would wait for ever.  The
                    # frames go: they hold the bucket, and closing it would fail with an error that hides this one.
                    failures.append(error.with_traceback(None))

            receiver.receive_weights(on_bucket_received=on_bucket_received)
            if failures:
                raise failures[0]

        self._ascend_safe_reload(receive if rendezvous is not None else receive_by_verl)
