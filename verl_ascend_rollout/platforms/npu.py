"""Ascend NPUs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast, get_args

from verl_ascend_rollout.platforms.base import (
    PlatformFacts,
    Soc,
    ask_smi,
    numbered_devices,
    package_folder,
    visible_count,
    vllm_is_built_for_cpu,
)

VISIBLE_DEVICES = "ASCEND_RT_VISIBLE_DEVICES"


def describe(
    root: Path, environ: Mapping[str, str], versions: Mapping[str, str], *, smi: bool = False
) -> PlatformFacts:
    """Return the facts of this machine taken as one with NPUs, even where none is seen (`device_count` is then 0).

    Args:
        root: where /dev, /proc and /sys are.
        smi: also ask `npu-smi` for the name of the chip, which takes up to SMI_SECONDS.
    """
    evidence: list[str] = []
    nodes = numbered_devices(root, "davinci")
    evidence.append(f"/dev has {', '.join(nodes)}" if nodes else "/dev has no davinci<number>")
    count, sentence = visible_count(environ, VISIBLE_DEVICES, len(nodes))
    evidence.append(sentence)
    for name in ("torch-npu", "vllm-ascend"):
        evidence.append(f"{name} {versions[name]} is installed" if name in versions else f"{name} is not installed")
    build = _build_info(evidence)
    return PlatformFacts(
        name="npu",
        verl_name="huawei",
        device_count=count,
        soc=_soc(bool(nodes), build, smi, evidence),
        ray_resource="NPU",
        visible_devices_variable=VISIBLE_DEVICES,
        versions=dict(versions),
        abilities={
            "sleep_mode": _sleep_mode(build, evidence),
            # Known of a chip, not of a stand-in for one: ACL graphs are the driver's.
            "graphs": True if nodes else None,
            # Depends on the driver and on CANN; verl asks both (verl 0.9.1, plugin/platform/platform_npu.py:164).
            "ipc": None,
        },
        evidence=tuple(evidence),
    )


def find(
    root: Path, environ: Mapping[str, str], versions: Mapping[str, str], *, smi: bool = False
) -> PlatformFacts | None:
    """Return the facts, where this is a machine for NPUs; else `None`.

    An installed torch-npu is enough, as it is for verl, which asks only whether it can be imported (verl 0.9.1,
    plugin/platform/platform_npu.py:60): a Ray actor that was given no NPU has no device to show.
    """
    if "torch-npu" in versions:
        return describe(root, environ, versions, smi=smi)
    if numbered_devices(root, "davinci") and not vllm_is_built_for_cpu(versions):
        return describe(root, environ, versions, smi=smi)
    return None


def soc_named(text: str) -> Soc | None:
    """Return the generation that a person names, by itself or by a chip's name; `None` where it is none."""
    return next((soc for soc in get_args(Soc) if text.strip().upper() == soc), None) or soc_of(text)


def soc_of(chip: str) -> Soc | None:
    """Return the generation that a chip name, or a SOC_VERSION of vllm-ascend's build, stands for.

    The names: vllm-ascend main, vllm_ascend/device and setup.py (910b* and a2g* are A2, 910_93* and 910c A3, 310p*
    310P, ascend950* A5); 910_95 is verl's other name for A5 (verl 0.9.1, verl/utils/device.py:212).
    """
    name = chip.strip().lower()
    if "950" in name or "910_95" in name:
        return "A5"
    if "910_93" in name or "910c" in name:
        return "A3"
    if "910b" in name or "a2g" in name:
        return "A2"
    if "310p" in name:
        return "310P"
    return None


def _build_info(evidence: list[str]) -> dict[str, str]:
    """Return the assignments in vllm_ascend/_build_info.py, which its build writes, read as text."""
    folder = package_folder("vllm_ascend")
    if folder is None:
        return {}
    try:
        text = (folder / "_build_info.py").read_text(encoding="utf-8")
    except OSError:
        evidence.append("vllm-ascend has no _build_info.py: for which chip it was built is not known")
        return {}
    return {name: value.strip("'\"") for name, value in re.findall(r"^__(\w+?)__\s*=\s*(\S+)", text, re.MULTILINE)}


def _soc(has_devices: bool, build: Mapping[str, str], smi: bool, evidence: list[str]) -> Soc | None:
    """Return the chip, by npu-smi where it is asked, else by vllm-ascend's build.

    vllm-ascend refuses to start on a chip that it was not built for (0.13 to main, check_ascend_device_type), so its
    build tells the chip; but only where there is one: a build without an NPU at hand says A2 whatever comes later.
    """
    if smi:
        chip = chip_by_smi()
        found = soc_of(chip) if chip else None
        evidence.append(f"npu-smi names the chip {chip}" if chip else "npu-smi did not name the chip")
        if found is not None:
            return found
    written = build.get("device_type") or build.get("soc_version")
    if written is None:
        return None
    family = re.fullmatch(r"(?:AscendDeviceType\.)?_?(310P|A2|A3|A5)", written)
    built_for = cast("Soc", family.group(1)) if family else soc_of(written)
    if not has_devices:
        evidence.append(f"vllm-ascend is built for {written}, which without a device says nothing about the chip")
        return None
    evidence.append(f"vllm-ascend is built for {written}")
    return built_for


def chip_by_smi() -> str | None:
    """Return the first chip's name, put together from npu-smi's fields as SOC_VERSION is.

    A2 has chip type "Ascend" and name "910B3", 310P type "Ascend" and name "310P3"; A3 has no chip type but an NPU
    name: "Ascend910" and "9391".  A5 gives its name for the board, the others for a chip of it (vllm-ascend main,
    setup.py, asks for the same fields).
    """
    number = re.search(r"NPU ID\s*:\s*(\d+)", ask_smi(["npu-smi", "info", "-l"]) or "")
    if number is None:
        return None
    board = ["npu-smi", "info", "-t", "board", "-i", number.group(1)]
    for command in (board, [*board, "-c", "0"]):
        answer = ask_smi(command) or ""
        fields: dict[str, str] = dict(
            re.findall(r"^\s*(Chip Name|Chip Type|NPU Name)\s*:\s*(\S+)", answer, re.MULTILINE)
        )
        name = fields.get("Chip Name")
        if name is None:
            continue
        if "Chip Type" in fields:
            return fields["Chip Type"] + name
        return f"{name}_{fields['NPU Name']}" if "NPU Name" in fields else name
    return None


def _sleep_mode(build: Mapping[str, str], evidence: list[str]) -> bool | None:
    """Sleep mode needs the compiled CaMem allocator; vllm-ascend 0.11 asks a flag of its build instead."""
    folder = package_folder("vllm_ascend")
    if folder is None:
        return None
    flag = build.get("sleep_mode_enabled")
    if flag is not None:
        evidence.append(f"vllm-ascend was built with sleep mode {'on' if flag == 'True' else 'off'}")
        return flag == "True"
    found = sorted(folder.glob("vllm_ascend_C*.so"))
    if not found:
        evidence.append("vllm-ascend has no vllm_ascend_C*.so: whether it has sleep mode is not known")
        return None
    evidence.append(f"vllm-ascend has {found[0].name}")
    return True
