"""The zoo: one line a family, with the settings that make it tiny and keep what is particular about it.

A family is here for what it does with its weights, which its line says.  Those that vLLM 0.28 has no code for (dots1,
starcoder2) run on its Transformers backend.  Not here, since vLLM 0.28 on a CPU loads none of them, with us or without:
DBRX (KeyError on its own published names), ExaoneMoE, LFM2 (want settings that transformers 5.10 does not have), Bamba
(dropped in 0.24), Qwen3.5-MoE (imports torchvision).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

StateDict = Literal["published", "merged"]


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        name: what the tests call it.
        model_type: transformers' name of it.
        settings: of its configuration.
        state_dict: how transformers 5 names its weights in memory: as they are `published`, or with the experts of a
            layer `merged` (and sometimes other names beside them).
        dtypes: in which vLLM runs it.
        engine: more of vLLM's arguments.
    """

    name: str
    model_type: str
    settings: dict[str, Any]
    state_dict: StateDict = "published"
    dtypes: tuple[str, ...] = ("bfloat16", "float16")
    engine: dict[str, Any] = field(default_factory=dict)


LAYER = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
SHAPE = {
    "vocab_size": 500,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    **LAYER,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
EXPERTS = {"intermediate_size": 256, "moe_intermediate_size": 64, "num_experts_per_tok": 2}
GROUPS = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
MLA = {"kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32, "num_key_value_heads": 4}
LOCAL_EXPERTS = {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 64}
DELTA_NET = {
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 32},
    **{"linear_value_head_dim": 32, "linear_conv_kernel_dim": 4},
    "layer_types": ["linear_attention", "full_attention"],
}
SLIDING = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
TIED = {"tie_word_embeddings": True}


def _decoder(*without: str, **settings: Any) -> dict[str, Any]:
    """A decoder of two layers; `without`: settings that this family's configuration computes or does not have."""
    return {key: value for key, value in {**SHAPE, **TOKENS, **settings}.items() if key not in without}


FAMILIES = (
    # Mixtures of experts.
    Family("qwen3_moe", "qwen3_moe", _decoder(**EXPERTS, num_experts=8, norm_topk_prob=True), "merged"),
    # Experts whose width no kernel takes: vLLM pads them to 64.
    Family(
        "qwen3_moe_padded",
        "qwen3_moe",
        _decoder(**{**EXPERTS, "moe_intermediate_size": 48, "num_experts": 4}),
        "merged",
    ),
    # A shared expert behind a gate of its own, q, k and v with biases.
    Family(
        "qwen2_moe",
        "qwen2_moe",
        _decoder("head_dim", **EXPERTS, num_experts=4, shared_expert_intermediate_size=64),
        "merged",
    ),
    # Published as w1, w2, w3; in memory gate_up_proj and another module's name.
    Family("mixtral", "mixtral", _decoder(**LOCAL_EXPERTS), "merged"),
    # MLA, whose kv_b_proj is kept twice more, in other shapes (W_UV, W_UK_T).
    Family(
        "deepseek_v2",
        "deepseek_v2",
        _decoder("head_dim", **{**EXPERTS, **GROUPS, "n_group": 1}, **MLA, q_lora_rank=64, topk_method="greedy"),
        "merged",
    ),
    # The same without low-rank queries; a correction bias of the router that is no parameter in transformers.
    Family(
        "deepseek_v3",
        "deepseek_v3",
        _decoder("head_dim", **EXPERTS, **GROUPS, **MLA, q_lora_rank=None, topk_method="noaux_tc"),
        "merged",
    ),
    # Experts published merged, interleaved and transposed, with biases; attention sinks.
    Family("gpt_oss", "gpt_oss", _decoder(**LOCAL_EXPERTS, **SLIDING)),
    Family("glm4_moe", "glm4_moe", _decoder(**EXPERTS, **GROUPS, use_qk_norm=True, attention_bias=True), "merged"),
    # vLLM's loader takes the whole stream before it writes anything.
    Family("granitemoe", "granitemoe", _decoder("head_dim", **LOCAL_EXPERTS)),
    # Mamba-2 and attention, experts published merged.
    Family(
        "granitemoehybrid",
        "granitemoehybrid",
        _decoder("head_dim", **LOCAL_EXPERTS, **MAMBA, shared_intermediate_size=64, layer_types=["mamba", "attention"]),
    ),
    # Gated delta net: convolutions, A_log, dt_bias; qkvz and ba in one tensor each.
    Family(
        "qwen3_next",
        "qwen3_next",
        _decoder(**EXPERTS, **DELTA_NET, num_experts=4, shared_expert_intermediate_size=64),
        "merged",
    ),
    Family(
        "olmoe", "olmoe", _decoder("head_dim", intermediate_size=64, num_experts=4, num_experts_per_tok=2), "merged"
    ),
    Family("dots1", "dots1", _decoder(**EXPERTS, **GROUPS), "merged"),
    Family(
        "ernie4_5_moe",
        "ernie4_5_moe",
        _decoder(
            **{"intermediate_size": 256, "moe_intermediate_size": 64, "moe_num_experts": 4, "moe_k": 2},
            **{"moe_num_shared_experts": 1, "moe_layer_start_index": 1, "moe_layer_end_index": 1},
        ),
        "merged",
    ),
    Family(
        "hunyuan_v1_moe",
        "hunyuan_v1_moe",
        _decoder(
            **{"intermediate_size": 64, "moe_intermediate_size": 64, "num_experts": 4, "moe_topk": 2},
            **{"num_shared_expert": 1, "use_mixed_mlp_moe": True, "use_qk_norm": True},
        ),
        "merged",
    ),
    Family(
        "minimax_m2",
        "minimax_m2",
        _decoder(**LOCAL_EXPERTS, rotary_dim=16, use_qk_norm=True, scoring_func="sigmoid", use_routing_bias=True),
        "merged",
    ),
    # Mamba-1, attention and experts; experts merged in memory under feed_forward.
    Family(
        "jamba",
        "jamba",
        _decoder(
            *("head_dim", "max_position_embeddings"),
            **{"intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "use_mamba_kernels": False},
            **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
            **{"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 8},
        ),
        "merged",
    ),
    # Short convolutions, a bias of the router.
    Family(
        "lfm2_moe",
        "lfm2_moe",
        _decoder(
            "head_dim",
            **{**TIED, **EXPERTS, "num_experts": 4, "num_dense_layers": 1, "use_expert_bias": True, "conv_L_cache": 4},
            layer_types=["conv", "full_attention"],
        ),
        "merged",
    ),
    # Experts published merged and transposed.
    Family(
        "llama4",
        "llama4_text",
        _decoder(
            **{**LOCAL_EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 128},
            **{"interleave_moe_layer_step": 1, "attention_chunk_size": 64},
        ),
    ),
    Family(
        "cohere2_moe",
        "cohere2_moe",
        _decoder(
            "head_dim", **{**TIED, **SLIDING, "intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
        ),
        "merged",
    ),
    Family(
        "afmoe",
        "afmoe",
        _decoder(
            **{**EXPERTS, "num_experts": 4, "num_shared_experts": 1, "num_dense_layers": 1},
            **{"sliding_window": 64, "global_attn_every_n_layers": 2},
        ),
        "merged",
    ),
    # Dense.
    Family("llama_tied", "llama", _decoder(**TIED, intermediate_size=192)),
    # One head of k and v, biases everywhere, a vocabulary that is padded.
    Family(
        "llama_bias",
        "llama",
        _decoder(num_key_value_heads=1, intermediate_size=96, attention_bias=True, mlp_bias=True, vocab_size=333),
    ),
    Family("qwen2", "qwen2", _decoder("head_dim", **TIED, intermediate_size=192)),
    # Norms that are kept less one.  Neither it nor GLM-4 runs in fp16.
    Family(
        "gemma3",
        "gemma3_text",
        _decoder(**TIED, **SLIDING, intermediate_size=192, query_pre_attn_scalar=32),
        dtypes=("bfloat16",),
    ),
    # qkv_proj and gate_up_proj are one tensor each in the checkpoint.
    Family("phi3", "phi3", _decoder("head_dim", intermediate_size=192)),
    Family("glm4", "glm4", _decoder(intermediate_size=192, attention_bias=True), dtypes=("bfloat16",)),
    Family("starcoder2", "starcoder2", _decoder("head_dim", intermediate_size=192, use_bias=True)),
    Family("exaone4", "exaone4", _decoder(**SLIDING, intermediate_size=192)),
    # LayerNorm with 1 added, biases.
    Family("nemotron", "nemotron", _decoder(intermediate_size=192, attention_bias=True, mlp_bias=True)),
    # Scalars of an activation that is trained.
    Family("apertus", "apertus", _decoder("head_dim", intermediate_size=192)),
    # Linear weights that are stored transposed.
    Family("gpt2", "gpt2", {**TOKENS, "vocab_size": 500, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    # query_key_value in one tensor, head by head: the loader permutes.
    Family("gpt_neox", "gpt_neox", _decoder("head_dim", "num_key_value_heads", intermediate_size=192)),
    # Biases everywhere, the head's too.
    Family("phi", "phi", _decoder("head_dim", num_key_value_heads=4, intermediate_size=512)),
    # The same on the Transformers backend, whose loader makes the head's bias anew.
    Family(
        "phi_by_transformers",
        "phi",
        _decoder("head_dim", num_key_value_heads=4, intermediate_size=512),
        engine={"model_impl": "transformers"},
    ),
    Family("gptj", "gptj", {**TOKENS, "vocab_size": 500, "n_embd": 128, "n_layer": 2, "n_head": 4, "rotary_dim": 16}),
    # Positions that are learnt, the embedding narrower than the layers.
    Family(
        "opt",
        "opt",
        {
            **{**TOKENS, "vocab_size": 500, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"ffn_dim": 192, "max_position_embeddings": 512, "word_embed_proj_dim": 64},
        },
    ),
    # State spaces: A is kept as -exp(A_log), in_proj is one tensor of five parts.
    Family(
        "mamba2",
        "mamba2",
        {
            **{**TOKENS, "vocab_size": 500, "hidden_size": 128, "num_hidden_layers": 2, "state_size": 16, "expand": 2},
            **{"conv_kernel": 4, "num_heads": 8, "head_dim": 32, "n_groups": 1, "chunk_size": 64},
        },
    ),
    # Attention and Mamba-2 beside each other in each layer.
    Family("falcon_h1", "falcon_h1", _decoder("head_dim", **MAMBA, intermediate_size=192, mamba_d_ssm=256)),
)

BY_NAME = {family.name: family for family in FAMILIES}

TIED_BY_DEFAULT = ("gpt2", "opt")
TIED_HEADS = tuple(
    family.name for family in FAMILIES if family.settings.get("tie_word_embeddings") or family.name in TIED_BY_DEFAULT
)
"""Families whose state_dict has the head beside the embedding, and whose files have one of them."""

MERGED = tuple(family.name for family in FAMILIES if family.state_dict == "merged")

TAKEN_MERGED = frozenset(
    {
        *("qwen3_moe", "qwen3_moe_padded", "qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "dots1"),
        *("qwen3_next", "olmoe", "hunyuan_v1_moe", "cohere2_moe", "afmoe"),
    }
)
"""Families whose merged experts have the names and layout that transformers 5.10 gives to all of Qwen2-MoE's kind (its
conversion_mapping.py): these syncs arrive.  Those of the other families do, or are refused."""
