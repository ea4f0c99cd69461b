"""What a result that was had here is to be called.  Stands in for nothing; leaves out what is not installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

STANDS_ON = "a stand-in CANN"


def label() -> str:
    """`real torch-npu X, vllm-ascend Y on a stand-in CANN`, from the metadata of what is installed.

    A package that is not there is left out.  Without torch-npu there is nothing to label: PackageNotFoundError.
    """
    parts = [f"real torch-npu {version('torch-npu')}"]
    for name in ("vllm-ascend", "vllm"):
        try:
            parts.append(f"{_spoken(name)} {version(name)}")
        except PackageNotFoundError:
            continue
    return f"{', '.join(parts)} on {STANDS_ON}"


def _spoken(name: str) -> str:
    return {"vllm": "vLLM"}.get(name, name)
