"""vllm-ascend's `device_print`, a debugging operator of its compiled library.

Stands in for `_C_ascend::device_print` and `device_print_tensor` (vllm-ascend 0.30.0rc2, csrc/torch_binding.cpp), which
its worker wants registered before it starts (utils.py, register_device_print).  Leaves out the order of the stream: the
text is printed when the operator is called.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util

import torch

SCHEMAS = ("device_print(str msg) -> ()", "device_print_tensor(Tensor tensor) -> ()")

_fragments: list[torch.library.Library] = []


def register() -> None:
    """Define the two operators unless vllm-ascend's own library does.  Idempotent; vLLM calls it in each process."""
    if importlib.util.find_spec("vllm_ascend") is None:
        return
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("vllm_ascend.vllm_ascend_C")
    for schema in SCHEMAS:
        name = schema.partition("(")[0]
        if hasattr(torch.ops._C_ascend, name):
            continue
        fragment = torch.library.Library("_C_ascend", "FRAGMENT")
        fragment.define(schema)
        fragment.impl(name, print_now, "CompositeExplicitAutograd")
        _fragments.append(fragment)


def print_now(what: str | torch.Tensor) -> None:
    """The text, or the tensor's values."""
    print(what.cpu() if isinstance(what, torch.Tensor) else what, flush=True)
