"""aten operators of device "npu": which the CPU kernels run, which stay torch_npu's, and which need something more.

Stands in for the kernels behind torch_npu's PrivateUse1 registrations of ``aten::`` operators.  What torch_npu has
registered is read from PyTorch's dispatcher, so one table serves torch-npu 2.7.1 to 2.14.  Left out: fused operators of
torch_npu itself (``npu::``, ``atb::``), which are in ``fake_npu/operators``.

To add an operator: if the CPU kernel refuses a dtype that the NPU takes, add a line to ``COMPUTE_IN``; if PyTorch has
no CPU kernel of it at all, add a plain-torch definition to ``ADDITIONS``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from . import formats

LIBRARY = Path(__file__).with_name("fake_npu_kernels.so")

# torch_npu's own code is kept where it manages memory, storages and metadata: that needs no kernel, only the runtime.
KEPT = frozenset(
    {
        "_has_compatible_shallow_copy_type",
        "_pin_memory",
        "_to_sparse",
        "_to_sparse.sparse_dim",
        "contiguous",
        "copy_memory_",
        "empty.memory_format",
        "empty_like",
        "empty_strided",
        "empty_with_format",
        "empty_with_swapped_memory",
        "get_storage_size",
        "is_pinned",
        "is_set_to",
        "new_empty_strided",
        "record_stream",
        "unsafe_empty_with_format",
    }
)

# kernels/copies.cpp has these.
COPIES = frozenset({"_copy_from", "_copy_from_and_resize", "_local_scalar_dense", "_to_copy", "copy_"})

# Operators whose CPU kernel refuses dtypes that the NPU takes, and the dtype in which to compute them instead.
COMPUTE_IN: dict[str, torch.dtype] = {
    "histc": torch.float64,  # transformers' grouped-mm experts call it on int32
}


def _matmul_into(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``mm.dtype`` and its like: half inputs, float32 result, accumulated in float32."""

    def with_dtype(self: torch.Tensor, other: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        return product(self.to(out_dtype), other.to(out_dtype))

    return with_dtype


def _addmatmul_into(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def with_dtype(
        self: torch.Tensor,
        left: torch.Tensor,
        right: torch.Tensor,
        out_dtype: torch.dtype,
        *,
        beta: float = 1,
        alpha: float = 1,
    ) -> torch.Tensor:
        return product(self.to(out_dtype), left.to(out_dtype), right.to(out_dtype), beta=beta, alpha=alpha)

    return with_dtype


def _fused_sdp_choice(*_arguments: object, **_keywords: object) -> int:
    """SDPBackend.MATH: the CPU's own choice names a flash kernel that takes CPU tensors only."""
    return 0


def _matmul_backward(
    grad: torch.Tensor, self: torch.Tensor, other: torch.Tensor, mask: list[bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Both derivatives of ``self @ other``, which torch-npu 2.7 to 2.9 have as one operator."""
    left = self.unsqueeze(0) if self.dim() == 1 else self
    right = other.unsqueeze(-1) if other.dim() == 1 else other
    grad = grad.unsqueeze(-1) if other.dim() == 1 else grad
    grad = grad.unsqueeze(-2) if self.dim() == 1 else grad
    if right.dim() == 2:  # one product, so that all rows are added up in float32
        left, grad = left.reshape(-1, left.shape[-1]), grad.reshape(-1, grad.shape[-1])
    to_self = (grad @ right.mT).sum_to_size(left.shape).reshape(self.shape) if mask[0] else None
    to_other = (left.mT @ grad).sum_to_size(right.shape).reshape(other.shape) if mask[1] else None
    return to_self, to_other


# Plain-torch definitions of operators that no CPU kernel can run.
ADDITIONS: dict[str, Callable[..., object]] = {
    "_fused_sdp_choice": _fused_sdp_choice,
    "addmm.dtype": _addmatmul_into(torch.addmm),
    "baddbmm.dtype": _addmatmul_into(torch.baddbmm),
    "bmm.dtype": _matmul_into(torch.bmm),
    "matmul_backward": _matmul_backward,
    "mm.dtype": _matmul_into(torch.mm),
}


def _cast(self: torch.Tensor, dtype: int | torch.dtype, *_input_dtype: object) -> torch.Tensor:
    return torch.ops.aten._to_copy(self, dtype=dtype)


def _cast_in_place(self: torch.Tensor, source: torch.Tensor, *_input_dtype: object) -> torch.Tensor:
    return self.copy_(source)


# torch_npu's spellings of the aten casts.
DTYPE_CASTS: dict[str, Callable[..., torch.Tensor]] = {
    "_npu_dtype_cast": _cast,
    "_npu_dtype_cast_backward": _cast,
    "npu_dtype_cast": _cast,
    "npu_dtype_cast_": _cast_in_place,
    "npu_dtype_cast_backward": _cast,
}

_libraries: list[torch.library.Library] = []
_lacking: list[str] = []


def _registered(key: str) -> list[str]:
    """aten operators ("name.overload") with a kernel for a dispatch key, without the few that have no schema."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return sorted(
        name.removeprefix("aten::")
        for name in names
        if name.startswith("aten::") and torch._C._dispatch_has_kernel(name) and _overload(name) is not None
    )


def _overload(name: str) -> torch._ops.OpOverload | None:
    base, _, overload = name.removeprefix("aten::").partition(".")
    packet = getattr(torch.ops.aten, base, None)
    return None if packet is None else getattr(packet, overload or "default", None)


def _is_view(operator: torch._ops.OpOverload) -> bool:
    """Gives or becomes another view of the same storage: metadata only, torch_npu's own."""
    views = (r.alias_info is not None and not r.alias_info.is_write for r in operator._schema.returns)
    return any(views) or torch.Tag.inplace_view in operator.tags


def run_by_cpu_kernels() -> list[str]:
    """The operators that torch_npu registers and that the CPU kernels shall run."""
    other = KEPT | COPIES | ADDITIONS.keys()
    return [name for name in _registered("PrivateUse1") if name not in other and not _is_view(_overload(name))]


def lacking() -> list[str]:
    """Operators of torch_npu without a CPU kernel: a call raises NotImplementedError that names the operator."""
    return list(_lacking)


def install() -> None:
    """Load the kernels and install them.  torch_npu must be imported.  A second call does nothing.

    Raises OSError where the library is missing or was built against another torch.
    """
    if _libraries:
        return
    # Before the kernels add to the list.
    names = run_by_cpu_kernels()
    autograd = [name for name in _registered("AutogradPrivateUse1") if name not in KEPT]
    torch.ops.load_library(str(LIBRARY))
    kernels = torch.ops.fake_npu
    _lacking.extend(kernels.install(names))
    kernels.install_autograd(autograd)
    for name, dtype in COMPUTE_IN.items():
        kernels.compute_in(name, dtype)
    for namespace, table in (("aten", ADDITIONS), ("npu", DTYPE_CASTS | formats.CASTS)):
        library = torch.library.Library(namespace, "IMPL")
        for name, definition in table.items():
            if torch._C._dispatch_has_kernel(f"{namespace}::{name}"):  # older releases lack some
                library.impl(name, definition, "PrivateUse1")
        _libraries.append(library)
