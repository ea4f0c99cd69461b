"""What the vendor's tool and the system say of the machine: driver, device, memory."""

from __future__ import annotations

import contextlib
import platform as python
import re
from pathlib import Path

import psutil

from verl_ascend_rollout import __version__
from verl_ascend_rollout.platforms.base import PlatformFacts, ask_smi
from verl_ascend_rollout.platforms.installed import installed_version

DISTRIBUTIONS = (
    "torch",
    "torch-npu",
    "triton",
    "triton-ascend",
    "vllm-ascend",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "verl",
    "ray",
)

DRIVER = {
    "cuda": (["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], r"(\S.*?)\s*(?:\n|$)"),
    "npu": (["npu-smi", "info"], r"Version:\s*([\w.]+)"),  # "| npu-smi 25.2.0    Version: 25.2.0   |"
}
"""What to ask for the driver's version, and where it is in the answer."""


def versions(facts: PlatformFacts) -> dict[str, str]:
    """Versions of the packages that matter, ours and Python's among them."""
    found = {"python": python.python_version(), "ascend-safe": __version__}
    if "vllm" in facts.versions:
        found[facts.versions.get("vllm_distribution", "vllm")] = facts.versions["vllm"]
    versions = {name: installed_version(name) for name in DISTRIBUTIONS}
    return {**found, **{name: version for name, version in versions.items() if version is not None}}


def driver(platform: str) -> str | None:
    """Return the driver's version, by nvidia-smi or npu-smi; `None` on a CPU, or where the tool is not there."""
    if platform not in DRIVER:
        return None
    command, version = DRIVER[platform]
    match = re.search(version, ask_smi(command) or "")
    return match[1] if match else None


def processor() -> str | None:
    """Return the CPU's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return None


def available_memory() -> int:
    """Return the bytes of memory that this process can still have: the machine's, or its control group's where that is
    less."""
    available = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())  # "max" where there is none
        used = int((group / "memory.current").read_text())
        available = min(available, max(limit - used, 0))
    return available
