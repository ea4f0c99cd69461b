"""torch_npu's format casts, ``npu_format_cast`` and its like, between ND and FRACTAL_NZ.

Stands in for torch_npu's FormatCastKernelNpu.cpp with CANN below 9.1: there a cast converts the whole storage and
gives the result the sizes, strides and offset of the tensor that was asked for.  The re-layout is
kernels/fractal_nz.cpp, which also says what it leaves out.  Allocation, and with it the rules for tensors that stay ND
(fewer than two dimensions, ``torch.npu.config.allow_internal_format = False``), is torch_npu's own.
"""

from __future__ import annotations

import mmap
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

FRACTAL_NZ = 29
# ND, NCHW, NHWC, NDHWC, NCDHW ("aclFormat", CANN documentation): only the description of the storage differs.
BASE_FORMATS = frozenset({0, 1, 2, 27, 30})

_REFUSAL = re.compile(rb"\0Current operator (\w+) do not support internal format\.")


@cache
def refusing_operators() -> tuple[str, ...]:
    """Functions of the installed torch_npu that take no private format, from the messages in libtorch_npu.so."""
    import torch_npu

    library = Path(torch_npu.__file__).parent / "lib" / "libtorch_npu.so"
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        names = {match.group(1).decode() for match in _REFUSAL.finditer(content)}
    if not names:
        raise RuntimeError(f"{library} has no message of the form {_REFUSAL.pattern!r}: adapt fake_npu/formats.py")
    return tuple(sorted(names))


def _check(acl_format: int, customize_dtype: object) -> None:
    if acl_format != FRACTAL_NZ and acl_format not in BASE_FORMATS:
        raise NotImplementedError(f"fake_npu: no format {acl_format}: add it to emulator/kernels/fractal_nz.cpp")
    if customize_dtype is not None:
        # What torch_npu says with CANN below 9.1.
        raise RuntimeError("customize_dtype is not supported by the current soc version.")


def _format_of(tensor: torch.Tensor) -> int:
    return int(torch.ops.npu.get_npu_format(tensor))


def cast(self: torch.Tensor, acl_format: int, customize_dtype: object = None, _input_dtype: object = None) -> Any:
    """``_npu_format_cast``: `self` where it has the format already, else a new tensor.

    Raises NotImplementedError for a format other than ND and its like, and FRACTAL_NZ.
    """
    _check(acl_format, customize_dtype)
    present = _format_of(self)
    if present == acl_format:
        return self
    if present in BASE_FORMATS and acl_format in BASE_FORMATS:
        torch.ops.fake_npu.describe_as(self, acl_format)
        return self
    if acl_format == FRACTAL_NZ:
        torch.ops.fake_npu.refuse_fractal_nz(list(refusing_operators()))
    result = torch.ops.npu.unsafe_empty_with_format(
        torch.ops.fake_npu.base_sizes(self), dtype=self.dtype, device=self.device, acl_format=acl_format
    )
    torch.ops.fake_npu.convert_storage(result, self)
    return result.set_(result.untyped_storage(), self.storage_offset(), self.size(), self.stride())


def cast_checked(
    input: torch.Tensor, acl_format: int, *, customize_dtype: object = None, input_dtype: object = None
) -> Any:
    """``npu_format_cast``: goes through ``_npu_format_cast``, which has torch_npu's derivative."""
    _check(acl_format, customize_dtype)
    return torch.ops.npu._npu_format_cast(input, acl_format)


def cast_like(input: torch.Tensor, dst: torch.Tensor, **options: object) -> Any:
    """``npu_format_cast.Tensor``: to the format of `dst`."""
    return cast_checked(input, _format_of(dst), **options)


def cast_in_place(
    input: torch.Tensor, acl_format: int, *, customize_dtype: object = None, input_dtype: object = None
) -> torch.Tensor:
    """``npu_format_cast_.acl_format``: `input` gets a new storage; other views of the old one keep the old format."""
    result = cast(input, acl_format, customize_dtype)
    if result is input:
        return input
    return input.set_(result.untyped_storage(), result.storage_offset(), result.size(), result.stride())


def cast_into(
    input: torch.Tensor, src: torch.Tensor, *, customize_dtype: object = None, input_dtype: object = None
) -> torch.Tensor:
    """``npu_format_cast_``: the values of the storage of `src`, in the format of `input`."""
    _check(_format_of(input), customize_dtype)
    if _format_of(input) == _format_of(src):
        return input.copy_(src)
    torch.ops.fake_npu.convert_storage(input, src)
    return input


CASTS = {
    "_npu_format_cast": cast,
    "_npu_format_cast.aclnn": cast,
    "_npu_format_cast.input_dtype": cast,
    "npu_format_cast": cast_checked,
    "npu_format_cast.Tensor": cast_like,
    "npu_format_cast_": cast_into,
    "npu_format_cast_.acl_format": cast_in_place,
}
