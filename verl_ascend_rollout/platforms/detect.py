"""Which platform this is."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from verl_ascend_rollout.platforms import cpu, cuda, npu
from verl_ascend_rollout.platforms.base import (
    ROOT,
    PlatformError,
    PlatformFacts,
    PlatformName,
    Soc,
    installed_versions,
    numbered_devices,
    vllm_is_built_for_cpu,
)

OVERRIDE = "VERL_PLATFORM"
"""verl's own variable for the platform (verl 0.9.1, plugin/platform/platform_manager.py:90)."""

NAMES: dict[str, tuple[PlatformName, str]] = {
    "cpu": ("cpu", "cpu"),
    "cuda": ("cuda", "nvidia"),
    "nvidia": ("cuda", "nvidia"),
    "gpu": ("cuda", "nvidia"),
    "rocm": ("cuda", "amd"),
    "amd": ("cuda", "amd"),
    "npu": ("npu", "huawei"),
    "huawei": ("npu", "huawei"),
    "ascend": ("npu", "huawei"),
}
"""Every name that a user may write: our name for the platform, and the key in verl's PlatformRegistry.

verl 0.9.1's documentation says VERL_PLATFORM=npu (plugin/platform/README.md), which its registry does not have."""


def detect(
    environ: Mapping[str, str] = os.environ,
    root: Path = ROOT,
    versions: Mapping[str, str] | None = None,
    *,
    smi: bool = False,
) -> PlatformFacts:
    """Return the platform that VERL_PLATFORM names, or else the first that is there of NPU, CUDA and CPU.

    A platform that VERL_PLATFORM names is taken at its word, devices or none: a driver on a head node has none.

    Args:
        root: where /dev, /proc and /sys are.
        versions: versions of the installed distributions, where they are already known.
        smi: also ask `npu-smi` and `nvidia-smi`, which take up to SMI_SECONDS each.

    Raises:
        PlatformError: VERL_PLATFORM has a name that does not exist.
    """
    versions = installed_versions() if versions is None else versions
    wanted = environ.get(OVERRIDE, "").strip()
    if wanted:
        name, verl_name = _known(wanted)
        facts = _describe(name, root, environ, versions, smi)
        evidence = (f"{OVERRIDE}={wanted} says so", *facts.evidence)
        return dataclasses.replace(facts, verl_name=verl_name, evidence=evidence)
    found = npu.find(root, environ, versions, smi=smi) or cuda.find(root, environ, versions, smi=smi)
    if found is not None:
        return found
    facts = cpu.describe(versions)
    return dataclasses.replace(facts, evidence=(_why_cpu(root, versions), *facts.evidence))


def planned(name: PlatformName, soc: Soc | None = None, versions: Mapping[str, str] | None = None) -> PlatformFacts:
    """Return the facts of a machine that is only planned: nothing is looked at, and what was not said is not known.

    Raises:
        PlatformError: a SoC for a platform other than `npu`.
    """
    if soc is not None and name != "npu":
        raise PlatformError(f"a SoC ({soc}) is something that only the platform npu has, not {name}")
    verl_name, resource, variable = {
        "cpu": ("cpu", "GPU", cpu.VISIBLE_DEVICES),
        "cuda": ("nvidia", "GPU", cuda.VISIBLE_DEVICES),
        "npu": ("huawei", "NPU", npu.VISIBLE_DEVICES),
    }[name]
    unknown: dict[str, bool | None] = {"sleep_mode": None, "graphs": None, "ipc": None}
    cpu_has = {"sleep_mode": False, "graphs": False, "ipc": False}
    return PlatformFacts(
        name=name,
        verl_name=verl_name,
        device_count=0,
        soc=soc,
        ray_resource="NPU" if resource == "NPU" else "GPU",
        visible_devices_variable=variable,
        versions=dict(versions or {}),
        abilities={**unknown, **(cpu_has if name == "cpu" else {})},
        evidence=("planned: nothing on this machine was looked at",),
    )


def _known(name: str) -> tuple[PlatformName, str]:
    try:
        return NAMES[name.strip().lower()]
    except KeyError:
        raise PlatformError(
            f"{OVERRIDE}={name.strip()} names no platform: set it to one of {', '.join(NAMES)}, or unset it to have "
            "the platform found"
        ) from None


def _describe(
    name: PlatformName, root: Path, environ: Mapping[str, str], versions: Mapping[str, str], smi: bool
) -> PlatformFacts:
    if name == "npu":
        return npu.describe(root, environ, versions, smi=smi)
    if name == "cuda":
        return cuda.describe(root, environ, versions, smi=smi)
    return cpu.describe(versions)


def _why_cpu(root: Path, versions: Mapping[str, str]) -> str:
    """One sentence: no accelerator, or one that cannot be used."""
    nodes = [*numbered_devices(root, "davinci"), *numbered_devices(root, "nvidia")]
    if not nodes:
        return "no NPU and no GPU is here: no /dev/davinci<number>, no torch-npu, no /dev/nvidia<number>"
    if vllm_is_built_for_cpu(versions):
        return f"/dev has {', '.join(nodes)}, which a vLLM that is built for the CPU cannot use"
    return f"/dev has {', '.join(nodes)}, hidden from this process by {cuda.VISIBLE_DEVICES}"
