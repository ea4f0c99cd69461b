"""CUDA GPUs, and AMD GPUs, which torch calls `cuda` too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from verl_ascend_rollout.platforms.base import (
    PlatformFacts,
    ask_smi,
    numbered_devices,
    package_folder,
    visible_count,
    vllm_is_built_for_cpu,
)

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


def describe(
    root: Path, environ: Mapping[str, str], versions: Mapping[str, str], *, smi: bool = False
) -> PlatformFacts:
    """Return the facts of this machine taken as one with GPUs, even where none is seen (`device_count` is then 0).

    Args:
        root: where /dev, /proc and /sys are.
        smi: also ask `nvidia-smi`, which takes up to SMI_SECONDS; finds GPUs without device nodes, as below WSL.
    """
    evidence: list[str] = []
    nvidia = _nvidia_count(root, evidence, smi)
    amd = _amd_count(root, evidence) if nvidia == 0 else 0
    count, sentence = visible_count(environ, VISIBLE_DEVICES, nvidia or amd)
    evidence.append(sentence)
    built_for_rocm = "rocm" in versions.get("torch", "")
    if vllm_is_built_for_cpu(versions):
        evidence.append(
            f"vLLM is built for the CPU: {versions.get('vllm_distribution', 'vllm')} {versions.get('vllm', '')}"
        )
    return PlatformFacts(
        name="cuda",
        verl_name="amd" if amd or built_for_rocm else "nvidia",
        device_count=count,
        soc=None,
        ray_resource="GPU",
        visible_devices_variable=VISIBLE_DEVICES,
        versions=dict(versions),
        abilities={"sleep_mode": _sleep_mode(evidence), "graphs": True, "ipc": True},
        evidence=tuple(evidence),
    )


def find(
    root: Path, environ: Mapping[str, str], versions: Mapping[str, str], *, smi: bool = False
) -> PlatformFacts | None:
    """Return the facts, where this machine has a GPU that vLLM can use from here; else `None`.

    GPUs that the user hid are not there.  In a Ray worker they are: older Ray hides the GPUs from every actor that
    asks for none (ray-project/ray#54868), such as verl's TaskRunner, which must not take the machine for another.
    """
    facts = describe(root, environ, versions, smi=smi)
    if vllm_is_built_for_cpu(versions):
        return None
    if facts.device_count > 0:
        return facts
    present, _ = visible_count({}, VISIBLE_DEVICES, _nvidia_count(root, [], smi) or _amd_count(root, []))
    return facts if present and "RAY_RAYLET_PID" in environ else None


def _nvidia_count(root: Path, evidence: list[str], smi: bool) -> int:
    """How many NVIDIA GPUs there are device nodes for.

    The driver's list in /proc is evidence only: a container sees the list of the whole host there.
    """
    nodes = numbered_devices(root, "nvidia")
    evidence.append(f"/dev has {', '.join(nodes)}" if nodes else "/dev has no nvidia<number>")
    try:
        known = sum(1 for _ in (root / "proc/driver/nvidia/gpus").iterdir())
    except OSError:
        known = 0
    evidence.append(f"/proc/driver/nvidia/gpus lists {known}" if known else "/proc/driver/nvidia/gpus is not there")
    if nodes:
        return len(nodes)
    if smi:
        listed = ask_smi(["nvidia-smi", "--list-gpus"])
        count = sum(1 for line in (listed or "").splitlines() if line.startswith("GPU "))
        evidence.append("nvidia-smi did not answer" if listed is None else f"nvidia-smi lists {count}")
        return count
    return 0


def _amd_count(root: Path, evidence: list[str]) -> int:
    """How many AMD GPUs the kernel's compute driver shows; a node whose gpu_id is 0 is a CPU (amdkfd, sysfs)."""
    count = 0
    try:
        for node in (root / "sys/class/kfd/kfd/topology/nodes").iterdir():
            count += (node / "gpu_id").read_text(encoding="ascii").strip() not in ("", "0")
    except OSError:
        pass
    if count:
        evidence.append(f"/sys/class/kfd shows {count} AMD GPUs")
    return count


def _sleep_mode(evidence: list[str]) -> bool | None:
    """Sleep mode needs the compiled allocator (vllm 0.28, vllm/config/model.py:602 asks whether it imports)."""
    folder = package_folder("vllm")
    if folder is None:
        evidence.append("vllm is not installed: whether it has sleep mode is not known")
        return None
    found = sorted(folder.glob("cumem_allocator*.so"))
    evidence.append(f"vllm has {found[0].name}" if found else "vllm has no cumem_allocator*.so, so no sleep mode")
    return bool(found)
