"""FRACTAL_NZ as a real re-layout: what torch_npu gets right with it, what it refuses, and where the numbers go wrong.

Real torch-npu on a stand-in CANN.  The layout in these tests is written apart from kernels/fractal_nz.cpp, element by
element, from CANN's documentation, "Data Formats": (..., M, N) lies as (..., N1, M1, M0, N0), N1 = ceil(N / N0),
M1 = ceil(M / M0).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("fake_npu.formats", reason="runs in the emulator's environment: make npu")
import torch_npu

ND, NZ = 2, 29


@pytest.fixture(autouse=True)
def internal_format() -> Iterator[None]:
    """torch_npu casts to a private format only where this is on, as vllm-ascend sets it for its NZ weights."""
    torch.npu.config.allow_internal_format = True
    yield
    torch.npu.config.allow_internal_format = False


def random(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    values = torch.arange(torch.Size(sizes).numel()).view(sizes) * 37 % 101 - 50
    return values.to(dtype)


def cast(values: torch.Tensor) -> torch.Tensor:
    result = torch_npu.npu_format_cast(values.npu(), NZ)
    assert is_nz(result)
    return result


def is_nz(tensor: torch.Tensor) -> bool:
    return int(torch.ops.npu.get_npu_format(tensor)) == NZ


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of the storage in the order of addresses, on the host."""
    flat = torch.empty(0, dtype=tensor.dtype, device="npu").set_(tensor.untyped_storage())
    host = torch.ops.fake_npu.host_alias(tensor).as_strided((flat.numel(),), (1,), 0)
    return host.clone()


