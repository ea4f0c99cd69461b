"""Makes the published torch_npu work on a stand-in CANN: its operators get CPU kernels on the same bytes.

``autoload`` is an entry point of ``torch.backends``: PyTorch calls it at the end of ``import torch``, in every process
of the emulator's environment.  It stands in for the CANN operator package (``opp``).  Left out: what vllm-ascend needs
besides torch_npu's operators, which is ``fake_npu.vllm_ascend_glue``, an entry point of ``vllm.general_plugins``.
"""

from __future__ import annotations

import importlib
import os

# torch_npu's own queue of launches is a second thread, which a stand-in without real launches does not need.
os.environ.setdefault("TASK_QUEUE_ENABLE", "0")


def _declare_torchvision_operators() -> None:
    """Schemas only: torchvision for x86-64 on the package index is a CUDA build, whose operator library does not load
    beside a CPU torch, and ``import torchvision`` then stops at its own meta kernels.  Models only import it."""
    import torch

    if torch.version.cuda is not None or torch._C._dispatch_has_kernel("torchvision::nms"):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept_alive.append(library)


_kept_alive: list[object] = []


def autoload() -> None:
    """Import torch_npu, install the aten kernels, then torch_npu's fused operators.

    Raises what torch_npu's import raises, and OSError where ``fake_npu_kernels.so`` is missing.
    """
    import torch_npu

    from . import aten

    # The default of Atlas A2 and A3 (torch_npu's API reference, set_compile_mode), which CANN's own options give there.
    torch_npu.npu.set_compile_mode(jit_compile=False)
    aten.install()

    from . import operators

    operators.install()
    _declare_torchvision_operators()


# Last: where this package is imported before torch, importing torch calls `autoload`, which imports the modules below.
importlib.import_module("torch")
