"""The environment of a job's Ray processes: what the configuration gives, beside what `ray job submit` was given."""

from __future__ import annotations

import json
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from verl_ascend_rollout.integration import rollout_choice, runtime_env


@pytest.fixture(autouse=True)
def nothing_was_said() -> None:
    rollout_choice.say.cache_clear()


def job(**env_vars: str) -> DictConfig:
    config = OmegaConf.create(
        {
            "trainer": {"device": "cuda"},
            "ray_kwargs": {"ray_init": {"num_cpus": None, "runtime_env": {"env_vars": env_vars}}},
        }
    )
    OmegaConf.set_struct(config, True)
    return config


def submitted(**env_vars: str) -> dict[str, str]:
    """The environment of a driver that `ray job submit --runtime-env-json` has started."""
    return {runtime_env.JOB_CONFIG: json.dumps({"runtime_env": {"env_vars": env_vars}, "metadata": {}}), **env_vars}


def env_vars(config: DictConfig) -> Any:
    return OmegaConf.to_container(config.ray_kwargs.ray_init.runtime_env.env_vars)


OURS = runtime_env.AUTOLOAD
MODULES = runtime_env.MODULES_VARIABLE


@pytest.mark.parametrize(
    ("here", "given", "told"),
    [
        (OURS, {}, OURS),
        (f"theirs,{OURS}", {}, f"theirs,{OURS}"),
        # What the configuration says is what Ray gives to the processes.
        (f"theirs,{OURS}", {MODULES: "others"}, f"others,{OURS}"),
        (OURS, {MODULES: f"{OURS},others"}, f"{OURS},others"),
        # A verl that loads us by itself.
        ("theirs", {}, None),
    ],
)
def test_every_process_loads_us_by_name_where_the_driver_does(
    here: str, given: dict[str, str], told: str | None
) -> None:
    config = job(**given)
    runtime_env.tell_module(config, {MODULES: here})
    assert env_vars(config).get(MODULES) == told


def test_a_job_that_was_submitted_without_us_is_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    """Ray lets the configuration add nothing to a variable that `ray job submit` was given."""
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": {"name": "ascend_safe"}}, **job()})
    runtime_env.tell_module(config, submitted(**{MODULES: f"theirs,{OURS}"}))
    assert env_vars(config) == {}
    environ = submitted(**{MODULES: "theirs"})
    runtime_env.load_by_name(environ)
    runtime_env.tell_module(job(), environ)  # another rollout's
    with pytest.raises(SystemExit) as stop:
        runtime_env.tell_module(config, environ)
    assert (stop.value.code, capsys.readouterr().err) == (
        2,
        "ascend_safe: this verl loads us by VERL_USE_EXTERNAL_MODULES, and the job's runtime env sets it to 'theirs': "
        "add verl_ascend_rollout.autoload to it there\n",
    )


def test_a_variable_that_both_name_is_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    """With it in both places Ray ends the job, also where the values are the same."""
    config = job(VLLM_ASCEND_ENABLE_NZ="0", VERL_PLATFORM="cpu", MINE="1")
    runtime_env.yield_to_job(config, submitted(VLLM_ASCEND_ENABLE_NZ="0", VERL_PLATFORM="npu", OTHER="2"))
    assert env_vars(config) == {"MINE": "1"}
    assert capsys.readouterr().err == (
        "ascend_safe: VERL_PLATFORM=npu of the job's runtime env stands, and "
        "ray_kwargs.ray_init.runtime_env.env_vars.VERL_PLATFORM=cpu of the configuration is dropped\n"
    )


@pytest.mark.parametrize(
    "environ",
    [
        {},
        submitted(OTHER="2"),
        {runtime_env.JOB_CONFIG: "{}"},
        {runtime_env.JOB_CONFIG: "no JSON"},
        {runtime_env.JOB_CONFIG: json.dumps({"runtime_env": {"env_vars": None}})},
        # With it Ray lets the configuration win.
        {**submitted(VERL_PLATFORM="npu"), "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1"},
    ],
)
def test_what_only_the_configuration_names_stays(environ: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    config = job(VERL_PLATFORM="cpu")
    runtime_env.yield_to_job(config, environ)
    assert env_vars(config) == {"VERL_PLATFORM": "cpu"}
    assert capsys.readouterr().err == ""


def test_a_configuration_without_an_environment() -> None:
    config = OmegaConf.create({"trainer": {}})
    runtime_env.yield_to_job(config, submitted(VERL_PLATFORM="npu"))
    assert config == {"trainer": {}}


@pytest.mark.parametrize(
    ("device", "environ", "expected"),
    [
        ("cuda", {"VERL_PLATFORM": "npu"}, {"VERL_PLATFORM": "npu"}),
        # The driver's machine has none: it is the head of a cluster of NPUs.
        ("npu", {}, {"VERL_PLATFORM": "npu"}),
        # verl finds these by itself.
        ("cuda", {}, {}),
        ("npu", submitted(VERL_PLATFORM="npu"), {}),
    ],
)
def test_every_process_of_the_job_knows_the_platform(
    device: str, environ: dict[str, str], expected: dict[str, str]
) -> None:
    config = job()
    config.trainer.device = device
    runtime_env.tell_platform(config, environ)
    assert env_vars(config) == expected


def test_what_the_user_says_of_the_platform_stands() -> None:
    config = job(VERL_PLATFORM="huawei")
    runtime_env.tell_platform(config, {"VERL_PLATFORM": "npu"})
    assert env_vars(config) == {"VERL_PLATFORM": "huawei"}


def test_a_config_without_a_runtime_env_gets_one() -> None:
    config = OmegaConf.create({"trainer": {"device": "npu"}, "ray_kwargs": {"ray_init": {"num_cpus": None}}})
    OmegaConf.set_struct(config, True)
    runtime_env.tell_platform(config, {})
    assert env_vars(config) == {"VERL_PLATFORM": "npu"}
