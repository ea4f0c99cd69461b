"""How the doctor's answers are made: what fails is a high risk, what is warned of a medium one."""

from __future__ import annotations

from verl_ascend_rollout.policy.decision import Confidence
from verl_ascend_rollout.tools.report import Check, Evidence, Risk


def passed(
    name: str, summary: str, *evidence: Evidence, risk: Risk = "high", confidence: Confidence = "measured"
) -> Check:
    """Return that something is as it should be; `risk` is that of being wrong about it."""
    return Check(name, "pass", summary, evidence, confidence, risk)


def failed(name: str, summary: str, advice: str, *evidence: Evidence, confidence: Confidence = "measured") -> Check:
    """Return that something cannot work."""
    return Check(name, "fail", summary, evidence, confidence, "high", advice)


def warned(name: str, summary: str, advice: str, *evidence: Evidence, confidence: Confidence = "measured") -> Check:
    """Return that something works, perhaps not as meant."""
    return Check(name, "warn", summary, evidence, confidence, "medium", advice)


def unknown(name: str, summary: str, advice: str, *evidence: Evidence, confidence: Confidence = "measured") -> Check:
    """Return that something could not be told."""
    return Check(name, "unknown", summary, evidence, confidence, "medium", advice)


def tried(what: str) -> Evidence:
    """Return evidence that is no line of a file: what was found here."""
    return Evidence("probe", what)
