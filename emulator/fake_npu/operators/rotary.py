"""Rotary position embeddings.

Stands in for: aclnnRotaryPositionEmbedding and its Grad, aclnnRopeWithSinCosCache, aclnnApplyRotaryPosEmb, ATB's
RopeOperation.
Leaves out: the modes "quarter" and "interleave-half"; npu_mrope's cache mode "interleave"; npu_rotary_mul's `rotate`.

Who calls them:
    _npu_rotary_embedding     vllm-ascend 0.11 to 0.23 ops/rotary_embedding.py
    npu_mrope                 vllm-ascend 0.28 and 0.30 ops/rotary_embedding.py, for plain rotary embeddings too
    npu_apply_rotary_pos_emb  vllm-ascend 0.11 and 0.13 ops/rotary_embedding.py, for heads of 128
    npu_rotary_mul            verl 0.9.1 models/transformers/npu_patch.py
    npu_rotary_mul_backward   torch-npu's derivative of npu_rotary_mul, under verl's patched models
"""

from __future__ import annotations

import torch

from .registry import implements, leave_out


def rotate(x: torch.Tensor, mode: str) -> torch.Tensor:
    """The partner of each element of the last axis.

    "half": (-x[D/2:], x[:D/2]).  "interleave": each pair (a, b) becomes (-b, a).
    """
    if mode == "half":
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def rotate_back(x: torch.Tensor, mode: str) -> torch.Tensor:
    """The transpose of `rotate`, which its gradient needs."""
    return -rotate(x, mode)


def known_mode(operator: str, rotary_mode: str | None) -> str:
    """`rotary_mode` as "half" or "interleave"; NotImplementedError for another."""
    if rotary_mode in (None, "half"):
        return "half"
    if rotary_mode in ("interleave", "interleaved"):  # vllm-ascend 0.28 passes "interleaved" to npu_mrope
        return "interleave"
    leave_out(operator, rotary_mode=rotary_mode)


@implements("npu::npu_rotary_mul")
def npu_rotary_mul(input: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, rotary_mode: str = "half") -> torch.Tensor:
    """input * r1 + rotate(input) * r2, in fp32, of input's dtype; r1 (cosines) and r2 (sines) broadcast to input.

    Source: "torch_npu.npu_rotary_mul", Ascend Extension for PyTorch API reference; aclnnRotaryPositionEmbedding.
    """
    mode = known_mode("npu::npu_rotary_mul", rotary_mode)
    wide = input.float()
    return (wide * r1.float() + rotate(wide, mode) * r2.float()).to(input.dtype)


@implements("npu::npu_rotary_mul_backward")
def npu_rotary_mul_backward(
    grad: torch.Tensor, input: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, rotary_mode: str = "half"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients with respect to input, r1 and r2, each of its tensor's shape and dtype.

    Source: aclnnRotaryPositionEmbeddingGrad.
    """
    mode = known_mode("npu::npu_rotary_mul_backward", rotary_mode)
    wide, dy = input.float(), grad.float()
    dx = dy * r1.float() + rotate_back(dy * r2.float(), mode)
    dr1 = (dy * wide).sum_to_size(r1.shape)
    dr2 = (dy * rotate(wide, mode)).sum_to_size(r2.shape)
    return dx.to(input.dtype), dr1.to(r1.dtype), dr2.to(r2.dtype)


def embed(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, head_size: int, mode: str) -> torch.Tensor:
    """Rotate the first `2 * cos.shape[-1]` elements of each head of x (tokens, heads * head_size), in fp32.

    cos and sin have (tokens, rotary dimensions / 2).  Returns x's shape and dtype.
    """
    heads = x.reshape(x.shape[0], -1, head_size).float()
    rotary = 2 * cos.shape[-1]
    if mode == "half":
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    else:
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    turned, rest = heads[..., :rotary], heads[..., rotary:]
    turned = turned * cos.float().unsqueeze(1) + rotate(turned, mode) * sin.float().unsqueeze(1)
    return torch.cat((turned, rest), -1).to(x.dtype).reshape(x.shape)


@implements("npu::npu_mrope")
def npu_mrope(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    head_size: int,
    mrope_section: list[int] | None = None,
    rotary_mode: str | None = "half",
    cache_mode: str | None = "default",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary embedding by position, plain or multimodal; returns new query and key (tokens, heads * head_size).

    cos_sin_cache (positions, rotary dimensions): cosines, then sines.  positions (tokens,) for the plain one, where
    mrope_section is None or all 0; (3, tokens) for the multimodal one: frequencies of section i use positions[i].

    Source: "torch_npu.npu_mrope", Ascend Extension for PyTorch API reference; aclnnRopeWithSinCosCache.
    """
    mode = known_mode("npu::npu_mrope", rotary_mode)
    if cache_mode not in (None, "default"):
        leave_out("npu::npu_mrope", cache_mode=cache_mode)
    cos, sin = cos_sin_cache[positions.long()].chunk(2, -1)
    if mrope_section and any(mrope_section):
        cos = torch.cat([part[i] for i, part in enumerate(cos.split(mrope_section, -1))], -1)
        sin = torch.cat([part[i] for i, part in enumerate(sin.split(mrope_section, -1))], -1)
    elif positions.dim() != 1:
        raise ValueError(f"npu::npu_mrope: positions {tuple(positions.shape)} need an mrope_section")
    return embed(query, cos, sin, head_size, mode), embed(key, cos, sin, head_size, mode)


@implements("atb::_npu_rotary_embedding")
def npu_rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox_style: bool,
) -> None:
    """Rotary embedding in place.  query and key (tokens, heads * head_size); head_size is the rotary dimension.

    Source: vllm-ascend 0.11 to 0.23 ops/rotary_embedding.py; ATB "RopeOperation".
    """
    cos, sin = cos_sin_cache[positions.flatten().long()].chunk(2, -1)
    mode = "half" if is_neox_style else "interleave"
    for x in (query, key):
        x.copy_(embed(x.reshape(positions.numel(), -1), cos, sin, head_size, mode).view(x.shape))


@implements("npu::npu_apply_rotary_pos_emb")
def npu_apply_rotary_pos_emb(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str = "BSND",
    rotary_mode: str = "half",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary embedding in place (vllm-ascend 0.11 drops what it returns); returns query and key.

    query and key (B, S, heads, D), cos and sin (B, S, 1, D).  torch-npu before 2.10 calls this layout "BSH".

    Source: "torch_npu.npu_apply_rotary_pos_emb", Ascend Extension for PyTorch API reference; aclnnApplyRotaryPosEmb.
    """
    operator = "npu::npu_apply_rotary_pos_emb"
    mode = known_mode(operator, rotary_mode)
    if layout not in ("BSH", "BSND") or query.dim() != 4:
        leave_out(operator, layout=layout, query=query)
    for x in (query, key):
        wide = x.float()
        x.copy_(wide * cos.float() + rotate(wide, mode) * sin.float())
    return query, key
