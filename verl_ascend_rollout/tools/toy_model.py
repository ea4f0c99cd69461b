"""Qwen1.5-MoE at any size: the configuration and the tensors of a checkpoint, for tests, benches and smoke runs.

A toy has the parts of Qwen1.5-MoE-A2.7B that make its weight sync hard (60 routed experts of which 4 are chosen, a
gated shared expert, qkv biases, no tied embeddings); only its widths, its depth and its vocabulary are cut down.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

HEAD_SIZE = 64
"""One that vLLM's attention has kernels for on every platform (CPU: 32, 64, 80, ...; vLLM 0.28, cpu_attn.py)."""

BLOCK = 64
"""What widths are multiples of: vLLM's x86 kernels pack expert weights in blocks of 32 (vLLM 0.28, cpu_moe.py)."""

BYTES_PER_ELEMENT = 2


@dataclass(frozen=True)
class Geometry:
    """The sizes of a Qwen2-MoE model.  The defaults are those of Qwen1.5-MoE-A2.7B (its config.json).

    Attributes:
        layers, experts, hidden, moe_intermediate, shared_intermediate, vocabulary: counts and widths, in elements.
        head_size: of each attention head; as many heads as fill `hidden`, for keys and values as well.
        positions: the longest sequence, in tokens.
    """

    layers: int = 24
    experts: int = 60
    hidden: int = 2048
    moe_intermediate: int = 1408
    shared_intermediate: int = 5632
    vocabulary: int = 151936
    head_size: int = HEAD_SIZE
    positions: int = 512

    def tensors(self, merged: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor of the checkpoint, as Qwen1.5-MoE's own has them (linear: [out, in]).

        Args:
            merged: as transformers 5 has them: the experts of a layer in two.
        """
        hidden = self.hidden
        yield "model.embed_tokens.weight", (self.vocabulary, hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.input_layernorm.weight", (hidden,)
            yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
            for projection in ("q_proj", "k_proj", "v_proj"):
                yield f"{prefix}.self_attn.{projection}.weight", (hidden, hidden)
                yield f"{prefix}.self_attn.{projection}.bias", (hidden,)
            yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
            yield f"{prefix}.mlp.gate.weight", (self.experts, hidden)
            yield f"{prefix}.mlp.shared_expert_gate.weight", (1, hidden)
            if merged:
                yield f"{prefix}.mlp.experts.gate_up_proj", (self.experts, 2 * self.moe_intermediate, hidden)
                yield f"{prefix}.mlp.experts.down_proj", (self.experts, hidden, self.moe_intermediate)
            apart = range(0 if merged else self.experts)
            experts = [(f"experts.{expert}", self.moe_intermediate) for expert in apart]
            for name, width in [*experts, ("shared_expert", self.shared_intermediate)]:
                yield f"{prefix}.mlp.{name}.gate_proj.weight", (width, hidden)
                yield f"{prefix}.mlp.{name}.up_proj.weight", (width, hidden)
                yield f"{prefix}.mlp.{name}.down_proj.weight", (hidden, width)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocabulary, hidden)

    def bytes(self) -> int:
        """Return the bytes of the checkpoint in bf16."""
        return sum(math.prod(shape) for _, shape in self.tensors()) * BYTES_PER_ELEMENT

    def config(self) -> dict[str, Any]:
        """config.json: the keys of Qwen/Qwen1.5-MoE-A2.7B."""
        heads = self.hidden // self.head_size
        return {
            "architectures": ["Qwen2MoeForCausalLM"],
            "model_type": "qwen2_moe",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.shared_intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "moe_intermediate_size": self.moe_intermediate,
            "shared_expert_intermediate_size": self.shared_intermediate,
            "num_experts": self.experts,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": self.positions,
            "max_window_layers": self.layers,
            "use_sliding_window": False,
            "rope_theta": 1000000.0,
            "attention_dropout": 0.0,
            "router_aux_loss_coef": 0.001,
            "initializer_range": 0.02,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


def scaled_to(size: int, layers: int = Geometry.layers, experts: int = Geometry.experts) -> Geometry:
    """Qwen1.5-MoE with its widths scaled down together until the checkpoint takes at most `size` bytes.

    Raises:
        ValueError: not even the smallest widths are small enough.
    """
    full = Geometry()
    for hidden in range(full.hidden, 0, -BLOCK):
        scale = hidden / full.hidden
        geometry = dataclasses.replace(
            full,
            layers=layers,
            experts=experts,
            hidden=hidden,
            moe_intermediate=_blocks(full.moe_intermediate * scale),
            shared_intermediate=_blocks(full.shared_intermediate * scale),
            vocabulary=_blocks(full.vocabulary * scale),
        )
        if geometry.bytes() <= size:
            return geometry
    raise ValueError(f"a model of {layers} layers and {experts} experts takes {geometry.bytes()} bytes at least")


def _blocks(width: float) -> int:
    return max(BLOCK, round(width / BLOCK) * BLOCK)
