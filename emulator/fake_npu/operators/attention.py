"""Attention.

Stands in for: aclnnFusedInferAttentionScore (V1 to V4), aclnnFlashAttentionScore and its Grad, ATB's
SelfAttentionOperation and PagedAttentionOperation.
Leaves out: quantised keys and values, position shifts (pse), dropout, sinks, shared prefixes, MLA's split heads
(query_rope), ALiBi, the `.out` and workspace variants of graph capture.

Softmax and sums are in fp32.  Grouped heads: query head h reads key head h // (query heads / key heads).

Who calls them:
    npu_fused_infer_attention_score   vllm-ascend 0.11 attention/attention_v1.py (chunked prefill), 0.13 to 0.30 there
                                      for prefill and decode
    npu_fused_infer_attention_score_v2   vllm-ascend 0.18 to 0.30 attention/attention_v1.py, for models with sinks
    _npu_flash_attention              vllm-ascend 0.11 attention/attention_v1.py, prefill without cache
    _npu_flash_attention_qlens        vllm-ascend 0.11 attention/attention_v1.py, prefill with cache
    _npu_paged_attention              vllm-ascend 0.11 attention/attention_v1.py, decode; 0.13 to 0.30 there, for the
                                      batch sizes of pa_shape_list
    _npu_paged_attention_splitfuse    vllm-ascend 0.18 to 0.30: 310P only; older releases, chunked prefill
    npu_fusion_attention              Hugging Face integrations/npu_flash_attention.py (verl's trainer); vllm-ascend
                                      0.11 to 0.30 attention/attention_v1.py, for encoders
    npu_fusion_attention_grad         torch-npu's derivative of it
"""

from __future__ import annotations

import torch

from .registry import implements, leave_out, schema_of

NO_LIMIT = 2147483647


# --- the arithmetic, for one sequence ---------------------------------------------------------------------------------


def hidden_positions(
    operator: str,
    queries: int,
    keys: int,
    sparse_mode: int,
    mask: torch.Tensor | None,
    before: int = NO_LIMIT,
    after: int = NO_LIMIT,
    device: torch.device | None = None,
) -> torch.Tensor | None:
    """Which of the keys each query may not see, a bool tensor (queries, keys), or None for no limit.

    sparse_mode: 0, `mask` (1 hides) and the band from `before` keys back to `after` keys ahead of the query's own
    number; without a mask, nothing is hidden.  1, `mask` alone.  2, causal, aligned at the first query and key.
    3, causal, aligned at the last.  4, the band, aligned at the last.  2 to 4 have a compressed mask of 2048 x 2048 on
    the device, whose content is fixed: it is not read here, but must be given.

    Source: "sparse_mode" in aclnnFlashAttentionScoreV2 and aclnnFusedInferAttentionScoreV3.
    """
    if sparse_mode in (0, 1):
        if mask is None:
            return None
        if mask.shape[-2] < queries or mask.shape[-1] < keys:
            raise ValueError(f"{operator}: atten_mask {tuple(mask.shape)} for {queries} queries and {keys} keys")
        hidden = mask[:queries, :keys].bool()
        if sparse_mode == 1 or (before >= keys and after >= keys):
            return hidden
        return hidden | _outside_band(queries, keys, 0, before, after, mask.device)
    if sparse_mode not in (2, 3, 4):
        leave_out(operator, sparse_mode=sparse_mode)
    if mask is None and queries > 1:
        raise ValueError(f"{operator}: sparse_mode {sparse_mode} needs atten_mask, the compressed 2048 x 2048 one")
    if sparse_mode == 2:
        return _outside_band(queries, keys, 0, NO_LIMIT, 0, device)
    if sparse_mode == 3:
        return _outside_band(queries, keys, keys - queries, NO_LIMIT, 0, device)
    return _outside_band(queries, keys, keys - queries, before, after, device)


