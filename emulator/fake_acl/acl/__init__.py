"""Fake pyACL: the Python binding of CANN's runtime, which comes with CANN and is on no package index.

Stands in for what the field's Python calls: Ray's NPU discovery (`acl.get_soc_name`, `acl.rt.get_device_count`) and
vllm-ascend's sleep mode (`acl.rt.memcpy`).  The calls go to the stand-in libascendcl.so.  Everything else is left
out and raises AttributeError with its name.  Signatures: "pyACL API reference", CANN's documentation.
"""

from __future__ import annotations

from typing import Any

from . import rt

__all__ = ["finalize", "get_soc_name", "init", "rt"]


def init(config_path: str | None = None) -> int:
    """0, the code for success.  There is nothing to set up: the library does it at its first call."""
    return 0


def finalize() -> int:
    """0, the code for success."""
    return 0


def get_soc_name() -> str:
    """The SoC's name, such as `Ascend910B1` (FAKE_CANN_SOC)."""
    name: bytes | None = rt.LIBRARY.aclrtGetSocName()
    return name.decode() if name else ""


def __getattr__(name: str) -> Any:
    raise AttributeError(f"fake pyACL has no acl.{name}: add it to emulator/fake_acl/acl/__init__.py")
