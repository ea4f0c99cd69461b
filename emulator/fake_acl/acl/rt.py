"""Fake pyACL's `acl.rt`: memory and devices, by the stand-in libascendcl.so in torch_npu's own folder.

Pointers, sizes and streams are integers, as in pyACL; sizes in bytes; a result code of 0 is success.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any


def _load() -> ctypes.CDLL:
    """The library that torch_npu uses; found without importing torch_npu, since Ray asks before torch is there."""
    spec = importlib.util.find_spec("torch_npu")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("fake pyACL needs torch_npu's folder, and torch_npu is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "lib"
    library = ctypes.CDLL(str(folder / "libascendcl.so"))
    library.aclrtGetSocName.restype = ctypes.c_char_p
    library.aclrtMemcpy.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.aclrtMemcpyAsync.argtypes = [*library.aclrtMemcpy.argtypes, ctypes.c_void_p]
    return library


LIBRARY = _load()


def memcpy(dst: int, dest_max: int, src: int, count: int, kind: int) -> int:
    """aclrtMemcpy: copy `count` bytes, `kind` being an aclrtMemcpyKind; the result code."""
    return int(LIBRARY.aclrtMemcpy(dst, dest_max, src, count, kind))


def memcpy_async(dst: int, dest_max: int, src: int, count: int, kind: int, stream: int) -> int:
    """aclrtMemcpyAsync on `stream`; the result code."""
    return int(LIBRARY.aclrtMemcpyAsync(dst, dest_max, src, count, kind, stream))


def get_mem_info(attr: int) -> tuple[int, int, int]:
    """aclrtGetMemInfo: free bytes, all bytes, result code."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    code = LIBRARY.aclrtGetMemInfo(attr, ctypes.byref(free), ctypes.byref(total))
    return free.value, total.value, int(code)


def get_device_count() -> tuple[int, int]:
    """aclrtGetDeviceCount: devices that this process may see, result code."""
    count = ctypes.c_uint32()
    code = LIBRARY.aclrtGetDeviceCount(ctypes.byref(count))
    return count.value, int(code)


def __getattr__(name: str) -> Any:
    raise AttributeError(f"fake pyACL has no acl.rt.{name}: add it to emulator/fake_acl/acl/rt.py")
