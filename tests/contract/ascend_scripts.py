"""What each of verl's Ascend scripts runs on with `rollout=ascend_safe`, and what is decided otherwise than it says.

Run as a script, this file writes ascend_scripts.txt, which is kept, so that a change is seen in a review.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import verl_configs
from omegaconf import DictConfig, OmegaConf
from verl_configs import FULLY_ASYNC, MAIN_PPO, Ended, Verl

from verl_ascend_rollout.platforms.detect import planned
from verl_ascend_rollout.policy import conflicts, engine_args
from verl_ascend_rollout.policy.decision import shown
from verl_ascend_rollout.policy.job_config import trains_adapters
from verl_ascend_rollout.policy.request import EngineRequest, ModelFacts

FILE = Path(__file__).with_suffix(".txt")
NAME = "actor_rollout_ref.rollout.name"
LONG = "rollout@actor_rollout_ref.rollout"

SCRIPTS: list[dict[str, Any]] = json.loads(
    Path(__file__).with_name("ascend_command_lines.json").read_text(encoding="utf-8")
)
"""The command lines of verl's Ascend scripts: the settings that a decision of ours could rest on."""

ENTRY_POINTS = {"verl.trainer.main_ppo": MAIN_PPO, "verl.experimental.fully_async_policy.fully_async_main": FULLY_ASYNC}

FORMS = ("appended", "in its place", "long form")

MODELS = {
    "Qwen3-235B-A22B": ModelFacts("qwen3_moe", layers=94, experts=128, head_size=128),
    "Qwen3-30B-A3B": ModelFacts("qwen3_moe", layers=48, experts=128, head_size=128),
    "Qwen3-32B": ModelFacts("qwen3", layers=64, experts=0, head_size=128),
    "Qwen3-8B": ModelFacts("qwen3", layers=36, experts=0, head_size=128),
    "Qwen3-0.6B": ModelFacts("qwen3", layers=28, experts=0, head_size=128),
}
"""What the models' published config.json says; of the others nothing is assumed."""

RELEASES = ("0.18.0", "0.23.0")


def overrides(script: dict[str, Any], form: str) -> list[str]:
    """A script's overrides with the choice of our rollout in one of `FORMS`."""
    given: list[str] = script["overrides"]
    if form == "appended":
        return [*given, "rollout=ascend_safe"]
    if form == "long form":
        return [*given, f"{LONG}=ascend_safe"]
    return ["rollout=ascend_safe" if override.startswith(f"{NAME}=") else override for override in given]


def driver(verl: Verl, script: dict[str, Any], given: list[str]) -> Ended:
    """The driver of the job that a script starts."""
    return verl_configs.driver(verl, ENTRY_POINTS[script["module"]], script["primary"], *given)


def table(verl: Verl) -> str:
    """One part for each script."""
    lines = [
        "What each of verl's Ascend scripts runs on with the choice of ascend_safe, and what is decided otherwise than",
        f"it says, on an A3 with vllm-ascend {' and '.join(RELEASES)}.  Written by tests/contract/ascend_scripts.py.",
    ]
    for script in SCRIPTS:
        lines += ["", f"{script['script']} ({script['primary']})"]
        ends = {form: driver(verl, script, overrides(script, form)) for form in FORMS}
        lines += [f"    {form:13} {_text(end)}" for form, end in ends.items()]
        ours, stock = ends["appended"].config, driver(verl, script, script["overrides"]).config
        if ours is not None and stock is not None:
            for release in RELEASES:
                lines += [f"    {release:13} {difference}" for difference in _differences(script, stock, ours, release)]
    return "\n".join(lines) + "\n"


def _text(end: Ended) -> str:
    if end.config is None:
        return f"exit {end.status}: {end.said.split(': ', 1)[1].split(',')[0]}"
    return str(OmegaConf.select(end.config, NAME))


def _differences(script: dict[str, Any], stock: DictConfig, ours: DictConfig, release: str) -> list[str]:
    facts = planned("npu", "A3", {"vllm": release, "vllm-ascend": release})
    path = str(ours.actor_rollout_ref.model.path)
    request = EngineRequest.from_rollout(
        ours.actor_rollout_ref.rollout,
        lora=trains_adapters(ours),
        model=next((model for name, model in MODELS.items() if path.lower().startswith(name.lower())), ModelFacts()),
        environ=script["environment"],
    )
    decisions = engine_args.decide(facts, request)
    rollout = stock.actor_rollout_ref.rollout
    own = EngineRequest.from_rollout(rollout)
    # What verl would hand to vLLM (verl 0.9.1, vllm_async_server.py:309-345).
    says = {
        "enforce_eager": rollout.enforce_eager,
        "cudagraph_mode": own.compilation_config.get("cudagraph_mode", "FULL_AND_PIECEWISE"),
        "cudagraph_capture_sizes": list(
            own.cudagraph_capture_sizes or own.compilation_config.get("cudagraph_capture_sizes") or []
        )
        or None,
        "enable_sleep_mode": own.enable_sleep_mode,
    }
    if says["enforce_eager"]:
        says |= {"cudagraph_mode": "NONE", "cudagraph_capture_sizes": None}
    found = [
        f"{name}: {shown(value)} -> {shown(decisions[name].value)}"
        for name, value in says.items()
        if value != decisions[name].value
    ]
    found += [f"refused: {sentence}" for sentence in conflicts.find(ours, facts, request, decisions)]
    return found or ["as the script says"]


if __name__ == "__main__":
    os.environ["VERL_PLATFORM"] = "cpu"
    FILE.write_text(table(verl_configs.installed()), encoding="utf-8")
    print(f"{FILE.name} written", file=sys.stderr)