def _outside_band(
    queries: int, keys: int, shift: int, before: int, after: int, device: torch.device | None
) -> torch.Tensor:
    own = torch.arange(queries, device=device).unsqueeze(1) + shift
    key = torch.arange(keys, device=device).unsqueeze(0)
    return (key > own + after) | (key < own - before)


def probabilities(
    query: torch.Tensor, key: torch.Tensor, scale: float, hidden: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax over keys of query (S, H, D) times key (T, KH, D): (weights (H, S, T), maximum, sum, each (H, S)), fp32.

    A query that may see no key gets weights of 0.
    """
    key = _repeat_heads(key.float(), query.shape[1])
    scores = torch.einsum("shd,thd->hst", query.float(), key) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    if scores.shape[-1] == 0:
        nothing = scores.new_zeros(scores.shape[:2])
        return scores, nothing, nothing.clone()
    maximum = scores.amax(-1)
    maximum = torch.where(maximum == float("-inf"), 0.0, maximum)
    weights = torch.exp(scores - maximum.unsqueeze(-1))
    total = weights.sum(-1)
    return weights / torch.where(total == 0, 1.0, total).unsqueeze(-1), maximum, total


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, hidden: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of one sequence: (output (S, H, D) of query's dtype, softmax maximum (S, H), sum (S, H))."""
    weights, maximum, total = probabilities(query, key, scale, hidden)
    output = torch.einsum("hst,thd->shd", weights, _repeat_heads(value.float(), query.shape[1]))
    return output.to(query.dtype), maximum.t(), total.t()


def attend_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad: torch.Tensor,
    scale: float,
    hidden: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `attend` for query, key and value, of their shapes, in fp32."""
    heads, key_heads = query.shape[1], key.shape[1]
    weights, _, _ = probabilities(query, key, scale, hidden)
    wide_key, wide_value = _repeat_heads(key.float(), heads), _repeat_heads(value.float(), heads)
    dy = grad.float()
    dvalue = torch.einsum("hst,shd->thd", weights, dy)
    dweights = torch.einsum("shd,thd->hst", dy, wide_value)
    dscores = weights * (dweights - (dweights * weights).sum(-1, keepdim=True)) * scale
    dquery = torch.einsum("hst,thd->shd", dscores, wide_key)
    dkey = torch.einsum("hst,shd->thd", dscores, query.float())
    return dquery, _sum_heads(dkey, key_heads), _sum_heads(dvalue, key_heads)


def _repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)


def _sum_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.unflatten(1, (heads, -1)).sum(2)


# --- layouts ----------------------------------------------------------------------------------------------------------


def split(operator: str, x: torch.Tensor, layout: str, heads: int, ends: list[int] | None) -> list[torch.Tensor]:
    """The sequences of `x`, each a view (length, heads, head size).

    TND takes running sums `ends`; BSH, SBH, BSND and BNSD have equally long sequences.
    """
    if layout == "TND":
        if ends is None:
            raise ValueError(f"{operator}: layout TND needs the running sums of the sequence lengths")
        if ends and ends[-1] > x.shape[0]:
            raise ValueError(f"{operator}: sequences end at {ends[-1]}, but there are {x.shape[0]} tokens")
        x = x.view(x.shape[0], heads, -1)
        return [x[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    if layout == "BSH":
        return list(x.unflatten(-1, (heads, -1)))
    if layout == "SBH":
        return list(x.unflatten(-1, (heads, -1)).transpose(0, 1))
    if layout == "BSND":
        return list(x)
    if layout == "BNSD":
        return list(x.transpose(1, 2))
    leave_out(operator, input_layout=layout)


def join(parts: list[torch.Tensor], like: torch.Tensor, layout: str, heads: int) -> torch.Tensor:
    """The inverse of `split`: a new tensor of like's shape and dtype; tokens beyond the last sequence hold 0."""
    whole = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    ends = []
    total = 0
    for part in parts:
        total += part.shape[0]
        ends.append(total)
    for part, place in zip(parts, split("join", whole, layout, heads, ends), strict=True):
        place[: part.shape[0]] = part.to(whole.dtype)
    return whole


def whole_numbers(numbers: torch.Tensor | list[int] | None) -> list[int] | None:
    """A list of ints from a tensor, a list of ints, or None."""
    return None if numbers is None else [int(number) for number in numbers]


def pages(cache: torch.Tensor, table: torch.Tensor, length: int, block_size: int, key_heads: int) -> torch.Tensor:
    """The first `length` tokens (length, key heads, head size) of the blocks that `table` (blocks,) lists.

    cache: (blocks, block size, key heads * head size), or for the fused operators (blocks, key heads, block size, head
    size).
    """
    held = cache.shape[1] if cache.dim() == 3 else cache.shape[2]
    if held != block_size:
        raise ValueError(f"paged cache {tuple(cache.shape)} holds blocks of {held} tokens, not block_size={block_size}")
    blocks = cache[table[: -(-length // block_size)].long()]
    if blocks.dim() == 4:
        blocks = blocks.transpose(1, 2)
    else:
        blocks = blocks.unflatten(-1, (key_heads, -1))
    return blocks.flatten(0, 1)[:length]


# --- inference --------------------------------------------------------------------------------------------------------


@implements(
    "npu::npu_fused_infer_attention_score",
    ignored={"inner_precise": "speed against precision of the device's softmax"},
)
def npu_fused_infer_attention_score(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    atten_mask: torch.Tensor | None = None,
    actual_seq_lengths: list[int] | None = None,
    actual_seq_lengths_kv: list[int] | None = None,
    block_table: torch.Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = NO_LIMIT,
    next_tokens: int = NO_LIMIT,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    block_size: int = 0,
    softmax_lse_flag: bool = False,
    operator: str = "npu::npu_fused_infer_attention_score",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a batch, with keys and values given or in a paged cache: (output of query's shape, log-sum-exp).

    input_layout TND, BSH, BSND or BNSD.  Lengths: running sums for TND, one for each sequence else; of a paged cache,
    always one for each sequence.  The log-sum-exp is fp32, (T, heads, 1) for TND, (B, heads, S, 1) else, and empty
    unless asked for.  Tokens beyond the last sequence give 0.

    Source: "torch_npu.npu_fused_infer_attention_score", Ascend Extension for PyTorch API reference;
    aclnnFusedInferAttentionScoreV3.
    """
    key_heads = num_key_value_heads or num_heads
    lengths, key_lengths = whole_numbers(actual_seq_lengths), whole_numbers(actual_seq_lengths_kv)
    queries = split(operator, query, input_layout, num_heads, lengths)
    if input_layout != "TND" and lengths is not None:
        queries = [one[:length] for one, length in zip(queries, lengths, strict=False)]
    if block_table is None:
        keys = split(operator, key, input_layout, key_heads, key_lengths)
        values = split(operator, value, input_layout, key_heads, key_lengths)
        if input_layout != "TND" and key_lengths is not None:
            keys = [one[:length] for one, length in zip(keys, key_lengths, strict=False)]
            values = [one[:length] for one, length in zip(values, key_lengths, strict=False)]
    else:
        if key_lengths is None:
            raise ValueError(f"{operator}: a paged cache needs the key lengths")
        tables = list(zip(block_table, key_lengths, strict=False))[: len(queries)]
        keys = [pages(key, table, length, block_size, key_heads) for table, length in tables]
        values = [pages(value, table, length, block_size, key_heads) for table, length in tables]
    if len(keys) < len(queries):
        raise ValueError(f"{operator}: {len(queries)} query sequences, {len(keys)} key sequences")
    outputs, sums = [], []
    for number, one in enumerate(queries):
        hidden = hidden_positions(
            operator,
            one.shape[0],
            keys[number].shape[0],
            sparse_mode,
            _mask_of(operator, atten_mask, number, sparse_mode, input_layout),
            pre_tokens,
            next_tokens,
            query.device,
        )
        output, maximum, total = attend(one, keys[number], values[number], scale, hidden)
        outputs.append(output)
        sums.append((maximum + total.log()).unsqueeze(-1))
    attention = join(outputs, query, input_layout, num_heads)
    if not softmax_lse_flag:
        return attention, torch.empty(0, dtype=torch.float32, device=query.device)
    if input_layout == "TND":
        return attention, torch.cat(sums)
    return attention, torch.stack(sums).transpose(1, 2).contiguous()


def _mask_of(
    operator: str, mask: torch.Tensor | None, number: int, sparse_mode: int, layout: str
) -> torch.Tensor | None:
    """The (queries, keys) mask of sequence `number`: atten_mask may have a batch axis, and one of 1 for the heads."""
    if mask is None or sparse_mode in (2, 3, 4):
        return mask
    if layout == "TND":
        leave_out(operator, sparse_mode=sparse_mode, atten_mask=mask)
    if mask.dim() == 4:
        if mask.shape[1] != 1:
            leave_out(operator, atten_mask=mask)
        mask = mask[:, 0]
    if mask.dim() == 3:
        mask = mask[number if mask.shape[0] > 1 else 0]
    return mask


@implements(
    "npu::npu_fused_infer_attention_score_v2",
    ignored={"inner_precise": "speed against precision of the device's softmax"},
)
def npu_fused_infer_attention_score_v2(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    atten_mask: torch.Tensor | None = None,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    block_table: torch.Tensor | None = None,
    num_query_heads: int = 1,
    num_key_value_heads: int = 0,
    softmax_scale: float = 1.0,
    pre_tokens: int = NO_LIMIT,
    next_tokens: int = NO_LIMIT,
    input_layout: str = "BSH",
    sparse_mode: int = 0,
    block_size: int = 0,
    return_softmax_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """npu_fused_infer_attention_score under other argument names.

    Source: "torch_npu.npu_fused_infer_attention_score_v2", Ascend Extension for PyTorch API reference;
    aclnnFusedInferAttentionScoreV4.
    """
    return npu_fused_infer_attention_score(
        query,
        key,
        value,
        atten_mask,
        actual_seq_qlen,
        actual_seq_kvlen,
        block_table,
        num_query_heads,
        softmax_scale,
        pre_tokens,
        next_tokens,
        input_layout,
        num_key_value_heads,
        sparse_mode,
        block_size,
        return_softmax_lse,
        operator="npu::npu_fused_infer_attention_score_v2",
    )


@implements("atb::_npu_flash_attention")
def npu_flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    seq_len: torch.Tensor,
    scale_value: float,
    num_heads: int,
    num_kv_heads: int,
    out: torch.Tensor,
) -> None:
    """Self-attention of packed sequences of seq_len (batch,) tokens, into out; (tokens, heads, head size).

    mask (longest, longest): an entry other than 0 hides (vllm-ascend writes the lowest number for fp16, 1 for bf16).

    Source: vllm-ascend 0.11 attention/attention_mask.py; ATB "SelfAttentionOperation", PA_ENCODER.
    """
    operator = "atb::_npu_flash_attention"
    out_rows = out.view(out.shape[0], num_heads, -1)
    start = 0
    for length in seq_len.tolist():
        end = start + length
        if min(mask.shape[-2:]) < length:
            leave_out(operator, mask=mask)  # a compressed mask
        rows = query[start:end].view(length, num_heads, -1)
        keys, values = (x[start:end].view(length, num_kv_heads, -1) for x in (key, value))
        out_rows[start:end] = attend(rows, keys, values, scale_value, mask[..., :length, :length] != 0)[0]
        start = end


@implements("atb::_npu_flash_attention_qlens")
def npu_flash_attention_qlens(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    mask: torch.Tensor,
    seq_len: torch.Tensor,
    context_lens: torch.Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    out: torch.Tensor,
) -> None:
    """Causal attention of the last seq_len[i] of context_lens[i] cached tokens of each sequence, into out.

    mask is ATB's compressed causal mask (128 x 128), whose content is fixed: it is not read.
    Source: vllm-ascend 0.11 attention/attention_v1.py; ATB "SelfAttentionOperation", PREFIX_ENCODER.
    """
    if mask.shape[-2:] != (128, 128):
        leave_out("atb::_npu_flash_attention_qlens", mask=mask)
    _attend_pages(query, key_cache, value_cache, block_table, seq_len, context_lens, num_heads, scale_value, out)


@implements("atb::_npu_paged_attention_splitfuse")
def npu_paged_attention_splitfuse(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    mask: torch.Tensor,
    seq_len: torch.Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    out: torch.Tensor,
) -> None:
    """The same with a mask (tokens, longest) that has a row for each token, and must be the causal one.

    An entry other than 0 hides.  Source: ATB "PagedAttentionOperation", MASK_TYPE_SPEC.
    """
    operator = "atb::_npu_paged_attention_splitfuse"
    if mask.dim() != 2 or mask.shape[0] != query.shape[0] or mask.shape[1] < int(context_lens.max()):
        leave_out(operator, mask=mask)
    _attend_pages(query, key_cache, value_cache, block_table, seq_len, context_lens, num_heads, scale_value, out, mask)


@implements("atb::_npu_paged_attention", ignored={"workspace": "scratch memory of graph capture"})
def npu_paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Decode: each row of query (batch, heads, head size) sees the context_lens[i] tokens of its blocks; into out.

    Source: vllm-ascend 0.11 attention/attention_v1.py; ATB "PagedAttentionOperation".
    """
    ones = torch.ones_like(context_lens)
    _attend_pages(query, key_cache, value_cache, block_table, ones, context_lens, num_heads, scale_value, out)


def _attend_pages(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_lengths: torch.Tensor,
    key_lengths: torch.Tensor,
    heads: int,
    scale: float,
    out: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> None:
    """Causal attention (or `mask`'s) over caches of (blocks, block size, key heads, head size)."""
    block_size, key_heads = key_cache.shape[1], key_cache.shape[2]
    keys_flat, values_flat = key_cache.flatten(2), value_cache.flatten(2)
    out_rows = out.view(out.shape[0], heads, -1)
    start = 0
    for number, (queries, length) in enumerate(zip(query_lengths.tolist(), key_lengths.tolist(), strict=True)):
        end = start + queries
        key = pages(keys_flat, block_table[number], length, block_size, key_heads)
        value = pages(values_flat, block_table[number], length, block_size, key_heads)
        if mask is None:
            hidden = _outside_band(queries, length, length - queries, NO_LIMIT, 0, query.device)
        else:
            hidden = mask[start:end, :length] != 0
        rows = query[start:end].view(queries, heads, -1)
        out_rows[start:end] = attend(rows, key, value, scale, hidden)[0]
        start = end


# --- training ---------------------------------------------------------------------------------------------------------


@implements(
    "npu::npu_fusion_attention",
    ignored={
        "inner_precise": "speed against precision of the device's softmax",
        "gen_mask_parallel": "where the dropout mask is made",
        "sync": "where the dropout mask is made",
        "seed": "dropout",
        "offset": "dropout",
    },
)
def npu_fusion_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_num: int,
    input_layout: str,
    atten_mask: torch.Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = NO_LIMIT,
    next_tockens: int = NO_LIMIT,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    sparse_mode: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int, int]:
    """Training attention: (output, softmax maximum, softmax sum, nothing, seed, offset, mask size).

    input_layout TND (with running sums of the lengths), BSH, SBH, BSND or BNSD.  The maximum and the sum are fp32,
    (T, heads, 8) for TND, (B, heads, S, 8) else: eight copies, the device's block.

    Source: "torch_npu.npu_fusion_attention", Ascend Extension for PyTorch API reference; aclnnFlashAttentionScoreV2.
    """
    operator = "npu::npu_fusion_attention"
    if keep_prob != 1.0:
        leave_out(operator, keep_prob=keep_prob)
    queries, keys, values = _sequences(
        operator, (query, key, value), head_num, input_layout, actual_seq_qlen, actual_seq_kvlen
    )
    results = []
    for number, one in enumerate(queries):
        hidden = hidden_positions(
            operator,
            one.shape[0],
            keys[number].shape[0],
            sparse_mode,
            _mask_of(operator, atten_mask, number, sparse_mode, input_layout),
            pre_tockens,
            next_tockens,
            query.device,
        )
        results.append(attend(one, keys[number], values[number], scale, hidden))
    attention = join([output for output, _, _ in results], query, input_layout, head_num)
    maximum, total = (_softmax_statistic([result[i] for result in results], input_layout) for i in (1, 2))
    return attention, maximum, total, query.new_empty(0), 0, 0, 0


@implements(
    "npu::npu_fusion_attention_grad",
    ignored={
        "softmax_max": "computed again",
        "softmax_sum": "computed again",
        "softmax_in": "computed again",
        "attention_in": "computed again",
        "inner_precise": "speed against precision of the device's softmax",
        "gen_mask_parallel": "where the dropout mask is made",
        "sync": "where the dropout mask is made",
        "seed": "dropout",
        "offset": "dropout",
        "numels": "dropout",
    },
)
def npu_fusion_attention_grad(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dy: torch.Tensor,
    head_num: int,
    input_layout: str,
    atten_mask: torch.Tensor | None = None,
    scale_value: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = NO_LIMIT,
    next_tockens: int = NO_LIMIT,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    sparse_mode: int = 0,
) -> tuple[torch.Tensor, ...]:
    """Gradients for query, key and value, of their shapes and dtypes; those of pse and of sinks are empty.

    Returns five tensors, of which torch-npu before 2.9 takes the first four.  Source: aclnnFlashAttentionScoreGradV2.
    """
    operator = "npu::npu_fusion_attention_grad"
    if keep_prob != 1.0:
        leave_out(operator, keep_prob=keep_prob)
    queries, keys, values = _sequences(
        operator, (query, key, value), head_num, input_layout, actual_seq_qlen, actual_seq_kvlen
    )
    grads = split(operator, dy.contiguous(), input_layout, head_num, whole_numbers(actual_seq_qlen))
    results = []
    for number, one in enumerate(queries):
        hidden = hidden_positions(
            operator,
            one.shape[0],
            keys[number].shape[0],
            sparse_mode,
            _mask_of(operator, atten_mask, number, sparse_mode, input_layout),
            pre_tockens,
            next_tockens,
            query.device,
        )
        results.append(attend_backward(one, keys[number], values[number], grads[number], scale_value, hidden))
    key_heads = keys[0].shape[1]
    dquery = join([result[0] for result in results], query, input_layout, head_num)
    dkey = join([result[1] for result in results], key, input_layout, key_heads)
    dvalue = join([result[2] for result in results], value, input_layout, key_heads)
    schema = schema_of(operator)
    returned = len(schema.returns) if schema is not None else 5
    return (dquery, dkey, dvalue, query.new_empty(0), query.new_empty(0))[:returned]


def _sequences(
    operator: str,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    heads: int,
    layout: str,
    ends: list[int] | None,
    key_ends: list[int] | None,
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """The sequences of query, key and value; the number of key heads follows from the shapes."""
    query, key, value = tensors
    key_heads = {"TND": 1, "BSND": 2, "BNSD": 1}.get(layout)
    if key_heads is not None:
        key_heads = key.shape[key_heads]
    else:
        key_heads = key.shape[-1] // (query.shape[-1] // heads)
    return (
        split(operator, query.contiguous(), layout, heads, whole_numbers(ends)),
        split(operator, key.contiguous(), layout, key_heads, whole_numbers(key_ends)),
        split(operator, value.contiguous(), layout, key_heads, whole_numbers(key_ends)),
    )


def _softmax_statistic(parts: list[torch.Tensor], layout: str) -> torch.Tensor:
    if layout == "TND":
        return torch.cat(parts).unsqueeze(-1).expand(-1, -1, 8).contiguous()
    return torch.stack(parts).transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, 8).contiguous()
