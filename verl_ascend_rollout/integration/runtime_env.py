"""The environment variables that a job's configuration gives to its Ray processes, beside those of `ray job submit`.

Ray refuses a job that names one variable in both, also with the same value ("Failed to merge the Job's runtime env",
ray 2.60, _private/worker.py:1789-1815).  verl drops its own defaults then (trainer/constants_ppo.py), and not what the
configuration says, as our platform files do.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from verl_ascend_rollout import ROLLOUT_NAME
from verl_ascend_rollout.integration.rollout_choice import name_of, say
from verl_ascend_rollout.platforms.detect import OVERRIDE, detect
from verl_ascend_rollout.policy.job_config import setting

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where `ray job submit` hands the job's runtime env to its driver (ray 2.60, _private/runtime_env/constants.py:2)."""

ENV_VARS = "ray_kwargs.ray_init.runtime_env.env_vars"

MODULES_VARIABLE = "VERL_USE_EXTERNAL_MODULES"
"""verl's own variable for modules that `import verl` imports, by name, with commas (verl 0.8.0, __init__.py:38)."""

AUTOLOAD = "verl_ascend_rollout.autoload"


def of_the_job(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables of the runtime env with which the job was submitted, by name."""
    try:
        found = json.loads(environ.get(JOB_CONFIG, "{}"))["runtime_env"]["env_vars"]
    except (ValueError, KeyError, TypeError):
        return {}
    return dict(found) if isinstance(found, Mapping) else {}


def yield_to_job(config: DictConfig, environ: Mapping[str, str]) -> None:
    """Let the configuration name no variable that the job's runtime env names.

    What the user gave to `ray job submit` stands; where the configuration says otherwise, one line tells it.
    """
    submitted = of_the_job(environ)
    given: Any = setting(config, ENV_VARS) or {}
    twice = [name for name in given if name in submitted] if not _is_overridden(environ) else []
    for name in twice:
        if str(given[name]) != submitted[name]:
            say(
                f"{name}={submitted[name]} of the job's runtime env stands, and {ENV_VARS}.{name}={given[name]} of the "
                "configuration is dropped"
            )
        with read_write(config), open_dict(config):
            del given[name]


def tell_platform(config: DictConfig, environ: Mapping[str, str]) -> None:
    """Let every process of the job know the platform, where the driver knows it and another process may not find it.

    A process on a node without an accelerator, as a head node may be, would take the platform for NVIDIA's (verl 0.9.1,
    plugin/platform/platform_manager.py:112).
    """
    platform = environ.get(OVERRIDE)
    if not platform and setting(config, "trainer.device") == "npu" and detect(environ).name != "npu":
        platform = "npu"
    if platform and OVERRIDE not in of_the_job(environ) and not setting(config, f"{ENV_VARS}.{OVERRIDE}"):
        with read_write(config), open_dict(config):
            OmegaConf.update(config, f"{ENV_VARS}.{OVERRIDE}", platform, force_add=True)


def load_by_name(environ: MutableMapping[str, str]) -> None:
    """Let `import verl` load our plug-in in every process that inherits this environment, beside what it loads there.

    verl before 0.9.0 knows no entry points.
    """
    environ[MODULES_VARIABLE] = _with_ours(environ.get(MODULES_VARIABLE, ""))


def tell_module(config: DictConfig, environ: Mapping[str, str]) -> None:
    """Let every process of the job load our plug-in by name where the driver does; also on a cluster that was started
    without.  What the configuration names there stays.

    Raises:
        SystemExit: with code 2, where the job was submitted with an environment that keeps us out.
    """
    here = environ.get(MODULES_VARIABLE, "")
    if AUTOLOAD not in here.split(","):
        return
    submitted = of_the_job(environ).get(MODULES_VARIABLE)
    if submitted is not None and not _is_overridden(environ):
        if AUTOLOAD not in submitted.split(",") and name_of(config) == ROLLOUT_NAME:
            print(
                f"{ROLLOUT_NAME}: this verl loads us by {MODULES_VARIABLE}, and the job's runtime env sets it to "
                f"{submitted!r}: add {AUTOLOAD} to it there",
                file=sys.stderr,
            )
            raise SystemExit(2)
        return
    given = setting(config, f"{ENV_VARS}.{MODULES_VARIABLE}")
    with read_write(config), open_dict(config):
        names = _with_ours(here if given is None else str(given))
        OmegaConf.update(config, f"{ENV_VARS}.{MODULES_VARIABLE}", names, force_add=True)


def _with_ours(names: str) -> str:
    modules = [name for name in names.split(",") if name]
    return ",".join(modules if AUTOLOAD in modules else [*modules, AUTOLOAD])


def _is_overridden(environ: Mapping[str, str]) -> bool:
    """Return whether Ray lets the configuration win over what the job was submitted with."""
    return environ.get("RAY_OVERRIDE_JOB_RUNTIME_ENV") == "1"
