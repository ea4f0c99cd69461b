"""One rank of verl's FSDP engine: fsdp_stream.py MODEL OUT, with torchrun's variables set.

Writes what the engine gives a rollout: the stream as whoever iterates gets it, and with experts merged.
"""

from __future__ import annotations

import os
import sys

import torch
import verl  # noqa: F401 - loads the plug-in, as in a job
from torch.distributed import destroy_process_group, init_process_group
from verl.trainer.config import CheckpointConfig
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine import EngineRegistry

from verl_ascend_rollout.integration.expert_stream import ExpertStream


def main(path: str, out: str) -> None:
    """Build the engine, and write its streams; what rank 0 writes is compared."""
    init_process_group("gloo")
    model = HFModelConfig(
        path=path, load_tokenizer=False, use_remove_padding=False, override_config={"attn_implementation": "eager"}
    )
    engine = EngineRegistry.new(
        model_type="language_model",
        backend="fsdp2",
        model_config=model,
        engine_config=FSDPEngineConfig(strategy="fsdp2", use_torch_compile=False),
        optimizer_config=FSDPOptimizerConfig(lr=1e-3),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    streams = {}
    for form in ("apart", "merged"):
        stream, _ = engine.get_per_tensor_param(base_sync_done=True)
        assert isinstance(stream, ExpertStream), type(stream)
        pairs = stream if form == "apart" else stream.merged(largest=1 << 30, slices=False)
        streams[form] = [(name, tensor.clone()) for name, tensor in pairs]
    if os.environ["RANK"] == "0":
        torch.save(streams, out)
    destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
