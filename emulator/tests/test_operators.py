"""The fused NPU operators of the stand-in CANN against the definitions in operator_definitions.py.

Random shapes and values, by seed (the test's name shows it); bf16, fp16 and fp32, with the operator called as
torch_npu.<operator> on device npu:0, through torch-npu's own schema and, for gradients, its own derivative formulas.
"""

from __future__ import annotations

import ast
import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path

import operator_definitions as definitions
import pytest
import torch
import torch_npu
from fake_npu.operators import registry

SEEDS = range(4)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-5}
"""Two roundings of the dtype and, for fp32, the order of sums."""


class Case:
    """Random shapes and tensors of one seed."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self.numbers = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def size(self, low: int, high: int) -> int:
        return self.numbers.randint(low, high)

    def pick(self, *choices: object) -> object:
        return self.numbers.choice(choices)

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(dtype or self.dtype)

    def whole(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def lengths(self, sequences: int, high: int) -> list[int]:
        return [self.size(1, high) for _ in range(sequences)]


@pytest.fixture(
    params=[(seed, dtype) for seed in SEEDS for dtype in DTYPES], ids=lambda p: f"seed{p[0]}-{str(p[1])[6:]}"
)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


@pytest.fixture(params=SEEDS, ids=lambda seed: f"seed{seed}")
def fp32(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def npu(x: torch.Tensor) -> torch.Tensor:
    return x.to("npu:0")


def close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """`got`, on the NPU, has expected's shape and its values up to the dtype's tolerance."""
    assert got.device.type == "npu"
    assert got.shape == expected.shape
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.cpu().double(), expected.double(), rtol=tolerance, atol=tolerance)


def same(got: torch.Tensor, expected: torch.Tensor | list[int]) -> None:
    assert got.device.type == "npu"
    assert got.cpu().tolist() == (expected if isinstance(expected, list) else expected.tolist())


def running_sums(lengths: list[int]) -> list[int]:
    return torch.tensor(lengths).cumsum(0).tolist()


def gradients_agree(function, definition, *inputs: torch.Tensor) -> None:
    """Gradients of `function` on the NPU and of `definition` in fp64, for the same random weights of the output."""
    on_npu = [npu(x).requires_grad_() for x in inputs]
    in_fp64 = [x.double().requires_grad_() for x in inputs]
    output, expected = function(*on_npu), definition(*in_fp64)
    close(output.detach(), expected.detach(), torch.float32)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7))
    output.backward(npu(weights))
    expected.backward(weights.double())
    assert any(x.grad.abs().max() > 0 for x in in_fp64)
    for got, wanted in zip(on_npu, in_fp64, strict=True):
        close(got.grad, wanted.grad, torch.float32)


# --- norms, activations, rotary embeddings ----------------------------------------------------------------------------


def test_rms_norm(case: Case) -> None:
    x, gamma = case.tensor(case.size(1, 3), case.size(1, 4), 24), case.tensor(24)
    y, rstd = torch_npu.npu_rms_norm(npu(x), npu(gamma), 1e-5)
    expected, root = definitions.rms_norm(x, gamma, 1e-5)
    assert y.dtype == case.dtype and rstd.dtype == torch.float32
    close(y, expected, case.dtype)
    close(rstd, root, torch.float32)


def test_rms_norm_takes_an_fp32_gamma(fp32: Case) -> None:
    x, gamma = fp32.tensor(3, 16, dtype=torch.bfloat16), fp32.tensor(16)
    y, _ = torch_npu.npu_rms_norm(npu(x), npu(gamma), 1e-6)
    assert y.dtype == torch.bfloat16
    close(y, definitions.rms_norm(x, gamma, 1e-6)[0], torch.bfloat16)


def test_rms_norm_gradient(fp32: Case) -> None:
    gradients_agree(
        lambda x, gamma: torch_npu.npu_rms_norm(x, gamma, 1e-5)[0],
        lambda x, gamma: definitions.rms_norm(x, gamma, 1e-5)[0],
        fp32.tensor(fp32.size(1, 4), 3, 20),
        fp32.tensor(20),
    )


def test_add_rms_norm(case: Case) -> None:
    x1, x2, gamma = case.tensor(case.size(1, 5), 32), case.tensor(1, 32), case.tensor(32)
    x2 = x2.expand(x1.shape).contiguous()
    y, _, x = torch_npu.npu_add_rms_norm(npu(x1), npu(x2), npu(gamma), 1e-6)
    total = (x1 + x2).to(case.dtype)
    same(x, total)
    close(y, definitions.rms_norm(total, gamma, 1e-6)[0], case.dtype)


def test_swiglu(case: Case) -> None:
    x = case.tensor(case.size(1, 4), case.size(1, 3), 2 * case.size(1, 9))
    close(torch_npu.npu_swiglu(npu(x), dim=-1), definitions.swiglu(x), case.dtype)


def test_swiglu_gradient(fp32: Case) -> None:
    gradients_agree(torch_npu.npu_swiglu, definitions.swiglu, fp32.tensor(3, 2 * fp32.size(1, 6)))


@pytest.mark.parametrize("mode", ["half", "interleave"])
def test_rotary_mul(case: Case, mode: str) -> None:
    x = case.tensor(2, case.size(1, 3), case.size(1, 4), 16)
    cos, sin = case.tensor(2, 1, x.shape[2], 16), case.tensor(2, 1, x.shape[2], 16)
    got = torch_npu.npu_rotary_mul(npu(x), npu(cos), npu(sin), mode)
    close(got, definitions.rotary_heads(x, cos, sin, mode == "interleave"), case.dtype)


@pytest.mark.parametrize("mode", ["half", "interleave"])
def test_rotary_mul_gradient(fp32: Case, mode: str) -> None:
    gradients_agree(
        lambda x, cos, sin: torch_npu.npu_rotary_mul(x, cos, sin, mode),
        lambda x, cos, sin: definitions.rotary_heads(x, cos, sin, mode == "interleave"),
        fp32.tensor(2, 3, fp32.size(1, 3), 8),
        fp32.tensor(2, 1, 1, 8),
        fp32.tensor(2, 1, 1, 8),
    )


def rotary_inputs(case: Case) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    head_size, tokens = 16, case.size(1, 5)
    query = case.tensor(tokens, head_size * case.size(1, 3))
    return head_size, case.whole(9, tokens), query, case.tensor(tokens, head_size), case.tensor(9, case.pick(8, 16))


@pytest.mark.parametrize("mode", ["half", "interleaved"])
def test_mrope_with_plain_positions(case: Case, mode: str) -> None:
    head_size, positions, query, key, cache = rotary_inputs(case)
    got = torch_npu.npu_mrope(
        npu(positions), npu(query), npu(key), npu(cache), head_size, mrope_section=[0, 0, 0], rotary_mode=mode
    )
    for x, turned in zip((query, key), got, strict=True):
        expected = definitions.rotary_by_position(
            x, [positions.tolist()], [cache.shape[1] // 2], cache, head_size, mode != "half"
        )
        close(turned, expected, case.dtype)


def test_mrope_with_sections(fp32: Case) -> None:
    tokens, sections = fp32.size(1, 4), [2, 1, 5]
    positions, x, cache = fp32.whole(7, 3, tokens), fp32.tensor(tokens, 32), fp32.tensor(7, 16)
    got, _ = torch_npu.npu_mrope(npu(positions), npu(x), npu(x), npu(cache), 16, mrope_section=sections)
    close(got, definitions.rotary_by_position(x, positions.tolist(), sections, cache, 16, False), torch.float32)


@pytest.mark.parametrize("neox", [True, False])
def test_rotary_embedding_in_place(case: Case, neox: bool) -> None:
    head_size, positions, query, key, cache = rotary_inputs(case)
    on_npu = npu(query), npu(key)
    torch_npu._npu_rotary_embedding(npu(positions), *on_npu, head_size, npu(cache), neox)
    for x, turned in zip((query, key), on_npu, strict=True):
        expected = definitions.rotary_by_position(
            x, [positions.tolist()], [cache.shape[1] // 2], cache, head_size, not neox
        )
        close(turned, expected, case.dtype)


def test_apply_rotary_pos_emb_in_place(case: Case) -> None:
    tokens = case.size(1, 4)
    query, key = case.tensor(1, tokens, 3, 16), case.tensor(1, tokens, 1, 16)
    cos, sin = case.tensor(1, tokens, 1, 16), case.tensor(1, tokens, 1, 16)
    on_npu = npu(query), npu(key)
    returned = torch_npu.npu_apply_rotary_pos_emb(*on_npu, npu(cos), npu(sin))
    for x, turned, result in zip((query, key), on_npu, returned, strict=True):
        expected = definitions.rotary_heads(x, cos, sin)
        close(turned, expected, case.dtype)
        close(result, expected, case.dtype)


# --- KV cache ---------------------------------------------------------------------------------------------------------


def test_write_kv_cache(case: Case) -> None:
    tokens, heads, block_size = case.size(1, 6), case.size(1, 3), case.size(1, 4)
    key, value = case.tensor(tokens, heads, 8), case.tensor(tokens, heads, 8)
    caches = case.tensor(5, block_size, heads, 8), case.tensor(5, block_size, heads, 8)
    slots = case.numbers.sample(range(5 * block_size), min(tokens, 5 * block_size))
    slots += [-1] * (tokens - len(slots))
    if case.pick(True, False):
        slots[-1] = -1
    expected = [definitions.write_slots(c, x, slots) for c, x in zip(caches, (key, value), strict=True)]
    slots = npu(torch.tensor(slots, dtype=torch.int32))
    # torch-npu 2.9 has no such argument yet, and "Norm" is the default of those that have it.
    schema = registry.schema_of("npu::npu_scatter_pa_kv_cache")
    mode = {"cache_mode": "Norm"} if schema is not None and "cache_mode" in str(schema) else {}
    for write in (
        lambda *caches: torch_npu._npu_reshape_and_cache(npu(key), npu(value), *caches, slots),
        lambda *caches: torch_npu.npu_scatter_pa_kv_cache(npu(key), npu(value), *caches, slots, **mode),
    ):
        written = npu(caches[0]), npu(caches[1])
        write(*written)
        for cache, wanted in zip(written, expected, strict=True):
            same(cache, wanted)


def test_scatter_nd_update(fp32: Case) -> None:
    x, updates = fp32.tensor(4, 3, 5), fp32.tensor(2, 5)
    indices = torch.tensor([[0, 2], [3, fp32.size(0, 2)]])
    expected = x.clone()
    for row, (i, j) in enumerate(indices.tolist()):
        expected[i, j] = updates[row]
    on_npu = npu(x)
    same(torch_npu.npu_scatter_nd_update(on_npu, npu(indices), npu(updates)), expected)
    same(on_npu, x)
    torch_npu.npu_scatter_nd_update_(on_npu, npu(indices), npu(updates))
    same(on_npu, expected)


# --- attention --------------------------------------------------------------------------------------------------------


class PagedCase:
    """Sequences whose last tokens are queries, with all keys in a paged cache."""

    def __init__(self, case: Case, one_query: bool = False) -> None:
        sequences = case.size(1, 3)
        self.key_heads, self.size, self.block_size = case.size(1, 2), 8, case.size(2, 4)
        self.heads = self.key_heads * case.size(1, 3)
        self.key_lengths = case.lengths(sequences, 9)
        self.query_lengths = [1 if one_query else case.size(1, length) for length in self.key_lengths]
        blocks = case.numbers.sample(range(12), 12)
        need = [-(-length // self.block_size) for length in self.key_lengths]
        self.tables = [[blocks.pop() if blocks else 0 for _ in range(n)] for n in need]
        caches = (12, self.block_size, self.key_heads, self.size)
        self.key_cache, self.value_cache = case.tensor(*caches), case.tensor(*caches)
        self.query = case.tensor(sum(self.query_lengths), self.heads, self.size)
        self.scale = self.size**-0.5

    @property
    def block_table(self) -> torch.Tensor:
        width = max(len(table) for table in self.tables)
        return torch.tensor([table + [0] * (width - len(table)) for table in self.tables], dtype=torch.int32)

    def expected(self, visible=definitions.causal_from_the_end) -> torch.Tensor:
        return torch.cat(
            [
                definitions.attention(q, k, v, self.scale, visible(len(q), len(k)))
                for q, k, v in zip(self.query.split(self.query_lengths), *self.keys_and_values(), strict=True)
            ]
        )

    def keys_and_values(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        pairs = list(zip(self.tables, self.key_lengths, strict=True))
        return (
            [definitions.cached(self.key_cache, table, length) for table, length in pairs],
            [definitions.cached(self.value_cache, table, length) for table, length in pairs],
        )


COMPRESSED = torch.ones(2048, 2048, dtype=torch.int8).triu(1)


def fused_infer(version: int, query, key, value, *, lengths, key_lengths, heads, key_heads, scale, lse=False, **rest):
    if version == 1:
        return torch_npu.npu_fused_infer_attention_score(
            query,
            key,
            value,
            actual_seq_lengths=lengths,
            actual_seq_lengths_kv=key_lengths,
            num_heads=heads,
            num_key_value_heads=key_heads,
            scale=scale,
            softmax_lse_flag=lse,
            **rest,
        )
    return torch_npu.npu_fused_infer_attention_score_v2(
        query,
        key,
        value,
        actual_seq_qlen=lengths,
        actual_seq_kvlen=key_lengths,
        num_query_heads=heads,
        num_key_value_heads=key_heads,
        softmax_scale=scale,
        return_softmax_lse=lse,
        **rest,
    )


@pytest.mark.parametrize("version", [1, 2])
def test_fused_infer_attention_with_a_paged_cache(case: Case, version: int) -> None:
    paged = PagedCase(case)
    arguments = {
        "lengths": running_sums(paged.query_lengths),
        "key_lengths": paged.key_lengths,
        "heads": paged.heads,
        "key_heads": paged.key_heads,
        "scale": paged.scale,
        "block_table": npu(paged.block_table),
        "block_size": paged.block_size,
        "input_layout": "TND",
        "atten_mask": npu(COMPRESSED),
        "sparse_mode": 3,
    }
    caches = [npu(cache.flatten(2)) for cache in (paged.key_cache, paged.value_cache)]
    close(fused_infer(version, npu(paged.query), *caches, **arguments)[0], paged.expected(), case.dtype)
    by_head = [npu(cache.transpose(1, 2).contiguous()) for cache in (paged.key_cache, paged.value_cache)]
    close(fused_infer(version, npu(paged.query), *by_head, **arguments)[0], paged.expected(), case.dtype)


@pytest.mark.parametrize("sparse_mode", [0, 2, 3, 4])
def test_fused_infer_attention_of_packed_sequences(case: Case, sparse_mode: int) -> None:
    heads, key_heads, size = 4, case.pick(1, 2, 4), 8
    lengths = case.lengths(case.size(1, 3), 5)
    key_lengths = [length + case.size(0, 3) for length in lengths]
    before, after = case.size(0, 3), case.size(0, 2)
    visible = {
        0: definitions.everything,
        2: definitions.causal_from_the_start,
        3: definitions.causal_from_the_end,
        4: lambda q, k: definitions.band_from_the_end(q, k, before, after),
    }[sparse_mode]
    query = case.tensor(sum(lengths), heads, size)
    key, value = case.tensor(sum(key_lengths), key_heads, size), case.tensor(sum(key_lengths), key_heads, size)
    limits = {"pre_tokens": before, "next_tokens": after} if sparse_mode == 4 else {}
    got, lse = fused_infer(
        1,
        npu(query),
        npu(key),
        npu(value),
        lengths=running_sums(lengths),
        key_lengths=running_sums(key_lengths),
        heads=heads,
        key_heads=key_heads,
        scale=0.3,
        lse=True,
        input_layout="TND",
        sparse_mode=sparse_mode,
        atten_mask=npu(COMPRESSED) if sparse_mode else None,
        **limits,
    )
    parts = list(zip(query.split(lengths), key.split(key_lengths), value.split(key_lengths), strict=True))
    seen = [visible(len(q), len(k)) for q, k, _ in parts]
    close(got, torch.cat([definitions.attention(*p, 0.3, s) for p, s in zip(parts, seen, strict=True)]), case.dtype)
    expected = torch.cat([definitions.log_sum_exp(q, k, 0.3, s) for (q, k, _), s in zip(parts, seen, strict=True)])
    close(lse.squeeze(-1), expected, torch.float32)


LAYOUTS = {
    "BSH": lambda x: x.flatten(2),
    "SBH": lambda x: x.flatten(2).transpose(0, 1).contiguous(),
    "BSND": lambda x: x,
    "BNSD": lambda x: x.transpose(1, 2).contiguous(),
}


@pytest.mark.parametrize("layout", ["BSH", "BSND", "BNSD"])
def test_fused_infer_attention_with_a_mask(case: Case, layout: str) -> None:
    batch, length, heads, key_heads = 2, case.size(1, 4), 4, case.pick(2, 4)
    query, key, value = (case.tensor(batch, length, h, 8) for h in (heads, key_heads, key_heads))
    mask = (case.whole(3, batch, 1, length, length) == 0).int()
    mask[..., 0] = 0
    arrange = LAYOUTS[layout]
    got, _ = fused_infer(
        1,
        *(npu(arrange(x)) for x in (query, key, value)),
        lengths=None,
        key_lengths=None,
        heads=heads,
        key_heads=key_heads,
        scale=0.5,
        input_layout=layout,
        atten_mask=npu(mask.bool()),
    )
    expected = [
        definitions.attention(query[b], key[b], value[b], 0.5, definitions.masked_where(mask[b, 0]))
        for b in range(batch)
    ]
    close(got, arrange(torch.stack(expected)), case.dtype)


def test_paged_attention_of_a_decode_step(case: Case) -> None:
    paged = PagedCase(case, one_query=True)
    out = torch.full_like(npu(paged.query), 9.0)
    torch_npu._npu_paged_attention(
        query=npu(paged.query),
        key_cache=npu(paged.key_cache),
        value_cache=npu(paged.value_cache),
        num_kv_heads=paged.key_heads,
        num_heads=paged.heads,
        scale_value=paged.scale,
        block_table=npu(paged.block_table),
        context_lens=torch.tensor(paged.key_lengths, dtype=torch.int32),
        out=out,
    )
    close(out, paged.expected(), case.dtype)


@pytest.mark.parametrize("operator", ["qlens", "splitfuse"])
def test_paged_attention_of_a_prefill_step(case: Case, operator: str) -> None:
    paged = PagedCase(case)
    out = torch.full_like(npu(paged.query), 9.0)
    if operator == "qlens":
        call, mask = torch_npu._npu_flash_attention_qlens, torch.ones(128, 128).triu(1)
    else:
        call = torch_npu._npu_paged_attention_splitfuse
        rows = [
            [0.0 if seen else 1.0 for seen in row] + [1.0] * (max(paged.key_lengths) - length)
            for queries, length in zip(paged.query_lengths, paged.key_lengths, strict=True)
            for row in definitions.causal_from_the_end(queries, length)
        ]
        mask = torch.tensor(rows)
    call(
        query=npu(paged.query),
        key_cache=npu(paged.key_cache),
        value_cache=npu(paged.value_cache),
        block_table=npu(paged.block_table),
        mask=npu(mask.to(case.dtype)),
        seq_len=torch.tensor(paged.query_lengths, dtype=torch.int32),
        context_lens=torch.tensor(paged.key_lengths, dtype=torch.int32),
        num_kv_heads=paged.key_heads,
        num_heads=paged.heads,
        scale_value=paged.scale,
        out=out,
    )
    close(out, paged.expected(), case.dtype)


def test_flash_attention_of_packed_sequences(case: Case) -> None:
    lengths = case.lengths(case.size(1, 3), 5)
    key_heads = case.pick(1, 2)
    query, key, value = (case.tensor(sum(lengths), h, 8) for h in (2, key_heads, key_heads))
    mask = torch.ones(8, 8).triu(1)
    if case.dtype == torch.float16:
        mask = mask * torch.finfo(torch.float16).min
    out = npu(torch.full_like(query, 9.0))
    torch_npu._npu_flash_attention(
        query=npu(query),
        key=npu(key),
        value=npu(value),
        mask=npu(mask.to(case.dtype)),
        seq_len=torch.tensor(lengths, dtype=torch.int32),
        scale_value=0.4,
        num_heads=2,
        num_kv_heads=key_heads,
        out=out,
    )
    parts = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
    expected = [definitions.attention(*p, 0.4, definitions.causal_from_the_start(len(p[0]), len(p[0]))) for p in parts]
    close(out, torch.cat(expected), case.dtype)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("sparse_mode", [0, 2, 3])
def test_fusion_attention_gradient(fp32: Case, layout: str, sparse_mode: int) -> None:
    visible = [definitions.everything, None, definitions.causal_from_the_start, definitions.causal_from_the_end]
    batch, queries, heads, key_heads = fp32.size(1, 2), fp32.size(1, 3), 2, fp32.pick(1, 2)
    keys = queries + fp32.size(0, 2)
    arrange = LAYOUTS[layout]

    def on_npu(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        mask = npu(COMPRESSED.bool()) if sparse_mode else None
        return torch_npu.npu_fusion_attention(
            query, key, value, heads, layout, scale=0.6, atten_mask=mask, sparse_mode=sparse_mode
        )[0]

    def defined(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if layout in ("BSH", "SBH"):
            query, key, value = (x.unflatten(-1, (-1, 8)) for x in (query, key, value))
        if layout == "SBH":
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        if layout == "BNSD":
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        seen = visible[sparse_mode](queries, keys)
        return arrange(torch.stack([definitions.attention(*x, 0.6, seen) for x in zip(query, key, value, strict=True)]))

    shapes = ((queries, heads), (keys, key_heads), (keys, key_heads))
    gradients_agree(on_npu, defined, *(arrange(fp32.tensor(batch, length, h, 8)) for length, h in shapes))


def test_fusion_attention_gradient_of_packed_sequences(fp32: Case) -> None:
    lengths = fp32.lengths(fp32.size(1, 3), 4)
    ends = running_sums(lengths)

    def on_npu(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch_npu.npu_fusion_attention(
            query,
            key,
            value,
            4,
            "TND",
            scale=0.6,
            atten_mask=npu(COMPRESSED.bool()),
            sparse_mode=3,
            actual_seq_qlen=ends,
            actual_seq_kvlen=ends,
        )[0]

    def defined(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
        return torch.cat(
            [definitions.attention(*p, 0.6, definitions.causal_from_the_end(len(p[0]), len(p[0]))) for p in parts]
        )

    gradients_agree(on_npu, defined, *(fp32.tensor(sum(lengths), h, 8) for h in (4, 2, 2)))


def test_fusion_attention_in_low_precision(case: Case) -> None:
    query, key, value = (case.tensor(1, 4, 2, 8) for _ in range(3))
    got = torch_npu.npu_fusion_attention(npu(query), npu(key), npu(value), 2, "BSND", scale=0.4)[0]
    assert got.dtype == case.dtype
    close(got, definitions.attention(query[0], key[0], value[0], 0.4, definitions.everything(4, 4))[None], case.dtype)


# --- mixture of experts -----------------------------------------------------------------------------------------------


def different(case: Case, rows: int, columns: int) -> torch.Tensor:
    """Values that no rounding makes equal, in a random order in each row."""
    order = torch.stack([torch.randperm(columns, generator=case.generator) for _ in range(rows)])
    return ((order - columns // 2).float() / 4).to(case.dtype)


def test_gating_top_k_softmax(case: Case) -> None:
    tokens, experts = case.size(1, 5), case.size(4, 12)
    k, logits = case.size(1, 4), different(case, tokens, experts)
    weights, chosen, rows = torch_npu.npu_moe_gating_top_k_softmax(npu(logits), None, k)
    expected, experts_expected = definitions.top_k_gate(logits, k, False, False, 1.0)
    close(weights, expected, case.dtype)
    same(chosen, experts_expected)
    same(rows, [[choice * tokens + token for choice in range(k)] for token in range(tokens)])


@pytest.mark.parametrize(("norm_type", "renorm"), [(0, 0), (0, 1), (1, 0)])
def test_gating_top_k(case: Case, norm_type: int, renorm: int) -> None:
    k, logits = case.size(1, 4), different(case, case.size(1, 5), case.size(4, 12))
    arguments = {
        "k_group": 1,
        "group_count": 1,
        "group_select_mode": 1,
        "renorm": renorm,
        "norm_type": norm_type,
        "out_flag": False,
    }
    expected, experts = definitions.top_k_gate(logits, k, norm_type == 1, renorm == 1, 1.5)
    got = [torch_npu.npu_moe_gating_top_k(npu(logits), k, **arguments, routed_scaling_factor=1.5)]
    if library_operator("moe_gating_top_k"):
        got.append(
            torch.ops._C_ascend.moe_gating_top_k(
                npu(logits), k=k, **arguments, routed_scaling_factor=1.5, eps=1e-20, bias_opt=None
            )
        )
    for weights, chosen, _ in got:
        close(weights, expected, case.dtype)
        same(chosen, experts)


def choices(case: Case) -> tuple[int, int, torch.Tensor]:
    """(experts, k, the experts of each token (tokens, k), each token's own)."""
    experts, k, tokens = case.size(4, 9), case.size(1, 3), case.size(1, 7)
    rows = [torch.randperm(experts, generator=case.generator)[:k] for _ in range(tokens)]
    return experts, k, torch.stack(rows).int()


@pytest.mark.parametrize("spread", [False, True], ids=["all-experts", "some-experts"])
@pytest.mark.parametrize("counts_as_sums", [False, True])
def test_moe_init_routing(case: Case, spread: bool, counts_as_sums: bool) -> None:
    experts, _, chosen = choices(case)
    first, last = sorted(case.numbers.sample(range(experts + 1), 2)) if spread else (0, experts)
    x = case.tensor(chosen.shape[0], 8)
    arguments = {
        "active_num": chosen.numel(),
        "expert_num": experts,
        "expert_tokens_num_type": 0 if counts_as_sums else 1,
        "expert_tokens_num_flag": True,
        "active_expert_range": [first, last],
        "quant_mode": -1,
    }
    rows, row_of, counts = definitions.route(x, chosen, first, last)
    got = [torch_npu.npu_moe_init_routing_v2(npu(x), npu(chosen), **arguments)]
    if library_operator("npu_moe_init_routing_custom"):
        got.append(torch.ops._C_ascend.npu_moe_init_routing_custom(npu(x), npu(chosen), **arguments))
    for sorted_x, places, numbers, _ in got:
        assert sorted_x.shape == (chosen.numel(), 8)
        same(sorted_x[: len(rows)], rows)
        same(places, row_of)
        same(numbers, running_sums(counts) if counts_as_sums else counts)


def test_moe_init_routing_by_row(fp32: Case) -> None:
    experts, k, chosen = choices(fp32)
    x = fp32.tensor(chosen.shape[0], 4)
    first, last = 1, experts - 1
    _, sources, _, scales = torch_npu.npu_moe_init_routing_v2(
        npu(x),
        npu(chosen),
        scale=npu(x[:, 0].contiguous()),
        expert_num=experts,
        active_expert_range=[first, last],
        row_idx_type=1,
        quant_mode=-1,
    )
    rows, row_of, _ = definitions.route(x, chosen, first, last)
    expected = [row_of.index(row) for row in range(len(rows))]
    same(sources, expected + [-1] * (chosen.numel() - len(rows)))
    same(scales[: len(rows)], [x[source // k, 0].item() for source in expected])


@pytest.mark.parametrize("dropped", [0, 2])
def test_moe_token_permute_and_unpermute(case: Case, dropped: int) -> None:
    experts, k, chosen = choices(case)
    x, probs = case.tensor(chosen.shape[0], 8), case.tensor(chosen.shape[0], k)
    kept = max(chosen.numel() - dropped, 1)
    permuted, places = torch_npu.npu_moe_token_permute(npu(x), npu(chosen), num_out_tokens=kept)
    rows, row_of, _ = definitions.route(x, chosen, 0, experts)
    same(permuted, rows[:kept])
    same(places, row_of)
    back = torch_npu.npu_moe_token_unpermute(permuted, places, probs=npu(probs))
    close(back, definitions.combine(rows[:kept], row_of, probs), case.dtype)


def test_moe_token_permute_of_single_choices(fp32: Case) -> None:
    x, groups = fp32.tensor(7, 4), fp32.whole(3, 7)
    permuted, places = torch_npu.npu_moe_token_permute(npu(x), npu(groups))
    rows, row_of, _ = definitions.route(x, groups.unsqueeze(1), 0, 3)
    same(permuted, rows)
    same(places, row_of)
    same(torch_npu.npu_moe_token_unpermute(permuted, places), x)


def test_moe_permute_gradient(fp32: Case) -> None:
    experts, k, chosen = choices(fp32)
    _, row_of, _ = definitions.route(torch.zeros(chosen.shape[0], 1), chosen, 0, experts)
    gradients_agree(
        lambda x: torch_npu.npu_moe_token_permute(x, npu(chosen))[0],
        lambda x: definitions.route(x, chosen, 0, experts)[0],
        fp32.tensor(chosen.shape[0], 6),
    )
    gradients_agree(
        lambda rows, probs: torch_npu.npu_moe_token_unpermute(rows, npu(torch.tensor(row_of).int()), probs=probs),
        lambda rows, probs: definitions.combine(rows, row_of, probs),
        fp32.tensor(chosen.numel(), 6),
        fp32.tensor(chosen.shape[0], k),
    )


def test_moe_re_routing(fp32: Case) -> None:
    counts = fp32.whole(4, fp32.size(1, 3), fp32.size(1, 4))
    tokens, scales = fp32.tensor(int(counts.sum()), 5), fp32.tensor(int(counts.sum()))
    order = definitions.re_route(counts.tolist())
    got = torch_npu.npu_moe_re_routing(npu(tokens), npu(counts), per_token_scales=npu(scales))
    same(got[0], tokens[order])
    same(got[1], scales[order])
    same(got[2], order)
    same(got[3], counts.sum(0))


@pytest.mark.parametrize("one_weight", [True, False])
@pytest.mark.parametrize("counts_as_sums", [False, True])
def test_grouped_matmul(case: Case, one_weight: bool, counts_as_sums: bool) -> None:
    counts = [case.size(0, 3) for _ in range(case.size(1, 4))]
    spare = case.size(0, 2)
    x, weight = case.tensor(sum(counts) + spare, 8), case.tensor(len(counts), 8, 6)
    groups = torch.tensor(running_sums(counts) if counts_as_sums else counts)
    (got,) = torch_npu.npu_grouped_matmul(
        x=[npu(x)],
        weight=[npu(weight)] if one_weight else [npu(w) for w in weight],
        group_list=npu(groups),
        group_list_type=0 if counts_as_sums else 1,
        group_type=0,
        split_item=2,
    )
    close(got[: sum(counts)], definitions.grouped_matmul(x, list(weight), counts), case.dtype)
    assert got.shape[0] == len(x)
    assert (got[sum(counts) :] != 0).all(), "rows that the device leaves undefined must not pass for zeros"


def test_grouped_matmul_over_the_summed_axis(fp32: Case) -> None:
    counts = [fp32.size(0, 3) for _ in range(3)]
    x, y = fp32.tensor(sum(counts), 5), fp32.tensor(sum(counts), 4)
    (got,) = torch_npu.npu_grouped_matmul(
        [npu(x).transpose(0, 1)],
        [npu(y)],
        group_list=npu(torch.tensor(counts)),
        group_list_type=1,
        group_type=2,
        split_item=3,
    )
    close(got, definitions.grouped_outer_products(x.t(), y, counts), torch.float32)


def test_matmul_add_fp32(case: Case) -> None:
    x, weight, total = case.tensor(5, 3), case.tensor(5, 4), case.tensor(3, 4, dtype=torch.float32)
    on_npu = npu(total)
    torch_npu._npu_matmul_add_fp32(npu(x), npu(weight), on_npu)
    close(on_npu, total + definitions.grouped_outer_products(x.t(), weight, [5])[0], torch.float32)


# --- vllm-ascend's own library ----------------------------------------------------------------------------------------


def library_operator(name: str) -> bool:
    """Whether the installed vllm-ascend has this operator of its own; registers the reference versions."""
    if importlib.util.find_spec("vllm_ascend") is None:
        return False
    from fake_npu.operators import vllm_ascend_library

    vllm_ascend_library.install()
    return registry.schema_of(f"_C_ascend::{name}") is not None


def needs_library_operator(name: str) -> None:
    if not library_operator(name):
        pytest.skip(f"the vllm-ascend of this stack has no {name}")


@pytest.mark.parametrize("with_bias", [True, False])
def test_add_rms_norm_bias(case: Case, with_bias: bool) -> None:
    needs_library_operator("npu_add_rms_norm_bias")
    x1, x2, gamma, beta = case.tensor(4, 16), case.tensor(4, 16), case.tensor(16), case.tensor(16)
    y, _, x = torch.ops._C_ascend.npu_add_rms_norm_bias(
        npu(x1), npu(x2), npu(gamma), npu(beta) if with_bias else None, 1e-6
    )
    total = (x1 + x2).to(case.dtype)
    expected = definitions.rms_norm(total, gamma, 1e-6)[0] + (beta.double() if with_bias else 0)
    same(x, total)
    close(y, expected, case.dtype)


def test_rotary_embedding_of_the_library(case: Case) -> None:
    needs_library_operator("rotary_embedding")
    head_size, positions, query, key, cache = rotary_inputs(case)
    got = torch.ops._C_ascend.rotary_embedding(npu(positions), npu(query), npu(key), head_size, npu(cache), True)
    for x, turned in zip((query, key), got, strict=True):
        expected = definitions.rotary_by_position(
            x, [positions.tolist()], [cache.shape[1] // 2], cache, head_size, False
        )
        close(turned, expected, case.dtype)


# --- sampling and losses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_k", [True, False])
@pytest.mark.parametrize("with_p", [True, False])
def test_top_k_top_p(case: Case, with_k: bool, with_p: bool) -> None:
    rows, vocabulary = case.size(1, 4), case.size(2, 12)
    logits = different(case, rows, vocabulary)
    k = [case.size(1, vocabulary) for _ in range(rows)]
    p = [case.size(1, 99) / 100 + 0.0013 for _ in range(rows)]
    arguments = {
        "k": npu(torch.tensor(k, dtype=torch.int32)) if with_k else None,
        "p": npu(torch.tensor(p).to(case.dtype)) if with_p else None,
    }
    p = torch.tensor(p).to(case.dtype).tolist()
    got = [torch_npu.npu_top_k_top_p(npu(logits), **arguments)]
    if library_operator("npu_apply_top_k_top_p"):
        got.append(torch.ops._C_ascend.npu_apply_top_k_top_p(npu(logits), **arguments))
    for result in got:
        for row, (one, result_row) in enumerate(zip(logits.tolist(), result.cpu().tolist(), strict=True)):
            kept = definitions.top_k_top_p(one, k[row] if with_k else None, p[row] if with_p else None)
            assert result_row == [x if i in kept else float("-inf") for i, x in enumerate(one)]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_cross_entropy_loss(case: Case, reduction: str) -> None:
    rows, classes = case.size(2, 5), case.size(2, 9)
    logits, targets = case.tensor(rows, classes), case.whole(classes, rows)
    targets[0] = -100
    loss, log_prob, _, _ = torch_npu.npu_cross_entropy_loss(npu(logits), npu(targets), reduction=reduction)
    each = torch.stack(definitions.cross_entropy(logits, targets.tolist(), -100))
    expected = {"none": each, "sum": each.sum(), "mean": each.sum() / (rows - 1)}[reduction]
    assert loss.dtype == log_prob.dtype == case.dtype
    close(loss, expected, case.dtype)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_cross_entropy_loss_gradient(fp32: Case, reduction: str) -> None:
    logits, targets = fp32.tensor(4, 7), fp32.whole(7, 4)
    targets[1] = -100

    def defined(logits: torch.Tensor) -> torch.Tensor:
        each = torch.stack(definitions.cross_entropy(logits, targets.tolist(), -100))
        return each if reduction == "none" else each.sum() / 3

    gradients_agree(
        lambda logits: torch_npu.npu_cross_entropy_loss(logits, npu(targets), reduction=reduction)[0], defined, logits
    )


# --- derivatives of aten operators that torch-npu spells as its own ---------------------------------------------------


def test_gather_gradient(fp32: Case) -> None:
    rows, columns = fp32.size(1, 4), fp32.size(1, 6)
    index = fp32.whole(columns, rows, fp32.size(1, 8))
    gradients_agree(
        lambda x: x.gather(-1, npu(index)),
        lambda x: torch.stack([torch.stack([x[i, j] for j in row]) for i, row in enumerate(index.tolist())]),
        fp32.tensor(rows, columns),
    )


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_repeat_interleave_gradient(fp32: Case, dim: int | None) -> None:
    x = fp32.tensor(fp32.size(1, 3), fp32.size(1, 3))
    length = x.numel() if dim is None else x.shape[dim]
    for repeats in (fp32.size(1, 3), torch.tensor([fp32.size(1, 3) for _ in range(length)])):
        each = repeats.tolist() if isinstance(repeats, torch.Tensor) else [repeats] * length
        source = torch.tensor([i for i, count in enumerate(each) for _ in range(count)])
        on_npu = npu(repeats) if isinstance(repeats, torch.Tensor) else repeats
        gradients_agree(
            lambda x, repeats=on_npu: x.repeat_interleave(repeats, dim),
            lambda x, source=source: x.flatten()[source] if dim is None else x.index_select(dim, source),
            x,
        )
        grad = torch.randn(x.flatten()[source].shape if dim is None else x.index_select(dim, source).shape)
        own = torch.ops.npu.repeat_interleave_backward_int
        if isinstance(repeats, torch.Tensor):
            own = torch.ops.npu.repeat_interleave_backward_tensor
        expected = torch.zeros(x.numel() if dim is None else x.shape).index_add_(dim or 0, source, grad).view(x.shape)
        close(own(npu(grad), npu(x), on_npu, dim), expected, torch.float32)


# --- what is left out -------------------------------------------------------------------------------------------------


def left_out_calls() -> Iterator[tuple[str, str, str]]:
    """(operator, argument, file, expression) of calls with an argument that the reference version leaves out."""
    x = "torch.ones(4, 8, device='npu:0')"
    ids = "torch.zeros(4, 2, dtype=torch.int32, device='npu:0')"
    yield "npu_rotary_mul", "rotary_mode", "rotary.py", f"npu_rotary_mul({x}, {x}, {x}, 'quarter')"
    yield (
        "npu_cross_entropy_loss",
        "label_smoothing",
        "losses.py",
        (f"npu_cross_entropy_loss({x}, torch.zeros(4, dtype=torch.long, device='npu:0'), label_smoothing=0.1)"),
    )
    yield (
        "npu_moe_init_routing_v2",
        "quant_mode",
        "moe.py",
        (f"npu_moe_init_routing_v2({x}, {ids}, expert_num=4, quant_mode=1)"),
    )
    yield (
        "npu_moe_init_routing_v2",
        "drop_pad_mode",
        "moe.py",
        (f"npu_moe_init_routing_v2({x}, {ids}, expert_num=4, quant_mode=-1, drop_pad_mode=1, expert_capacity=2)"),
    )
    yield "npu_moe_gating_top_k", "bias", "moe.py", f"npu_moe_gating_top_k({x}, 2, bias={x}[0])"
    yield "npu_moe_token_permute", "padded_mode", "moe.py", f"npu_moe_token_permute({x}, {ids}, padded_mode=True)"
    yield (
        "npu_grouped_matmul",
        "scale",
        "matmul.py",
        (
            f"npu_grouped_matmul([{x}], [{x}.t()[None]], scale=[{x}], group_list=torch.tensor([4], device='npu:0'), "
            "group_type=0, split_item=2)"
        ),
    )
    yield (
        "npu_grouped_matmul",
        "group_list_type",
        "matmul.py",
        (
            f"npu_grouped_matmul([{x}], [{x}.t()[None]], group_list=torch.tensor([4], device='npu:0'), group_type=0, "
            "split_item=2, group_list_type=2)"
        ),
    )
    qkv = ", ".join(["torch.ones(1, 4, 2, 8, device='npu:0')"] * 3)
    yield "npu_fusion_attention", "keep_prob", "attention.py", f"npu_fusion_attention({qkv}, 2, 'BSND', keep_prob=0.9)"
    yield "npu_fusion_attention", "pse", "attention.py", f"npu_fusion_attention({qkv}, 2, 'BSND', pse={x})"
    yield (
        "npu_fused_infer_attention_score",
        "query_rope",
        "attention.py",
        (f"npu_fused_infer_attention_score({qkv}, num_heads=2, input_layout='BSND', query_rope={x})"),
    )
    yield (
        "npu_fused_infer_attention_score_v2",
        "learnable_sink",
        "attention.py",
        (f"npu_fused_infer_attention_score_v2({qkv}, num_query_heads=2, input_layout='BSND', learnable_sink={x})"),
    )


@pytest.mark.parametrize(("operator", "argument", "file", "call"), list(left_out_calls()))
def test_an_argument_that_is_left_out_is_named(operator: str, argument: str, file: str, call: str) -> None:
    with pytest.raises(NotImplementedError) as error:
        eval(f"torch_npu.{call}", {"torch": torch, "torch_npu": torch_npu})
    message = str(error.value)
    assert f"npu::{operator}: " in message
    assert f"{argument}=" in message
    assert f"fake_npu/operators/{file}" in message


@pytest.mark.parametrize("operator", ["npu_fast_gelu", "npu_silu", "_npu_group_topk"])
def test_a_missing_operator_is_named_with_the_place_to_add_it(operator: str) -> None:
    x = torch.ones(4, 8, device="npu:0")
    with pytest.raises(NotImplementedError) as error:
        getattr(torch_npu, operator)(x)
    assert f"::{operator} has no reference version" in str(error.value)
    assert "emulator/fake_npu/operators/" in str(error.value)


def test_every_operator_of_torch_npu_is_implemented_kept_or_refused() -> None:
    """None is left to a kernel that would look for an aclnn function, or give back memory that nothing wrote."""
    left = [
        name
        for name in torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1")
        if name.startswith(("npu::", "atb::"))
        and name not in registry.IMPLEMENTED
        and name not in registry.REFUSED
        and name.partition("::")[2] not in registry.KEPT
    ]
    assert left == []
    assert len(registry.REFUSED) > 100
    assert not [name for name in registry.IMPLEMENTED if name in registry.REFUSED]


def test_absent_operators_are_reported() -> None:
    torch_names = {name for name in registry.IMPLEMENTED if name.startswith(("npu::", "atb::"))}
    absent = {name for name in torch_names if registry.schema_of(name) is None}
    assert absent == {name for name in registry.ABSENT if name in torch_names}
    report = registry.report()
    assert "npu::npu_rms_norm" in report.splitlines()[0]
    assert all(name in report.splitlines()[1] for name in absent)


def test_a_missing_library_operator_is_named() -> None:
    needs_library_operator("moe_gating_top_k")
    with pytest.raises(AttributeError, match=r"_C_ascend::no_such_operator .*/vllm_ascend_library\.py"):
        _ = torch.ops._C_ascend.no_such_operator


# --- the operators that the installed vllm-ascend calls ---------------------------------------------------------------

PATH = (
    "attention/attention_v1.py",
    "attention/utils.py",
    "device/device_op.py",
    "ops/activation.py",
    "ops/common_fused_moe.py",
    "ops/fused_moe/experts_selector.py",
    "ops/fused_moe/fused_moe.py",
    "ops/fused_moe/moe_comm_method.py",
    "ops/fused_moe/moe_mlp.py",
    "ops/fused_moe/prepare_finalize.py",
    "ops/fused_moe/routed_experts.py",
    "ops/fused_moe/router/fused_topk_router.py",
    "ops/fused_moe/shared_experts.py",
    "ops/fused_moe/token_dispatcher.py",
    "ops/layernorm.py",
    "ops/linear.py",
    "ops/moe/experts_selector.py",
    "ops/moe/moe_comm_method.py",
    "ops/moe/moe_mlp.py",
    "ops/moe/token_dispatcher.py",
    "ops/register_custom_ops.py",
    "ops/rotary_embedding.py",
    "ops/vocab_parallel_embedding.py",
    "sample/sampler.py",
    "utils.py",
    "worker/block_table.py",
    "worker/model_runner_v1.py",
    "worker/worker.py",
    "worker/worker_v1.py",
)
"""Files of vllm-ascend 0.11 to 0.30 that an eager step of an unquantised Qwen model passes through."""

OFF_THE_PATH = {
    "quantised models": """
        dequant_situ_quant dispatch_ffn_combine dispatch_gmm_combine_decode grouped_matmul_situ_quant_weight_nz
        grouped_matmul_swiglu_quant_v2 grouped_matmul_swiglu_quant_weight_nz
        grouped_matmul_swiglu_quant_weight_nz_tensor_list npu_add_rms_norm_quant npu_dequant_swiglu_quant
        npu_dynamic_mx_quant npu_dynamic_quant npu_grouped_matmul_swiglu_quant
        npu_grouped_matmul_swiglu_quant_v2 npu_quant_matmul npu_quantize npu_swiglu_group_quant situ_mx_quant""",
    "MLA, sparse attention and linear attention": """
        indexer_compress_epilog_v2 inplace_partial_rotary_mul kv_compress_epilog mla_preprocess
        npu_fused_gdn_gating npu_gather_pa_kv_cache npu_kv_quant_sparse_attn_sharedkv
        npu_kv_quant_sparse_attn_sharedkv_metadata npu_kv_quant_sparse_flash_attention
        npu_kv_quant_sparse_flash_attention_vllm npu_lightning_indexer npu_lightning_indexer_quant
        npu_mla_prolog_v2 npu_mla_prolog_v3 npu_paged_cache_load npu_quant_lightning_indexer
        npu_scatter_nd_update_sk npu_scatter_nd_update_v2 npu_sparse_attn_sharedkv
        npu_sparse_attn_sharedkv_metadata npu_sparse_flash_attention""",
    "other models' gates, norms and activations": """
        moe_gating_top_k_hash npu_clipped_swiglu npu_fast_gelu npu_gemma_rms_norm""",
    "vision encoders": "_npu_flash_attention_unpad",
    "graph capture": """
        _npu_fused_infer_attention_score_get_max_workspace _npu_fused_infer_attention_score_v2_get_max_workspace
        _npu_paged_attention_get_workspace weak_ref_tensor""",
    "MC2, which communicates in the operator: A3, or 16 ranks": """
        npu_mm_reduce_scatter_base npu_moe_distribute_combine npu_moe_distribute_combine_v2
        npu_moe_distribute_dispatch npu_moe_distribute_dispatch_v2""",
    "options that are off unless asked for (weight prefetch, printing)": """
        device_print device_print_tensor npu_prefetch""",
    "memory and runtime, kept as they are": "empty_with_format get_npu_format npu_format_cast",
    "speculative decoding": "npu_ngram_spec_decode",
}


def operators_called(source: str) -> set[str]:
    """Names of operators in `torch_npu.<name>`, `torch_npu.atb.<name>`, `torch.ops.npu.<name>` and `_C_ascend`'s."""
    prefixes = ("torch_npu", "torch_npu.atb", "torch.ops.npu", "torch.ops.atb", "torch.ops._C_ascend")
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in prefixes:
            own = ast.unparse(node.value) == "torch.ops._C_ascend"
            if own or node.attr.startswith(("npu_", "_npu_", "empty_with_format", "get_npu_format")):
                found.add(node.attr)
    return found


def test_every_operator_on_vllm_ascends_path_is_implemented_or_known_to_be_off_it() -> None:
    spec = importlib.util.find_spec("vllm_ascend")
    if spec is None:
        pytest.skip("vllm-ascend is not installed")
    folder = Path(spec.submodule_search_locations[0])
    called = {file: operators_called((folder / file).read_text()) for file in PATH if (folder / file).exists()}
    assert len(called) > 10
    library_operator("")
    implemented = {name.partition("::")[2] for name in registry.IMPLEMENTED}
    known = {name for names in OFF_THE_PATH.values() for name in names.split()}
    unknown = {file: sorted(names - implemented - known) for file, names in called.items()}
    assert {file: names for file, names in unknown.items() if names} == {}
    assert "npu_rms_norm" in called["ops/layernorm.py"]
    assert not implemented & known
