"""Fake `fla_npu.ops.ascendc`: every name can be imported, and raises NotImplementedError when it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"fla_npu.ops.ascendc.{name} has no reference version: "
            "add it to emulator/fake_fla_npu/fla_npu/ops/ascendc.py"
        )

    return refuse
