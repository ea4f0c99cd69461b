"""What hydra composes for a job of verl's, looked at before and after.  Nothing else touches hydra's config loader.

Imports nothing but hydra, and the rest where a job needs it.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from verl_ascend_rollout import ROLLOUT_NAME
from verl_ascend_rollout.integration import rollout_choice, runtime_env

DRIVER_CHECK = "verl_ascend_rollout.integration.preflight.DriverCheck"
"""The callback of hydra's that checks a job before its entry point is called."""

MARK = "_ascend_safe_composes"

logger = logging.getLogger(__name__)


def install(loader: type[ConfigLoader], provider: str) -> None:
    """Let this class of config loaders compose jobs of verl's as they are meant; a second time does nothing.

    Args:
        provider: who added our entries to the search path.  A loader whose search path has none composes as it always
            did: other hydra applications of the same process.
    """
    load: Callable[..., DictConfig] = loader.load_configuration
    compute: Callable[..., Any] = loader.compute_defaults_list
    if hasattr(load, MARK):
        return

    def is_verls(self: ConfigLoader) -> bool:
        return any(entry.provider == provider for entry in self.get_search_path().get_path())

    def spell_out(self: ConfigLoader, name: str | None, overrides: list[str]) -> tuple[list[str], str | None]:
        if not rollout_choice.is_spoken(overrides):
            return overrides, None
        rest = rollout_choice.without(overrides)
        known = compute(self, name, rest, RunMode.MULTIRUN).overrides.known_choices

        def stock() -> DictConfig:
            keys = {*known, "hydra.searchpath"}
            choices = [override for override in rest if override.lstrip("+~").partition("=")[0] in keys]
            return load(self, name, choices, RunMode.RUN)

        return rollout_choice.spell_out(overrides, known, stock)

    @functools.wraps(load)
    def load_configuration(
        self: ConfigLoader, config_name: str | None, overrides: list[str], *args: Any, **kwargs: Any
    ) -> DictConfig:
        if not is_verls(self):
            return load(self, config_name, overrides, *args, **kwargs)
        overrides, option = spell_out(self, config_name, overrides)
        config = load(self, config_name, overrides, *args, **kwargs)
        platform = _platform_of_the_cluster(config)
        if platform is not None:
            config = load(self, config_name, [*overrides, f"platform={platform}"], *args, **kwargs)
        choices = config.hydra.runtime.choices
        with open_dict(config.hydra):
            if option is not None:
                choices[rollout_choice.ENTRY] = option
            rollout_choice.enforce_choice(config)
            if "platform" in choices or rollout_choice.name_of(config) == ROLLOUT_NAME:
                config.hydra.callbacks[ROLLOUT_NAME] = {"_target_": DRIVER_CHECK}
        runtime_env.yield_to_job(config, os.environ)
        return config

    @functools.wraps(compute)
    def compute_defaults_list(
        self: ConfigLoader, config_name: str | None, overrides: list[str], *args: Any, **kwargs: Any
    ) -> Any:
        if is_verls(self):
            overrides, _ = spell_out(self, config_name, overrides)
        return compute(self, config_name, overrides, *args, **kwargs)

    setattr(load_configuration, MARK, True)
    loader.load_configuration = load_configuration  # type: ignore[method-assign]
    loader.compute_defaults_list = compute_defaults_list  # type: ignore[method-assign]


def _platform_of_the_cluster(config: DictConfig) -> str | None:
    """Return the platform to compose for where `platform=auto` has found no accelerator here; `None` to leave it.

    The driver of a cluster may sit on a head node without one: then the nodes of the cluster are asked.
    """
    took_the_cpu = OmegaConf.select(config, "trainer.device") == "cpu"
    if config.hydra.runtime.choices.get("platform") != "auto" or not took_the_cpu or os.environ.get("VERL_PLATFORM"):
        return None
    from verl_ascend_rollout.integration import cluster

    joined = cluster.joined(config, os.environ)
    try:
        facts = cluster.platform(cluster.ask(joined)) if joined is not None else None
    except cluster.ClusterError as error:
        logger.warning("platform=auto found no accelerator here, and %s", error)
        return None
    if facts is not None and joined is not None:
        rollout_choice.say(f"platform=auto takes {facts.name}: no accelerator here, and {joined.words} says so")
        return facts.name
    warn_of_cpu()
    return None


@functools.cache  # hydra composes the config of a run more than once
def warn_of_cpu() -> None:
    """Say that nobody asked for the CPU: the driver of a cluster may sit on a node without an accelerator."""
    logger.warning(
        "platform=auto found no accelerator that can be used here and takes the CPU: on the head node of a cluster of "
        "GPUs or NPUs give the cluster's address (ray_kwargs.ray_init.address), or say platform=cuda or platform=npu."
    )
