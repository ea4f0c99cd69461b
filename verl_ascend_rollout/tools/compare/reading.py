"""Smoke reports as compare takes them: each with a label, and with numbers that can be."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_ascend_rollout.tools import report as reports
from verl_ascend_rollout.tools import wording
from verl_ascend_rollout.tools.report import Report, ReportError
from verl_ascend_rollout.tools.smoke.measured import Smoke

LONGEST_LABEL = 40


@dataclass(frozen=True)
class Run:
    """One smoke report."""

    label: str  # what it is called in the comparison: short, unique, of harmless characters
    file: str  # where it was read from
    report: Report  # with its checks
    smoke: Smoke  # its facts

    def get(self, path: str) -> Any:
        """See `Smoke.get`."""
        return self.smoke.get(path)

    @property
    def release(self) -> str:
        """vLLM's version without what a build adds to it; empty where it is not recorded."""
        return wording.name((self.smoke.vllm or "").partition("+")[0], 40)

    @property
    def stand_in(self) -> str:
        """What stands in for the hardware; empty where nothing does, or where it is not known."""
        return self.get("platform.stand_in") or ""

    @property
    def ended_in(self) -> str:
        """The phase in which smoke ended."""
        return wording.name(self.smoke.ended_in, 40)


def recorded(runs: Sequence[Run], path: str) -> list[Any]:
    """Return a fact of each of the runs; nothing where one of them has not recorded it."""
    values = [run.get(path) for run in runs]
    return [] if None in values else values


def differing(runs: Sequence[Run], path: str) -> list[Any]:
    """Return a fact of each of the two runs, where both have recorded it and it is not the same; else nothing."""
    values = recorded(runs, path)
    return values if values and values[0] != values[1] else []


def read(files: Sequence[str], labels: Sequence[str] = ()) -> list[Run]:
    """Read the reports, the first of which is the baseline.

    Args:
        files: two or more.
        labels: one for each file, or none at all.

    Raises:
        ReportError: fewer than two; one given twice; one that is no smoke report, or that has numbers that cannot be;
            or labels that do not fit.
    """
    if len(files) < 2:
        raise ReportError("compare needs two reports or more: the first is what the others are compared with")
    if labels and len(labels) != len(files):
        raise ReportError(f"--label is given {len(labels)} times for {len(files)} reports: once for each, or never")
    found: list[Run] = []
    for file in files:
        for earlier in found:
            with contextlib.suppress(OSError):  # one that is not there is refused below
                if os.path.samefile(file, earlier.file):
                    raise ReportError(f"{file} is given twice: a report compared with itself says nothing")
        report = reports.read(file)
        for earlier in found:
            if report == earlier.report:
                raise ReportError(f"{file} and {earlier.file} are the same report: compared, they say nothing")
        smoke = Smoke.of(report, file)
        for problem in _problems(smoke):
            raise ReportError(f"{file} is no smoke report of ascend-safe: {problem}")
        found.append(Run("", file, report, smoke))
    given = _given(labels) if labels else _derived(found)
    return [dataclasses.replace(run, label=label) for run, label in zip(found, given, strict=True)]


def _problems(smoke: Smoke) -> Iterator[str]:
    """Yield what no run can have measured, beyond what the schema says."""
    for output in filter(None, (smoke.output, *smoke.more_outputs)):
        values, said = len(output.logprobs), len(output.token_ids)
        if values not in (0, said):
            yield f"output.logprobs has {values} values for {said} tokens"
        values, asked = len(output.prompt_logprobs), len(output.prompt_token_ids)
        if values not in (0, asked - 1):
            yield f"output.prompt_logprobs has {values} values for {asked} prompt tokens: the first has none"


def _given(labels: Sequence[str]) -> list[str]:
    clean = [_label(label) for label in labels]
    for label, given in zip(clean, labels, strict=True):
        if not label:
            raise ReportError(f"--label {given!r} has nothing that can be shown")
        if clean.count(label) > 1:
            raise ReportError(f"--label {label!r} is given twice: each report needs one of its own")
    return clean


def _derived(runs: Sequence[Run]) -> list[str]:
    labels = [_label(_description(run)) or "report" for run in runs]
    # The same stack twice is most often compared for the graphs.
    modes = [
        _label(label + {None: "", True: " eager", False: " graphs"}[run.get("engine.eager")])
        if labels.count(label) > 1
        else label
        for label, run in zip(labels, runs, strict=True)
    ]
    labels = modes if len(set(modes)) > len(set(labels)) else labels
    return [
        f"{label} no.{labels[: place + 1].count(label)}" if labels.count(label) > 1 else label
        for place, label in enumerate(labels)
    ]


def _description(run: Run) -> str:
    platform, vllm = run.smoke.platform, run.smoke.vllm
    if platform is None and vllm is None:
        return Path(run.file).stem
    name, soc = (platform.name, platform.soc) if platform else ("unknown platform", "")
    words = (name, soc, (vllm or "unknown vLLM").partition("+")[0], "(stand-in)" if run.stand_in else "")
    return " ".join(word for word in words if word)


def _label(text: str) -> str:
    return " ".join(re.sub(r"[^\w .,+/=()-]|_(?=_)", "", wording.name(text)).split())[:LONGEST_LABEL].strip()
