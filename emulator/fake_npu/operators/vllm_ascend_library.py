"""The operators of vllm-ascend's own compiled library, torch.ops._C_ascend.

Stands in for: the kernels behind vllm_ascend_C.  Where the library is installed (the wheels of 0.11.0 to 0.23.0), its
schemas are used and its kernels replaced; where only sources are (release candidates), the schemas of the operators
that those call are defined, as csrc/torch_binding.cpp writes them.

Leaves out: every operator for quantisation, LoRA, MLA, sparse attention and speculative decoding.

Who calls them:
    moe_gating_top_k             0.13 ops/fused_moe/experts_selector.py; 0.18 to 0.30 device/device_op.py
    npu_add_rms_norm_bias        0.13 to 0.30 ops/layernorm.py
    npu_moe_init_routing_custom  0.13 ops/fused_moe/token_dispatcher.py; 0.18 and 0.23 device/device_op.py
    npu_apply_top_k_top_p        0.18 sample/sampler.py
    rotary_embedding             0.11 and 0.13 ops/rotary_embedding.py, fp16 only
"""

from __future__ import annotations

import contextlib
import importlib

import torch

from . import registry
from .moe import gate, init_routing
from .norms import normalise
from .registry import implements
from .rotary import embed
from .sampling import npu_top_k_top_p

SCHEMAS = (
    "moe_gating_top_k(Tensor x, int k, int k_group, int group_count, int group_select_mode, int renorm, int norm_type, "
    "bool out_flag, float routed_scaling_factor, float eps, Tensor? bias_opt=None) "
    "-> (Tensor y, Tensor expert_idx, Tensor out)",
    "npu_add_rms_norm_bias(Tensor x1, Tensor x2, Tensor gamma, Tensor? beta=None, float epsilon=1e-6) "
    "-> (Tensor y, Tensor rstd, Tensor x)",
)
"""Schemas to define without the compiled library.  Source: vllm-ascend 0.28.0rc1, 0.30.0rc2 csrc/torch_binding.cpp."""

KEPT = ("device_print", "device_print_tensor", "swap_blocks", "swap_blocks_batch", "weak_ref_tensor")
"""Operators whose own kernels stay: they copy memory or wrap a pointer, and launch nothing."""

_fragments: list[torch.library.Library] = []


def install() -> bool:
    """Register the library's operators; True if the compiled library with its operators is there.  Idempotent.

    The module vllm_ascend_C may also hold nothing but the allocator of sleep mode (a stack built from sources).
    """
    with contextlib.suppress(ModuleNotFoundError):  # a library that is there and does not load must say so
        importlib.import_module("vllm_ascend.vllm_ascend_C")
    compiled = any(
        name.startswith("_C_ascend::") for name in torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1")
    )
    for schema in SCHEMAS:
        if registry.schema_of(f"_C_ascend::{schema.partition('(')[0]}") is None:
            fragment = torch.library.Library("_C_ascend", "FRAGMENT")
            fragment.define(schema)
            _fragments.append(fragment)
    registry.register(("_C_ascend",))
    registry.refuse_the_rest(("_C_ascend",), KEPT)
    torch.ops._C_ascend.__class__ = FakeLibraryNamespace
    return compiled and not _fragments


class FakeLibraryNamespace(torch._ops._OpNamespace):
    """torch.ops._C_ascend, whose AttributeError for an operator without a schema says where to add it."""

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(
                f"_C_ascend::{name} has no reference version in the stand-in CANN: add one, with its schema, to "
                f"{registry.FOLDER}/vllm_ascend_library.py"
            ) from None


@implements(
    "_C_ascend::moe_gating_top_k",
    ignored={
        "k_group": "groups to choose from: one",
        "group_select_mode": "how to choose groups: one",
        "out_flag": "the scores are always returned",
    },
)
def moe_gating_top_k(
    x: torch.Tensor,
    k: int,
    group_count: int,
    renorm: int,
    norm_type: int,
    routed_scaling_factor: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See moe.gate.  Source: vllm-ascend csrc/moe/moe_gating_top_k; aclnnMoeGatingTopK."""
    return gate("_C_ascend::moe_gating_top_k", x, k, group_count, renorm, norm_type, routed_scaling_factor, eps)


@implements("_C_ascend::npu_add_rms_norm_bias")
def npu_add_rms_norm_bias(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor | None = None, epsilon: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """npu_add_rms_norm, plus beta (D,) if given: (y, rstd fp32, x1 + x2).

    Source: vllm-ascend csrc/moe/add_rms_norm_bias.
    """
    x = x1 + x2
    y, rstd = normalise(x, gamma, epsilon)
    return (y if beta is None else y + beta.to(y.dtype)), rstd, x


@implements("_C_ascend::npu_moe_init_routing_custom", ignored={"expert_capacity": "only for drop_pad_mode 1"})
def npu_moe_init_routing_custom(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    scale: torch.Tensor | None = None,
    active_num: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = 0,
    active_expert_range: list[int] = (),  # type: ignore[assignment]
    row_idx_type: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See moe.init_routing.  Source: vllm-ascend 0.13 to 0.23 csrc/moe_init_routing_custom."""
    return init_routing(
        "_C_ascend::npu_moe_init_routing_custom",
        x,
        expert_idx,
        scale,
        active_num,
        expert_num,
        drop_pad_mode,
        expert_tokens_num_type,
        expert_tokens_num_flag,
        quant_mode,
        active_expert_range,
        row_idx_type,
    )


@implements("_C_ascend::npu_apply_top_k_top_p")
def npu_apply_top_k_top_p(
    logits: torch.Tensor, p: torch.Tensor | None = None, k: torch.Tensor | None = None
) -> torch.Tensor:
    """See sampling.npu_top_k_top_p.  Source: vllm-ascend 0.18 csrc/apply_top_k_top_p_custom."""
    return npu_top_k_top_p(logits, p, k)


@implements("_C_ascend::rotary_embedding")
def rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary embedding of query and key (tokens, heads * head_size), or with heads apart; returns new tensors.

    Source: vllm-ascend 0.11 csrc/torch_binding.cpp.
    """
    cos, sin = cos_sin_cache[positions.flatten().long()].chunk(2, -1)
    mode = "half" if is_neox else "interleave"
    turned = [embed(x.reshape(positions.numel(), -1), cos, sin, head_size, mode).view(x.shape) for x in (query, key)]
    return turned[0], turned[1]
