"""The CPU: always there, and the platform where no accelerator can be used."""

from __future__ import annotations

from collections.abc import Mapping

from verl_ascend_rollout.platforms.base import ROOT, PlatformFacts, vllm_is_built_for_cpu

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
"""What Ray sets for its resource GPU, which is logical on a CPU."""


def most_workers(environ: Mapping[str, str]) -> int | None:
    """Return how many workers an engine may have: one on each memory node (vllm 0.28, v1/worker/cpu_worker.py); `None`
    where the user has bound cores to workers."""
    if environ.get("VLLM_CPU_SIM_MULTI_NUMA") == "1" or "|" in environ.get("VLLM_CPU_OMP_THREADS_BIND", ""):
        return None
    return memory_nodes()


def memory_nodes() -> int:
    """Return how many memory nodes this machine has."""
    return len(list((ROOT / "sys/devices/system/node").glob("node[0-9]*"))) or 1


def describe(versions: Mapping[str, str]) -> PlatformFacts:
    """Return the facts of this machine taken as a CPU."""
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
