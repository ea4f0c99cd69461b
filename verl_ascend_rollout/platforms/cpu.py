"""The CPU: always there, and the platform where no accelerator can be used."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from verl_ascend_rollout.platforms.base import ROOT, PlatformFacts, installed_versions, vllm_is_built_for_cpu

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
"""What Ray sets for its resource GPU, which is logical on a CPU."""


def describe(
    root: Path = ROOT, environ: Mapping[str, str] = os.environ, versions: Mapping[str, str] | None = None
) -> PlatformFacts:
    """Return the facts of this machine taken as a CPU (`root` and `environ`: as cuda and npu have them)."""
    versions = installed_versions() if versions is None else versions
    evidence = []
    if "vllm" not in versions:
        evidence.append("no distribution provides the module vllm")
    elif vllm_is_built_for_cpu(versions):
        evidence.append(f"vLLM is built for the CPU: {versions.get('vllm_distribution', 'vllm')} {versions['vllm']}")
    else:
        evidence.append(
            f"vLLM {versions['vllm']} (distribution {versions.get('vllm_distribution', 'vllm')}) does not say in its "
            "version that it is built for the CPU"
        )
    return PlatformFacts(
        name="cpu",
        verl_name="cpu",
        device_count=1,
        soc=None,
        ray_resource="GPU",
        visible_devices_variable=VISIBLE_DEVICES,
        versions=dict(versions),
        # sleep mode: vllm 0.28, vllm/platforms/interface.py:224; graphs: vllm/platforms/cpu.py sets no capture sizes.
        abilities={"sleep_mode": False, "graphs": False, "ipc": False},
        evidence=tuple(evidence),
    )


def find(
    root: Path = ROOT, environ: Mapping[str, str] = os.environ, versions: Mapping[str, str] | None = None
) -> PlatformFacts | None:
    """Return the facts of the CPU: never `None`, whatever else the machine has."""
    return describe(root, environ, versions)
