"""Reference versions of the fused NPU operators, in plain torch.

Stands in for: the kernels (aclnn, ATB) behind torch-npu's fused operators, as far as dense Qwen2 and Qwen3,
Qwen1.5-MoE, Qwen2-MoE and Qwen3-MoE need them in eager mode, in bf16 or fp16 without quantisation: served by
vllm-ascend 0.11.0 to 0.30.0rc2, trained by verl 0.9.1 with FSDP.  The operators of vllm-ascend's own library are in
vllm_ascend_library.py, which vllm_ascend_glue.py installs.

Leaves out: quantised operators, MLA and sparse attention, graph capture (the `.out` and workspace variants), operators
that communicate by themselves (npu_moe_distribute_dispatch, npu_mm_all_reduce_base), and the device's numerics: sums
are those of torch's CPU kernels, in fp32.

Every torch-npu operator that is neither implemented here nor kept (registry.KEPT) is replaced by one that raises
NotImplementedError with its name and the place to add it.  Importing this package installs them all.
"""

from __future__ import annotations

import importlib

from . import activations, attention, derivatives, kv_cache, losses, matmul, moe, norms, registry, rotary, sampling

__all__ = [
    "activations",
    "attention",
    "derivatives",
    "install",
    "kv_cache",
    "losses",
    "matmul",
    "moe",
    "norms",
    "registry",
    "rotary",
    "sampling",
]


def install() -> None:
    """Register every operator over torch-npu's schemas, and a refuser over each one that is left.  Idempotent.

    torch_npu must have been imported.  ATB's schemas are in a library that torch-npu loads late; it is loaded here.
    """
    importlib.import_module("torch_npu.op_plugin.atb._atb_ops")  # defines the atb:: operators
    registry.register(("npu", "atb"))
    registry.refuse_the_rest(("npu", "atb"))


install()
