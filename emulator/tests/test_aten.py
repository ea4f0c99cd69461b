"""aten operators on device "npu": the CPU kernels' results, bit for bit, and torch_npu's own memory management.

Real torch-npu on a stand-in CANN.  Not shown: the numerics of an NPU.
"""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

fake_aten = pytest.importorskip("fake_npu.aten", reason="runs in the emulator's environment: make npu")
import torch_npu  # noqa: E402

NPU = torch.device("npu")


def same(on_npu: object, on_cpu: object) -> None:
    """Same type, device kind, dtype, sizes and bits."""
    if isinstance(on_cpu, tuple | list):
        assert isinstance(on_npu, tuple | list) and len(on_npu) == len(on_cpu)
        for one, other in zip(on_npu, on_cpu, strict=True):
            same(one, other)
        return
    if not isinstance(on_cpu, torch.Tensor):
        assert on_npu == on_cpu
        return
    assert isinstance(on_npu, torch.Tensor) and on_npu.device.type == "npu"
    assert on_npu.stride() == on_cpu.stride()
    torch.testing.assert_close(on_npu.detach().cpu(), on_cpu.detach(), rtol=0, atol=0, equal_nan=True)


def random(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(*sizes, generator=generator).to(dtype)
    return torch.randint(0, 7, sizes, generator=generator).to(dtype)


OPERATORS: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "add": lambda a, b: a + b,
    "scalar": lambda a, b: 2 - a * 3,
    "in place": lambda a, b: a.mul_(b).add_(1),
    "matmul": lambda a, b: a @ b.t(),
    "reduce": lambda a, b: (a.sum(), a.mean(0), a.amax(1), a.argmax(-1), a.std()),
    "sort": lambda a, b: torch.sort(a, dim=1),
    "topk": lambda a, b: a.topk(2),
    "cat": lambda a, b: torch.cat([a, b], 1),
    "stack": lambda a, b: torch.stack((a, b)),
    "chunk": lambda a, b: a.chunk(2, 1),
    "split": lambda a, b: a.split([1, 3], 1),
    "where": lambda a, b: torch.where(a > b, a, b),
    "mask": lambda a, b: a[a > 0],
    "masked fill": lambda a, b: a.masked_fill(b > 0, float("-inf")),
    "nonzero": lambda a, b: (a > 0).nonzero(),
    "index": lambda a, b: a[torch.tensor([0, 2], device=a.device), 1:],
    "index by host": lambda a, b: a[torch.tensor([0, 2])],
    "index put": lambda a, b: a.index_put_((torch.tensor([1], device=a.device),), b[0]),
    "gather": lambda a, b: a.gather(1, b.argsort(1)),
    "scatter": lambda a, b: torch.zeros_like(a).scatter_(1, b.argsort(1), a),
    "index add": lambda a, b: a.index_add_(0, torch.tensor([0, 0, 1], device=a.device), b),
    "softmax": lambda a, b: (a.softmax(-1), a.log_softmax(0)),
    "cumsum": lambda a, b: a.cumsum(1),
    "transposed": lambda a, b: a.t().contiguous(),
    "permuted": lambda a, b: a.view(3, 2, 2).permute(2, 0, 1) + 1,
    "expand": lambda a, b: a[:1].expand(3, 4) * b,
    "repeat": lambda a, b: (a.repeat(2, 1), a.repeat_interleave(2, 0)),
    "tril": lambda a, b: a.tril(),
    "clamp": lambda a, b: a.clamp(-0.5, 0.5),
    "norm": lambda a, b: torch.linalg.vector_norm(a),
    "layer norm": lambda a, b: F.layer_norm(a, (4,), b[0], b[1]),
    "unique": lambda a, b: torch.unique(a.round(), return_counts=True),
    "bincount": lambda a, b: torch.bincount(a.abs().long().flatten()),
    "einsum": lambda a, b: torch.einsum("ij,kj->ik", a, b),
    "foreach": lambda a, b: torch._foreach_add([a, b], 2.0),
    "foreach in place": lambda a, b: (torch._foreach_mul_([a, b], 3.0), a, b)[1:],
    "foreach norm": lambda a, b: torch._foreach_norm([a, b]),
    "equal": lambda a, b: (torch.equal(a, a), torch.equal(a, b)),
    "complex": lambda a, b: torch.view_as_real((torch.complex(a, b).conj() * 2).resolve_conj()),
    "fourier": lambda a, b: torch.view_as_real(torch.fft.rfft(a)),
    "pad": lambda a, b: F.pad(a, (1, 2)),
    "one hot": lambda a, b: F.one_hot(a.argmax(-1), 4),
    "searchsorted": lambda a, b: torch.searchsorted(a.sort(1).values, b),
    "lerp": lambda a, b: a.lerp(b, 0.3),
    "max of two": lambda a, b: torch.maximum(a, b),
    "isfinite": lambda a, b: torch.isfinite(a / 0),
    "roll": lambda a, b: a.roll(1, 0),
    "nan_to_num": lambda a, b: (a / 0).nan_to_num(),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_same_bits_as_the_cpu(name: str) -> None:
    first, second = random(3, 4), random(3, 4, seed=1)
    same(OPERATORS[name](first.npu(), second.npu()), OPERATORS[name](first.clone(), second.clone()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64, torch.uint8])
def test_dtypes(dtype: torch.dtype) -> None:
    first, second = random(4, 4, dtype=dtype), random(4, 4, dtype=dtype, seed=1)
    for function in (lambda a, b: a + b * 2, lambda a, b: a @ b, lambda a, b: (a.sum(), a.max(), a > b)):
        same(function(first.npu(), second.npu()), function(first, second))


CASTS = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.bool)


