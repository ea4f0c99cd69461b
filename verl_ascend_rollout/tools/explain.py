"""`ascend-safe explain`: what the rollout decides on this machine, or on one that is only planned, and why."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import textwrap
from typing import Any, get_args

from packaging.version import InvalidVersion, Version

from verl_ascend_rollout.options import ROLLOUT, KVRelease, OnUnsafe, today
from verl_ascend_rollout.platforms.base import PlatformFacts, PlatformName, Soc
from verl_ascend_rollout.platforms.detect import detect, planned
from verl_ascend_rollout.platforms.npu import soc_named
from verl_ascend_rollout.policy import conflicts, job_config
from verl_ascend_rollout.policy.engine_args import Decisions, PolicyError, decide, table
from verl_ascend_rollout.tools import terminal
from verl_ascend_rollout.tools.arguments import file_name, positive

TRUTH = {"true": True, "false": False, "auto": None}
SWITCHES = {
    "enforce_eager": tuple(TRUTH),
    "enable_sleep_mode": ("true", "false"),
    "free_cache_engine": ("true", "false"),
}
"""Options by the field of `EngineRequest`, with what may be said."""


def add_parser(commands: Any) -> None:
    """Add the sub-command to argparse's sub-parsers."""
    parser = commands.add_parser(
        "explain",
        help="what the rollout decides on this machine, or on one you plan, and why",
        description="Print what was found on this machine, or said of one you plan with --platform, and what the "
        "rollout decides there: each value with its reason, and with --sources where that comes from, and whether it "
        "was measured, read or inferred.",
    )
    parser.set_defaults(run=run, parser=parser)
    machine = parser.add_argument_group("a machine that is only planned")
    add = machine.add_argument
    add("--platform", choices=get_args(PlatformName), help="decide for this platform, not for this machine")
    add("--soc", type=_soc, metavar="SOC", help=f"its Ascend chip: {', '.join(get_args(Soc))}, or 910B3, ...")
    add("--vllm", type=_version, metavar="VERSION", help="its version of vLLM")
    add("--vllm-ascend", type=_version, metavar="VERSION", help="its version of vllm-ascend")
    settings = parser.add_argument_group(
        "your settings", "as in the rollout's configuration; what is given here goes before what --config says"
    )
    add = settings.add_argument
    add(
        "--config",
        type=file_name,
        metavar="FILE",
        help="a job's configuration: its .hydra/config.yaml, or the rollout's settings",
    )
    add("--model", type=file_name, metavar="DIR", help="the model's folder, for what its config.json says")
    for name, choices in SWITCHES.items():
        add(f"--{name.replace('_', '-')}", choices=choices)
    for name, told in (("kv_release", ", ".join(get_args(KVRelease))), ("kv_rung", argparse.SUPPRESS)):
        parse = functools.partial(today, name)
        flag = f"--{name.replace('_', '-')}"
        add(flag, type=parse, choices=get_args(KVRelease), metavar="METHOD", dest="kv_release", help=told)
    add("--on-unsafe", choices=get_args(OnUnsafe))
    add("--expert-parallel-size", type=positive, metavar="N")
    add("--lora", action="store_true", help="adapters are trained")
    add("--load-format", metavar="FORMAT", help="how the engine gets its first weights: verl's default is dummy")
    add("--mtp", action="store_true", help="multi-token prediction drafts")
    parser.add_argument("--sources", action="store_true", help="print the source of each reason as well")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Decide and print; the exit status.

    Raises:
        PolicyError: the settings cannot work there.
        ConfigError: the configuration cannot be read.
    """
    facts = _facts(arguments)
    job = job_config.read(arguments.config) if arguments.config is not None else job_config.Job()
    # The environment of this prompt says nothing about a machine that is only planned.
    request = dataclasses.replace(job.request, environ={} if arguments.platform else dict(os.environ))
    if arguments.model is not None:
        request = dataclasses.replace(request, model=job_config.read_model(arguments.model))
    request = dataclasses.replace(request, **_given(arguments))
    decisions = decide(facts, request)
    from omegaconf import OmegaConf

    config = job.config if job.config is not None else OmegaConf.create({})
    if arguments.load_format:
        OmegaConf.update(config, f"{ROLLOUT}.load_format", arguments.load_format, force_add=True)
    if problems := list(conflicts.find(config, facts, request, decisions)):
        raise PolicyError("; ".join(problems))
    if arguments.json:
        print(json.dumps({"platform": facts.as_dict(), "decisions": decisions.as_dicts()}, indent=2, default=str))
    else:
        warnings = conflicts.find_warnings(config, facts, request)
        print("\n".join([_text(facts, decisions, arguments.sources), *job.notes, *warnings]))
    return 0


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that were given as options of the command, as fields of `EngineRequest`."""
    names = (*SWITCHES, "kv_release", "on_unsafe", "expert_parallel_size", "lora", "mtp")
    said = {name: getattr(arguments, name) for name in names}
    given = {name: value for name, value in said.items() if value is not None and value is not False}
    return {name: TRUTH[value] if name in SWITCHES else value for name, value in given.items()}


def _facts(arguments: argparse.Namespace) -> PlatformFacts:
    for option in ("soc", "vllm", "vllm_ascend"):
        if getattr(arguments, option) is None:
            continue
        said = f"--{option.replace('_', '-')}"
        if arguments.platform is None:
            arguments.parser.error(f"{said} describes a machine that is only planned: say --platform as well")
        if option != "vllm" and arguments.platform != "npu":
            arguments.parser.error(f"{said} needs --platform npu, not {arguments.platform}")
    if arguments.platform is None:
        return detect(smi=True)
    versions = {"vllm": arguments.vllm, "vllm-ascend": arguments.vllm_ascend}
    known = {name: version for name, version in versions.items() if version is not None}
    return planned(arguments.platform, arguments.soc, known)


def _text(facts: PlatformFacts, decisions: Decisions, sources: bool) -> str:
    soc = f", SoC {facts.soc}" if facts.soc else ""
    lines = [f"platform {facts.name} (verl's {facts.verl_name}){soc}"]
    if facts.device_count:
        lines[0] += f", devices for this process: {facts.device_count}"
    lines += [f"  {sentence}" for sentence in facts.evidence]
    if facts.versions:
        lines.append("versions " + ", ".join(f"{name} {version}" for name, version in facts.versions.items()))
    known = {True: "yes", False: "no", None: "not known"}
    lines.append("abilities " + ", ".join(f"{name} {known[able]}" for name, able in facts.abilities.items()))
    width = terminal.width()
    lines = [part for line in lines for part in textwrap.wrap(line, width, subsequent_indent="    ")]
    return "\n".join([*lines, "", table(decisions, width, sources)])


def _soc(text: str) -> Soc:
    chip = soc_named(text)
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
