"""What a maintainer asks first about an installation, beside its versions: CANN, driver, chip, commits, variables.

All of Ascend's images install verl, vLLM and vllm-ascend from a checkout, whose version says little: a version of a
checkout is its commit.
"""

from __future__ import annotations

import platform as machine_names
import re
from collections.abc import Mapping
from pathlib import Path

from verl_ascend_rollout.platforms.installed import Search
from verl_ascend_rollout.tools.doctor.source import text_of
from verl_ascend_rollout.tools.redaction import redact

TOOLKITS = ("/usr/local/Ascend/ascend-toolkit/latest", "/usr/local/Ascend/cann")

DRIVER = Path("/usr/local/Ascend/driver/version.info")

MATTERS = re.compile(
    r"(VERL|VLLM|ASCEND|HCCL|ACL|RAY)_\w+|(PYTORCH|TORCH)_(NPU|CUDA)_ALLOC_CONF|TASK_QUEUE_ENABLE|CPU_AFFINITY_CONF"
    r"|(CUDA|HIP|ASCEND_RT)_VISIBLE_DEVICES|NCCL_\w+|LD_PRELOAD|PYTHONPATH"
)
"""Variables that a rollout, its engine or its trainer read."""

LONGEST = 200
"""Characters of a value that are shown."""


def identity(search: Search, environ: Mapping[str, str], chip: str | None) -> dict[str, object]:
    """Return the facts, by name; what is not there is left out.

    Args:
        chip: its name by npu-smi.
    """
    found = {
        "cann": cann(environ),
        "driver": driver(),
        "chip": chip,
        "checkouts": commits(search),
        "variables": variables(environ),
    }
    return {name: value for name, value in found.items() if value}


def cann(environ: Mapping[str, str]) -> str | None:
    """Return the version of the CANN toolkit, where verl looks for it (0.9.1, utils/device.py, get_npu_versions)."""
    named = [environ[name] for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME") if environ.get(name)]
    for folder in map(Path, (*named, *TOOLKITS)):
        file = folder / f"{machine_names.machine()}-linux" / "ascend_toolkit_install.info"
        found = re.search(r"^version=(\S+)", text_of(file), re.MULTILINE)
        if found:
            return found[1]
    return None


def driver() -> str | None:
    """Return the version of the NPU driver."""
    found = re.search(r"^Version\s*=\s*(\S+)", text_of(DRIVER), re.MULTILINE | re.IGNORECASE)
    return found[1] if found else None


def commits(search: Search) -> dict[str, str]:
    """Return the commit of each editable install's checkout, by distribution."""
    found = ((name, _commit(checkout)) for name, checkout in search.checkouts.items())
    return {name: commit[:12] for name, commit in found if commit is not None}


def _commit(checkout: Path) -> str | None:
    """Return the commit that a checkout is at, read without git."""
    git = checkout / ".git"
    if git.is_file():  # a worktree, or a submodule
        git = checkout / text_of(git).removeprefix("gitdir:").strip()
    head = text_of(git / "HEAD").strip()
    if not head.startswith("ref:"):
        return head or None
    name = head.removeprefix("ref:").strip()
    common = git / (text_of(git / "commondir").strip() or ".")
    for folder in (git, common):
        if commit := text_of(folder / name).strip():
            return commit
    packed = re.search(rf"^(\w+) {re.escape(name)}$", text_of(common / "packed-refs"), re.MULTILINE)
    return packed[1] if packed else None


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables that matter, by name."""
    # Redacted with its name, by which a secret is known.
    return {
        name: redact(f"{name}={environ[name][:LONGEST]}").partition("=")[2]
        for name in sorted(filter(MATTERS.fullmatch, environ))
    }
