"""The weights that verl's Megatron engine streams, from a real megatron-core model and mbridge, on a CPU.

    python megatron_trainer.py CHECKPOINT OUT [--tp N] [--ep N]

Builds the checkpoint's model in megatron-core with `tp` tensor and `ep` expert parallel ranks (gloo, a process each),
loads the checkpoint by mbridge, and writes what `bridge.export_weights` yields on rank 0 to OUT (torch.save: a list of
names and tensors).  That call is verl's (0.9.1, `get_per_tensor_param` with
`vanilla_mbridge`, workers/engine/megatron/transformer_impl.py).  Needs megatron-core and mbridge: `make megatron`.

What is not as on an accelerator: the layers are megatron-core's own, since Transformer Engine cannot be built without
CUDA.  Their parameters are hung where Transformer Engine's layers have them, for which mbridge knows names.  What is
gathered over the ranks, split and renamed is mbridge's own doing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

WITHOUT_CUDA = {
    "use_cpu_initialization": True,
    # Each of these needs Transformer Engine, Apex or a CUDA stream.
    **{"moe_grouped_gemm": False, "moe_shared_expert_overlap": False, "moe_token_dispatcher_type": "allgather"},
    **{
        "persist_layer_norm": False,
        "bias_activation_fusion": False,
        "variable_seq_lengths": False,
        "sequence_parallel": False,
    },
}


def build(checkpoint: Path) -> tuple[Any, Any]:
    """mbridge's bridge for a checkpoint, and this rank's part of the model with the checkpoint's weights."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from transformers import AutoConfig
    from verl.models.mcore.mbridge import AutoBridge

    config = AutoConfig.from_pretrained(checkpoint)
    # Where transformers 4 has it, and mbridge 0.15.1 looks for it.
    config.rope_theta = config.rope_parameters["rope_theta"]
    bridge = AutoBridge.from_config(config, dtype=torch.bfloat16)
    # A shared expert of Qwen2-MoE has a gate: mbridge 0.15.1 does not say so to megatron-core 0.16, a user has to, by
    # verl's `override_transformer_config`.
    gate = bool(getattr(config, "shared_expert_intermediate_size", 0))
    bridge.set_extra_args(**WITHOUT_CUDA, moe_shared_expert_gate=gate)
    bridge.has_vp_stage = False
    spec = get_gpt_decoder_block_spec(bridge.config, use_transformer_engine=False)
    bridge._get_transformer_layer_spec = lambda stage: spec
    model = bridge._model_provider([])(pre_process=True, post_process=True).bfloat16()
    for layer in model.decoder.layers:
        _hang_as_transformer_engine_does(layer)
    bridge.load_weights([model], str(checkpoint))
    return bridge, model


def _hang_as_transformer_engine_does(layer: Any) -> None:
    """The input norm within the linear layer after it, and the experts' weights in two modules, numbered."""
    projection = layer.self_attention.linear_qkv
    projection._parameters = {"layer_norm_weight": layer.input_layernorm.weight, **projection._parameters}
    layer.input_layernorm = torch.nn.Identity()
    experts = layer.mlp.experts
    for name in ("linear_fc1", "linear_fc2"):
        grouped = torch.nn.Module()
        for number, expert in enumerate(experts.local_experts):
            grouped.register_parameter(f"weight{number}", getattr(expert, name).weight)
        setattr(experts, name, grouped)
    del experts.local_experts


def _rank(rank: int, tp: int, ep: int, rendezvous: str, checkpoint: Path, out: Path) -> None:
    torch.set_num_threads(1)
    world = max(tp, ep)
    # The tensor parallel layers ask for these.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    from megatron.core import parallel_state

    # What is left over of the ranks shares the experts' tensors, which is megatron-core's default.
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=world // ep
    )
    bridge, model = build(checkpoint)
    stream = [(name, tensor.detach()) for name, tensor in bridge.export_weights([model])]
    if rank == 0:
        torch.save(stream, out)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel ranks")
    parser.add_argument("--ep", type=int, default=1, help="expert parallel ranks")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{folder}/rendezvous"
        spawn = multiprocessing.get_context("spawn")
        arguments = (options.tp, options.ep, rendezvous, options.checkpoint, options.out)
        ranks = [spawn.Process(target=_rank, args=(rank, *arguments)) for rank in range(max(options.tp, options.ep))]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    raise SystemExit(max(process.exitcode or 0 for process in ranks))


if __name__ == "__main__":
    main()
