"""`ascend-safe`: what a person asks of this package at a prompt.

Works on a broken installation too: nothing here imports torch, verl or vLLM.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
from typing import Any, get_args

from packaging.version import InvalidVersion, Version

from verl_ascend_rollout import ROLLOUT_NAME, __version__, events, job_config, timeline
from verl_ascend_rollout.bench import cli as bench
from verl_ascend_rollout.checks.compare import cli as compare
from verl_ascend_rollout.checks.doctor import cli as doctor
from verl_ascend_rollout.checks.smoke import cli as smoke
from verl_ascend_rollout.options import KVRung, OnUnsafe
from verl_ascend_rollout.platforms.base import PlatformError, PlatformFacts, PlatformName, Soc
from verl_ascend_rollout.platforms.detect import detect, planned
from verl_ascend_rollout.platforms.npu import soc_of
from verl_ascend_rollout.policy import Decisions, PolicyError, decide, table

NARROWEST_TABLE = 120


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, 1 where the answer is that something cannot work, 2 for a command that is not understood.
    """
    try:
        arguments = _parser().parse_args(argv)
        status: int = arguments.run(arguments)
        return status
    except SystemExit as stop:  # argparse's way out, also of --help and --version
        return stop.code if isinstance(stop.code, int) else 2
    except (PlatformError, PolicyError) as error:
        print(f"ascend-safe: {error}", file=sys.stderr)
        return 1
    except (job_config.ConfigError, events.EventsError) as error:
        print(f"ascend-safe: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ascend-safe", description=f"Ask about the {ROLLOUT_NAME} rollout for verl, and check it."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    explain = commands.add_parser(
        "explain",
        help="what the rollout decides on this machine, or on one you plan, and why",
        description="Print what was found on this machine, or said of one you plan with --platform, and what the "
        "rollout decides there: each value with its reason, its source, and whether it was measured, read or inferred.",
    )
    explain.set_defaults(run=_explain, parser=explain)
    machine = explain.add_argument_group("a machine that is only planned")
    machine.add_argument(
        "--platform", choices=get_args(PlatformName), help="decide for this platform, not for this machine"
    )
    machine.add_argument(
        "--soc", type=_soc, metavar="SOC", help=f"its Ascend chip: {', '.join(get_args(Soc))}, or 910B3, ..."
    )
    machine.add_argument("--vllm", type=_version, metavar="VERSION", help="its version of vLLM")
    machine.add_argument("--vllm-ascend", type=_version, metavar="VERSION", help="its version of vllm-ascend")
    wishes = explain.add_argument_group(
        "your settings, as in the rollout's configuration; those that are given here go before those of --config"
    )
    wishes.add_argument(
        "--config", metavar="FILE", help="a job's configuration: its .hydra/config.yaml, or the rollout's settings"
    )
    wishes.add_argument("--model", metavar="DIR", help="the model's folder, for what its config.json says")
    wishes.add_argument("--enforce-eager", choices=("true", "false", "auto"))
    wishes.add_argument("--enable-sleep-mode", choices=("true", "false"))
    wishes.add_argument("--free-cache-engine", choices=("true", "false"))
    wishes.add_argument("--kv-rung", choices=get_args(KVRung))
    wishes.add_argument("--on-unsafe", choices=get_args(OnUnsafe))
    wishes.add_argument("--expert-parallel-size", type=int, metavar="N")
    wishes.add_argument("--lora", action="store_true", help="adapters are trained")
    wishes.add_argument("--mtp", action="store_true", help="multi-token prediction drafts")
    explain.add_argument("--json", action="store_true", help="print JSON")
    bench.add_parser(commands)
    drawn = commands.add_parser(
        "timeline",
        help="where a run's memory and time went, from its events",
        description="Print the totals of a run's lifecycle events (engine_kwargs.ascend_safe.events), and draw memory "
        "over time with the phases of each training step.",
    )
    drawn.add_argument("events", metavar="EVENTS", help="the file of events: one JSON line each")
    drawn.add_argument("--out", metavar="FILE", help="draw into this file: .png, .svg or .pdf (needs matplotlib)")
    drawn.add_argument("--json", action="store_true", help="print JSON")
    drawn.set_defaults(run=lambda arguments: timeline.run(arguments.events, arguments.out, as_json=arguments.json))
    doctor.add_parser(commands)
    smoke.add_parser(commands)
    compare.add_parser(commands)
    return parser


def _explain(arguments: argparse.Namespace) -> int:
    facts = _facts(arguments)
    job = job_config.read(arguments.config) if arguments.config else job_config.Job()
    # The environment of this prompt says nothing about a machine that is only planned.
    wish = dataclasses.replace(job.wishes, environ={} if arguments.platform else dict(os.environ))
    if arguments.model:
        wish = dataclasses.replace(wish, model=job_config.read_model(arguments.model))
    wish = dataclasses.replace(wish, **_given(arguments))
    decisions = decide(facts, wish)
    if arguments.json:
        print(json.dumps({"platform": facts.as_dict(), "decisions": decisions.as_dicts()}, indent=2, default=str))
    else:
        print("\n".join([_text(facts, decisions), *job.notes]))
    return 0


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given as options of the command, as fields of `Wishes`."""
    truth = {"true": True, "false": False, "auto": None}
    given: dict[str, Any] = {
        name: truth[value]
        for name in ("enforce_eager", "enable_sleep_mode", "free_cache_engine")
        if (value := getattr(arguments, name)) is not None
    }
    for name in ("kv_rung", "on_unsafe", "expert_parallel_size"):
        if (value := getattr(arguments, name)) is not None:
            given[name] = value
    given.update({name: True for name in ("lora", "mtp") if getattr(arguments, name)})
    return given


def _facts(arguments: argparse.Namespace) -> PlatformFacts:
    if arguments.platform is None:
        for option in ("soc", "vllm", "vllm_ascend"):
            if getattr(arguments, option) is not None:
                arguments.parser.error(
                    f"--{option.replace('_', '-')} describes a machine that is only planned: say --platform as well"
                )
        return detect(smi=True)
    for option in ("soc", "vllm_ascend"):
        if getattr(arguments, option) is not None and arguments.platform != "npu":
            arguments.parser.error(f"--{option.replace('_', '-')} needs --platform npu, not {arguments.platform}")
    versions = {"vllm": arguments.vllm, "vllm-ascend": arguments.vllm_ascend}
    return planned(
        arguments.platform, arguments.soc, {name: version for name, version in versions.items() if version is not None}
    )


def _text(facts: PlatformFacts, decisions: Decisions) -> str:
    soc = f", SoC {facts.soc}" if facts.soc else ""
    lines = [f"platform {facts.name} (verl's {facts.verl_name}){soc}"]
    if facts.device_count:
        lines[0] += f", devices for this process: {facts.device_count}"
    lines += [f"  {sentence}" for sentence in facts.evidence]
    if facts.versions:
        lines.append("versions " + ", ".join(f"{name} {version}" for name, version in facts.versions.items()))
    known = {True: "yes", False: "no", None: "not known"}
    lines.append("abilities " + ", ".join(f"{name} {known[able]}" for name, able in facts.abilities.items()))
    width = max(NARROWEST_TABLE, shutil.get_terminal_size((160, 24)).columns)
    return "\n".join([*lines, "", table(decisions, width)])


def _soc(text: str) -> Soc:
    for soc in get_args(Soc):
        if text.strip().upper() == soc:
            found: Soc = soc
            return found
    chip = soc_of(text)
    if chip is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no Ascend chip that is known here: say one of {', '.join(get_args(Soc))}, or the chip's name "
            "as npu-smi has it (910B3)"
        )
    return chip


def _version(text: str) -> str:
    try:
        Version(text)
    except InvalidVersion:
        raise argparse.ArgumentTypeError(f"{text!r} is no version: write it like 0.18.0") from None
    return text


if __name__ == "__main__":
    sys.exit(main())