@pytest.mark.parametrize("wanted", CASTS)
def test_casts(wanted: torch.dtype) -> None:
    values = random(5, 3)
    same(values.npu().to(wanted), values.to(wanted))
    same(values.to("npu", wanted), values.to(wanted))
    same(torch.ops.npu.npu_dtype_cast(values.npu(), wanted), values.to(wanted))
    torch.testing.assert_close(values.npu().to("cpu", wanted), values.to(wanted), rtol=0, atol=0)


def test_a_cast_of_torch_npu_has_a_gradient() -> None:
    values = random(3).npu().requires_grad_()
    torch_npu.npu_dtype_cast(values, torch.float16).sum().backward()
    assert values.grad.dtype == torch.float32 and values.grad.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "make",
    [
        lambda device: torch.zeros(2, 3, device=device),
        lambda device: torch.ones(3, dtype=torch.int8, device=device),
        lambda device: torch.full((2, 2), 7.5, device=device),
        lambda device: torch.arange(2, 9, 3, device=device),
        lambda device: torch.linspace(0, 1, 5, device=device),
        lambda device: torch.eye(3, device=device),
        lambda device: torch.tensor([[1, 2], [3, 4]], device=device),
        lambda device: torch.tensor(3.5, device=device),
        lambda device: torch.zeros(0, 4, device=device),
        lambda device: torch.empty(0, device=device).sum(),
        lambda device: torch.zeros(2, 0, device=device) @ torch.zeros(0, 3, device=device),
        lambda device: torch.triu_indices(3, 3, device=device),
    ],
)
def test_factories_and_empty_tensors(make: Callable[[str], torch.Tensor]) -> None:
    same(make("npu"), make("cpu"))


def test_scalars_come_to_the_host() -> None:
    value = torch.tensor([1.5, 2.0], device=NPU)
    assert value[0].item() == 1.5
    assert int(value[1]) == 2
    assert bool((value > 1).all())
    assert value.tolist() == [1.5, 2.0]
    assert "device='npu:0'" in repr(value)


def test_views_share_the_storage() -> None:
    base = torch.zeros(4, 6, device=NPU)
    base.view(6, 4)[0].fill_(1)
    base.as_strided((2,), (7,), 8).add_(2)
    base[:, 1:3].t()[0].mul_(5)
    base.unsqueeze(0).narrow(2, 5, 1).copy_(torch.full((1, 4, 1), 9.0))
    expected = torch.zeros(4, 6)
    expected.view(6, 4)[0].fill_(1)
    expected.as_strided((2,), (7,), 8).add_(2)
    expected[:, 1:3].t()[0].mul_(5)
    expected[:, 5] = 9
    same(base, expected)
    assert base.expand(2, 4, 6).untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
    assert torch.ops.aten._unsafe_view(base, [24]).data_ptr() == base.data_ptr()


def test_out_variants() -> None:
    first, second = random(3, 4).npu(), random(3, 4, seed=1).npu()
    wide = torch.zeros(3, 8, device=NPU)
    out = wide[:, ::2]
    assert torch.add(first, second, out=out) is out
    same(wide[:, ::2].contiguous(), (first + second).cpu())
    assert wide[:, 1::2].count_nonzero() == 0
    grown = torch.empty(0, device=NPU)
    torch.mul(first, second, out=grown)
    same(grown, (first * second).cpu())
    shrunk = torch.empty(0, 4, device=NPU)
    torch.index_select(first, 0, torch.tensor([2, 1], device=NPU), out=shrunk)
    same(shrunk, first.cpu()[[2, 1]])