def fractal(values: torch.Tensor, n0: int) -> torch.Tensor:
    """FRACTAL_NZ by its definition: element (m, n) lies at (n // n0, m // 16, m % 16, n % n0)."""
    *batch, rows, columns = values.shape
    m1, n1 = -(-rows // 16), -(-columns // n0)
    result = torch.zeros(*batch, n1, m1, 16, n0, dtype=values.dtype)
    for m in range(rows):
        for n in range(columns):
            result[..., n // n0, m // 16, m % 16, n % n0] = values[..., m, n]
    return result


@pytest.mark.parametrize("dtype,n0", [(torch.bfloat16, 16), (torch.float16, 16), (torch.int8, 32), (torch.float32, 16)])
@pytest.mark.parametrize("sizes", [(16, 32), (20, 40), (3, 17, 33), (2, 2, 5, 7)], ids=str)
def test_layout(sizes: tuple[int, ...], dtype: torch.dtype, n0: int) -> None:
    values = random(*sizes, dtype=dtype)
    weight = cast(values)
    assert weight.shape == values.shape and weight.stride() == values.stride()
    expected = fractal(values, n0).flatten()
    assert torch.equal(raw(weight)[: expected.numel()], expected)
    assert torch.ops.npu.get_storage_size(weight) == expected.numel()
    assert torch.equal(weight.cpu(), values)
    back = torch_npu.npu_format_cast(weight, ND)
    assert not is_nz(back) and torch.equal(raw(back)[: values.numel()], values.flatten())


def test_a_cast_to_the_present_format_gives_the_tensor_itself() -> None:
    weight = cast(random(16, 16))
    assert torch_npu.npu_format_cast(weight, NZ).data_ptr() == weight.data_ptr()
    plain = random(16, 16).npu()
    assert torch_npu.npu_format_cast(plain, ND).data_ptr() == plain.data_ptr()


def test_a_cast_in_place() -> None:
    values = random(20, 24)
    weight = values.npu()
    assert torch_npu.npu_format_cast_(weight, NZ) is weight
    assert is_nz(weight) and torch.equal(weight.cpu(), values)


def test_one_dimension_stays_nd() -> None:
    assert not is_nz(torch_npu.npu_format_cast(random(20).npu(), NZ))


def test_without_internal_formats_a_cast_stays_nd() -> None:
    torch.npu.config.allow_internal_format = False
    values = random(20, 20)
    weight = torch_npu.npu_format_cast(values.npu(), NZ)
    assert not is_nz(weight) and torch.equal(weight.cpu(), values)


def test_a_cast_has_a_gradient() -> None:
    values = random(16, 16, dtype=torch.float32).npu().requires_grad_()
    torch_npu.npu_format_cast(values, NZ).sum().backward()
    assert torch.equal(values.grad.cpu(), torch.ones(16, 16))


def test_matmuls_take_it() -> None:
    values, weight = random(5, 24, dtype=torch.float32), random(40, 24, dtype=torch.float32)
    bias, experts = random(40, dtype=torch.float32), random(3, 24, 40, dtype=torch.float32)
    nz, nz_experts = cast(weight), cast(experts)
    left = values.npu()
    assert torch.equal(F.linear(left, nz).cpu(), F.linear(values, weight))
    assert torch.equal(F.linear(left, nz, bias.npu()).cpu(), F.linear(values, weight, bias))
    assert torch.equal((left @ nz.t()).cpu(), values @ weight.t())
    assert torch.equal(torch.mm(left, nz.transpose(0, 1)).cpu(), values @ weight.t())
    batch = values.expand(3, 5, 24)
    assert torch.equal(torch.bmm(batch.npu(), nz_experts).cpu(), batch @ experts)
    assert torch.equal((left @ nz_experts[1]).cpu(), values @ experts[1])


def test_other_operators_convert() -> None:
    values = random(20, 40)
    weight = cast(values)
    assert torch.equal((weight + 1).cpu(), values + 1)
    assert torch.equal(weight.float().cpu(), values.float())
    assert torch.equal(weight.t().contiguous().cpu(), values.t().contiguous())
    assert torch.equal(torch.cat([weight, weight]).cpu(), torch.cat([values, values]))
    weight.mul_(2)
    assert is_nz(weight) and torch.equal(weight.cpu(), values * 2)
    assert torch.equal(raw(weight)[: 48 * 32], fractal(values * 2, 16).flatten())


def test_operators_without_a_legacy_kernel_refuse_it() -> None:
    with pytest.raises(RuntimeError, match="Current operator isin do not support internal format"):
        torch.isin(cast(random(16, 16)), torch.ones(1, dtype=torch.bfloat16, device="npu"))


def test_other_private_formats_and_dtypes_are_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"no format 4: add it to .*fractal_nz\.cpp"):
        torch_npu.npu_format_cast(random(16, 16).npu(), 4)
    with pytest.raises(RuntimeError, match="customize_dtype is not supported"):
        torch_npu.npu_format_cast(random(16, 16).npu(), NZ, customize_dtype=torch.int8)


def test_base_format_for_reference_operators() -> None:
    values = random(3, 20, 40)
    plain = torch.ops.fake_npu.base_format(cast(values)[1])
    assert not is_nz(plain) and plain.device.type == "npu" and torch.equal(plain.cpu(), values[1])
    tensor = values.npu()
    assert torch.ops.fake_npu.base_format(tensor).data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("place", ["cpu", "npu"])
def test_copies_to_the_whole_tensor_are_right(place: str) -> None:
    weight, values = cast(torch.zeros(3, 20, 40)), random(3, 20, 40)
    weight.copy_(values.to(place))
    assert is_nz(weight) and torch.equal(weight.cpu(), values)


def test_reading_a_view_is_right() -> None:
    values = random(3, 20, 40)
    weight = cast(values)
    assert torch.equal(weight[1].cpu(), values[1])
    assert torch.equal(weight[:, 3:7, ::2].clone().cpu(), values[:, 3:7, ::2])
    assert weight[2, 3, 4].item() == values[2, 3, 4]


def test_a_copy_on_the_device_to_a_view_is_right() -> None:
    values = random(3, 20, 40)
    weight = cast(values)
    weight[1].copy_(torch.ones(20, 40, dtype=torch.bfloat16, device="npu"))
    expected = values.clone()
    expected[1] = 1
    assert torch.equal(weight.cpu(), expected)


def test_a_copy_from_the_host_to_a_view_destroys_other_elements() -> None:
    """What loading one expert from the host into a FRACTAL_NZ weight does: expert 0 is gone, expert 1 stays stale."""
    values, loaded = random(3, 20, 40), torch.ones(20, 40, dtype=torch.bfloat16)
    weight = cast(values)
    weight[1].copy_(loaded)
    assert torch.equal(weight[1].cpu(), values[1])
    assert torch.equal(weight[0].cpu(), loaded)
    plain = values.npu()
    plain[1].copy_(loaded)
    assert torch.equal(plain[1].cpu(), loaded)


def test_bytes_handled_by_address_are_not_converted() -> None:
    """What a peer that receives raw memory (HCCL, an IPC handle) takes for ND."""
    values = random(32, 32)
    weight = cast(values)
    received = torch.ops.fake_npu.host_alias(weight).clone()
    assert not torch.equal(received, values)
    assert torch.equal(received.flatten(), fractal(values, 16).flatten())
