"""`AscendSafeWorkerExtension`: what runs inside vLLM's worker process under verl, where the tensors are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from verl_ascend_rollout.integration import registration
from verl_ascend_rollout.integration.weight_sender import verls_handle_on
from verl_ascend_rollout.transport.receiver import receive_weights
from verl_ascend_rollout.transport.rendezvous import NODE_VARIABLE, on_node
from verl_ascend_rollout.transport.stream import NamedTensor
from verl_ascend_rollout.worker import kv_cache
from verl_ascend_rollout.worker.lifecycle import AscendSafeLifecycle
from verl_ascend_rollout.worker.weights import merged_experts
from verl_ascend_rollout.worker.weights import sync as weight_sync
from verl_ascend_rollout.worker.weights.manifest import WeightSyncError


class AscendSafeWorkerExtension(AscendSafeLifecycle, vLLMColocateWorkerExtension):
    """verl's worker extension with a guarded KV cache and weight loading that is right on every reload."""

    def ascend_safe_configure(
        self, kv_release: str | Sequence[str], weight_path: str | Sequence[str], verify: str
    ) -> dict[str, Any]:
        """See `AscendSafeLifecycle`; also reports what the plug-in has `registered` in this process, and how `experts`
        may come: `apart`, or merged, a layer's as one tensor or in `slices` that fit into a bucket."""
        report = super().ascend_safe_configure(kv_release, weight_path, verify)
        merged = self._ascend_safe_path() != "verl" and merged_experts.come_merged(
            self.model_runner.vllm_config.model_config
        )
        return {**report, "registered": list(registration.registered), "experts": "slices" if merged else "apart"}

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
            rendezvous: the sync's name on every node, if the weights come by our transport; `None` if by verl's.
            timeout: seconds that our transport waits for the trainer to come, and to send the next bucket.

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
            self.ascend_safe_restore_kernel_format()
            return
        beyond = {
            "LoRA adapters": bool(peft_config),
            "quantized weights": self.model_runner.vllm_config.quant_config is not None,
            "a drafter": self._has_drafter(),
        }
        found = [what for what, there in beyond.items() if there]
        if found:
            raise WeightSyncError(
                f"The weight sync of {' and '.join(found)} is not supported on this platform "
                f"(weight path {self._ascend_safe_path()}): train without"
            )
        # vLLM's CPU worker has its device; some others leave it unset (verl 0.9.1, vllm_rollout/utils.py:243).
        device = kv_cache.device_of(self)

        def receive(load: weight_sync.Loader) -> dict[str, Any]:
            # No copies: the bracket keeps nothing of what it is given (`layerwise` copies by itself).
            name = on_node(rendezvous or "", os.environ[NODE_VARIABLE])
            came = receive_weights(name, load, rank=int(self.rank), device=device, copy=False, timeout=timeout)
            return {"transfer_seconds": came.seconds, "checksum": came.checksum}

        def receive_by_verl(load: weight_sync.Loader) -> None:
            from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver

            receiver = BucketedWeightReceiver(zmq_handle=self._get_zmq_handle(), device=device, use_shm=use_shm)
            failures: list[Exception] = []

            def on_bucket_received(weights: list[NamedTensor], is_last: bool = False) -> None:
                # verl 0.8.0 does not say which bucket is the last.  Nor is it needed: what follows comes after all.
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

    def _get_zmq_handle(self) -> str:
        """Where this worker meets the trainer by verl's own transport; the adapter adds the node as well."""
        return verls_handle_on(os.environ[NODE_VARIABLE], super()._get_zmq_handle())

    def _has_drafter(self) -> bool:
        """Return whether verl syncs a drafter as well; verl 0.7.1 leaves every drafter as it was made."""
        if hasattr(vLLMColocateWorkerExtension, "_use_mtp_drafter_weight_sync"):
            return bool(self._use_mtp_drafter_weight_sync())
        speculative = self.model_runner.vllm_config.speculative_config
        return speculative is not None and speculative.method != "ngram"