def test_resize_keeps_the_bytes() -> None:
    values = torch.arange(4.0, device=NPU)
    assert values.resize_(8)[:4].tolist() == [0, 1, 2, 3]


class Network(torch.nn.Module):
    """A small causal language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 8)
        self.norm = torch.nn.LayerNorm(8)
        self.project = torch.nn.Linear(8, 24)
        self.head = torch.nn.Linear(8, 11, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        query, key, value = (
            x.view(*tokens.shape, 2, 4).transpose(1, 2) for x in self.project(self.norm(hidden)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + F.silu(attended.transpose(1, 2).reshape(hidden.shape))
        return F.cross_entropy(self.head(hidden).flatten(0, 1), tokens.roll(-1, 1).flatten())


def train(device: str, **options: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    network = Network().to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, **options)
    tokens = (torch.arange(12).view(2, 6) * 5 % 11).to(device)
    losses = []
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for _ in range(3):
            loss = network(tokens)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
            optimizer.step()
            losses += [loss.detach(), norm]
    return [*losses, *(p.grad for p in network.parameters()), *network.parameters()]


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_training_has_the_same_bits(options: dict[str, bool]) -> None:
    same(train("npu", **options), train("cpu", **options))


def test_autocast() -> None:
    layer = torch.nn.Linear(4, 3)
    values = random(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = layer(values)
    expected.float().sum().backward()
    expected_gradient = layer.weight.grad.clone()
    layer = copy.deepcopy(layer).npu()
    layer.zero_grad()
    with torch.autocast("npu", dtype=torch.bfloat16):
        result = layer(values.npu())
        assert F.softmax(result, -1).dtype == torch.float32
    assert result.dtype == torch.bfloat16
    result.float().sum().backward()
    same(result, expected)
    same(layer.weight.grad, expected_gradient)


def test_checkpointing_and_dropout_repeat_the_mask() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Dropout(0.5)).npu()
    values = random(4, 16).npu().requires_grad_()
    torch.npu.manual_seed(3)
    plain = layer(values)
    torch.npu.manual_seed(3)
    again = torch.utils.checkpoint.checkpoint(layer, values, use_reentrant=False)
    assert torch.equal(plain, again)
    (gradient,) = torch.autograd.grad(again.sum(), values)
    (expected,) = torch.autograd.grad(plain.sum(), values)
    assert torch.equal(gradient, expected) and 0 < (plain == 0).sum() < plain.numel()


def test_seeds_decide_the_random_numbers() -> None:
    def draw() -> list[torch.Tensor]:
        return [
            torch.randn(5, device=NPU),
            torch.rand(3, 2, device=NPU),
            torch.randint(0, 100, (8,), device=NPU),
            torch.empty(4, device=NPU).exponential_(),
            torch.multinomial(torch.ones(6, device=NPU), 3),
            torch.randperm(9, device=NPU),
            F.dropout(torch.ones(32, device=NPU)),
            torch.bernoulli(torch.full((16,), 0.5, device=NPU)),
        ]

    torch.manual_seed(5)
    first = draw()
    torch.npu.manual_seed(5)
    assert all(map(torch.equal, first, draw()))
    assert not torch.equal(first[0], torch.randn(5, device=NPU))
    state = torch.npu.get_rng_state()
    second = draw()
    torch.npu.set_rng_state(state)
    assert all(map(torch.equal, second, draw()))
    torch.manual_seed(6)
    assert not torch.equal(first[0], torch.randn(5, device=NPU))


def test_a_generator_of_its_own() -> None:
    generator = torch.Generator(device=NPU).manual_seed(4)
    first = torch.randn(3, device=NPU, generator=generator)
    second = torch.randn(3, device=NPU, generator=generator)
    assert not torch.equal(first, second)
    assert torch.equal(first, torch.empty(3, device=NPU).normal_(generator=generator.manual_seed(4)))
    with pytest.raises(RuntimeError, match="'npu' device type for generator but found 'cpu'"):
        torch.empty(3, device=NPU).normal_(generator=torch.Generator())


def test_sampling_on_the_npu_leaves_the_cpu_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.randn(2)
    torch.manual_seed(1)
    F.dropout(torch.randn(9, device=NPU))
    assert torch.equal(torch.randn(2), expected)


def test_save_and_load(tmp_path: Path) -> None:
    values = random(3, 4).npu()
    torch.save({"all": values, "row": values[1]}, tmp_path / "file.pt")
    loaded = torch.load(tmp_path / "file.pt")
    same(loaded["all"], values.cpu())
    same(loaded["row"], values[1].cpu())
    same(torch.load(tmp_path / "file.pt", map_location="npu:0")["all"], values.cpu())
    on_cpu = torch.load(tmp_path / "file.pt", map_location="cpu")["all"]
    assert on_cpu.device.type == "cpu" and torch.equal(on_cpu, values.cpu())
    buffer = io.BytesIO()
    layer = torch.nn.Linear(2, 2).npu()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    layer.load_state_dict(torch.load(buffer))


def test_deepcopy_is_apart() -> None:
    layer = torch.nn.Linear(2, 2).npu()
    twin = copy.deepcopy(layer)
    twin.weight.data.zero_()
    assert twin.weight.device.type == "npu" and layer.weight.abs().sum() > 0


def test_pinned_memory_and_non_blocking_copies() -> None:
    host = random(6).pin_memory()
    assert host.is_pinned() and not random(6).is_pinned()
    values = host.to(NPU, non_blocking=True)
    back = torch.empty(6, pin_memory=True)
    back.copy_(values, non_blocking=True)
    torch.npu.synchronize()
    assert torch.equal(back, host)
    assert values.to("cpu", non_blocking=True).is_pinned()


def test_memory_is_freed() -> None:
    torch.npu.synchronize()
    before = torch.npu.memory_allocated()
    values = torch.ones(1 << 20, device=NPU)
    one = torch.npu.memory_allocated() - before
    assert 1 << 22 <= one < (1 << 22) + 4096  # torch_npu pads a block
    product = values.view(1024, 1024) @ values.view(1024, 1024)
    part = product[:10]
    assert torch.npu.memory_allocated() - before == 2 * one
    del values, product
    gc.collect()
    assert torch.npu.memory_allocated() - before == one  # the view holds the storage
    del part
    gc.collect()
    assert torch.npu.memory_allocated() == before


def test_histc_of_integers() -> None:
    values = torch.tensor([0, 1, 1, 3], dtype=torch.int32)
    result = torch.histc(values.npu(), 4, 0, 3)
    same(result, torch.tensor([1, 2, 0, 1], dtype=torch.int32))
    same(torch.histc(random(9).npu(), 3, -1, 1), torch.histc(random(9), 3, -1, 1))


def test_matmul_with_a_wider_result() -> None:
    first, second = random(3, 4, dtype=torch.bfloat16), random(4, 5, dtype=torch.bfloat16)
    result = torch.ops.aten.mm.dtype(first.npu(), second.npu(), torch.float32)
    same(result, first.float() @ second.float())


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((4, 3), (3, 5)),
        ((2, 4, 3), (3, 5)),
        ((2, 4, 3), (2, 3, 5)),
        ((2, 1, 4, 3), (6, 3, 5)),
        ((3,), (3, 5)),
        ((3,), (3,)),
    ],
)
def test_matmul_has_both_gradients(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    """Also those of inputs that were broadcast; torch-npu before 2.10 has them as one operator."""
    found = []
    for device in ("cpu", "npu"):
        inputs = [random(*sizes).to(device).requires_grad_() for sizes in (left, right)]
        found.append(torch.autograd.grad(torch.matmul(*inputs).square().sum(), inputs))
    for on_cpu, on_npu in zip(*found, strict=True):
        torch.testing.assert_close(on_npu.cpu(), on_cpu)


def test_a_missing_operator_says_so() -> None:
    values = random(2, 3, 3).npu()
    assert "batch_norm_stats" in fake_aten.lacking()
    with pytest.raises(NotImplementedError, match=r"aten::batch_norm_stats .*fake_npu/aten\.py"):
        torch.batch_norm_stats(values, 1e-5)
    with pytest.raises(NotImplementedError, match=r"aten::histc.out .*fake_npu/aten\.py"):
        torch.histc(values.int(), 3, out=torch.empty(0, dtype=torch.int32, device=NPU))


def test_errors_are_pytorchs() -> None:
    with pytest.raises(RuntimeError, match="must match the size of tensor b"):
        torch.zeros(2, device=NPU) + torch.zeros(3, device=NPU)
    with pytest.raises(IndexError):
        torch.zeros(2, device=NPU)[5]


def test_calls_are_counted() -> None:
    torch.ops.fake_npu.count_calls(True)
    values = torch.ones(2, 2, device=NPU)
    values @ values + values + values
    calls = torch.ops.fake_npu.calls()
    torch.ops.fake_npu.count_calls(False)
    assert calls["mm"] == 1 and calls["add.Tensor"] == 2 and "sub.Tensor" not in calls
