"""Each way to choose the rollout, composed from verl's own config as verl's stock entry point composes it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import logging
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import OmegaConf

from verl_ascend_rollout.integration import cluster, composition, rollout_choice
from verl_ascend_rollout.integration.cluster import Node
from verl_ascend_rollout.options import OLD_OPTIONS, AscendSafeOptions
from verl_ascend_rollout.platforms.detect import detect, planned

OPTIONS = [*(field.name for field in dataclasses.fields(AscendSafeOptions)), *OLD_OPTIONS]
VERLS_PRIMARIES = ["ppo_trainer", "ppo_megatron_trainer"]
LONG = "rollout@actor_rollout_ref.rollout"
FORMS = [
    *((primary, form) for primary in [*VERLS_PRIMARIES, "ascend_safe"] for form in ("rollout", LONG, "+rollout")),
    ("ppo_trainer.yaml", "rollout"),
]
"""Each primary config with each way to choose an option of the group, as `<form>=<option>`."""


def verl_folder() -> Path:
    spec = importlib.util.find_spec("verl")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No hydra left from another test, and a platform that does not depend on the machine."""
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    # The engine's tests may have left Ray running in this process, as in a job that has joined its cluster.
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(is_initialized=lambda: False))
    GlobalHydra.instance().clear()
    yield
    GlobalHydra.instance().clear()


def hydra_of(entry_point: Path) -> Hydra:
    """What `@hydra.main(config_path="config")` makes under `python -m`, where it knows the file and not the module."""
    search_path = create_automatic_config_search_path(str(entry_point), None, "config")
    return Hydra.create_main_hydra2(task_name=entry_point.stem, config_search_path=search_path)


def compose(name: str, *overrides: str, entry_point: Path | None = None) -> Any:
    """The config that the entry point would get, as a plain container with nothing resolved."""
    entry_point = entry_point or verl_folder() / "trainer" / "main_ppo.py"
    return copy.deepcopy(compose_once(name, overrides, entry_point, os.environ.get("VERL_PLATFORM")))


@functools.cache  # parsing verl's YAML takes a third of a second, and many tests compare with the same configs
def compose_once(name: str, overrides: tuple[str, ...], entry_point: Path, verl_platform: str | None) -> Any:
    GlobalHydra.instance().clear()
    config = hydra_of(entry_point).compose_config(
        config_name=name, overrides=list(overrides), run_mode=RunMode.RUN, with_log_configuration=False
    )
    container = OmegaConf.to_container(config)
    assert isinstance(container, dict)
    del container["hydra"]
    return container


def rollout_of(config: Any) -> Any:
    assert "rollout" not in config, "an option landed beside actor_rollout_ref, where nothing reads it"
    return config["actor_rollout_ref"]["rollout"]


def plugin_module() -> types.ModuleType:
    """Our module as hydra has loaded it (hydra executes plug-in modules itself)."""
    Plugins.instance()
    return sys.modules["hydra_plugins.verl_ascend_rollout"]


@pytest.fixture
def no_plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """verl as it is without us."""
    compose_once.cache_clear()
    monkeypatch.setattr(plugin_module().VerlAscendRolloutSearchPath, "manipulate_search_path", lambda *_: None)
    yield
    compose_once.cache_clear()


# The forms


@pytest.mark.parametrize(("primary", "form"), FORMS)
def test_every_form_really_changes_the_rollout(primary: str, form: str) -> None:
    rollout = rollout_of(compose(primary, f"{form}=ascend_safe"))
    assert rollout["name"] == "ascend_safe"
    assert rollout["enforce_eager"] is None
    assert rollout["engine_kwargs"]["ascend_safe"] == dict.fromkeys(OPTIONS)


def test_the_real_entry_point() -> None:
    """Slow (it imports verl), so only for the form that needs all of the plug-in."""
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "rollout=ascend_safe", "--cfg", "job"]
    environment = {**os.environ, "VERL_PLATFORM": "nvidia"}
    done = subprocess.run(
        [*command, "-p", "actor_rollout_ref.rollout"], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    # Whatever is logged while verl is imported comes before hydra's header.
    _, header, config = done.stdout.partition("# @package actor_rollout_ref.rollout\n")
    assert header, done.stdout
    rollout = yaml.safe_load(config)
    assert rollout["name"] == "ascend_safe"
    assert rollout["enforce_eager"] is None
    assert rollout["engine_kwargs"]["ascend_safe"] == dict.fromkeys(OPTIONS)


# Without our options, verl is as it was


@pytest.mark.parametrize("primary", [*VERLS_PRIMARIES, "sft_trainer_engine"])
def test_the_default_config_is_byte_for_byte_verls(primary: str, request: pytest.FixtureRequest) -> None:
    with_plugin = OmegaConf.to_yaml(OmegaConf.create(compose(primary)))
    request.getfixturevalue("no_plugin")
    stock = OmegaConf.to_yaml(OmegaConf.create(compose(primary)))
    assert with_plugin.encode() == stock.encode()
    with pytest.raises(ConfigCompositionException, match="Could not override 'rollout'"):
        compose("ppo_trainer", "rollout=rollout")  # the plug-in really was away


@pytest.mark.parametrize("primary", VERLS_PRIMARIES)
def test_verls_own_option_in_the_short_form_is_stock(primary: str) -> None:
    assert compose(primary, "rollout=rollout") == compose(primary)


@pytest.mark.parametrize("override", ["rollout=vllm", f"{LONG}=vllm", "+rollout=vllm"])
def test_an_a_b_on_our_primary_config_differs_in_nothing_but_the_rollout(override: str) -> None:
    ours, stock = compose("ascend_safe", "rollout=ascend_safe"), compose("ascend_safe", override)
    assert rollout_of(stock).pop("name") == "vllm"
    assert rollout_of(stock).pop("enforce_eager") is False
    assert rollout_of(stock)["engine_kwargs"] == rollout_of(compose("ppo_trainer"))["engine_kwargs"]
    assert rollout_of(ours).pop("name") == "ascend_safe"
    assert rollout_of(ours).pop("enforce_eager") is None
    del rollout_of(ours)["engine_kwargs"]["ascend_safe"]
    assert ours == stock


# Overrides and mistakes


@pytest.mark.parametrize("primary", [*VERLS_PRIMARIES, "ascend_safe"])
@pytest.mark.parametrize("order", [1, -1])
def test_the_user_has_the_last_word(primary: str, order: int) -> None:
    overrides = [
        "rollout=ascend_safe",
        "actor_rollout_ref.rollout.enforce_eager=false",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=4",
        "actor_rollout_ref.rollout.engine_kwargs.ascend_safe.on_unsafe=error",
        "actor_rollout_ref.rollout.engine_kwargs.ascend_safe.verify=always",
        "algorithm.adv_estimator=rloo",
        "trainer.n_gpus_per_node=2",
    ]
    config = compose(primary, *overrides[::order])
    rollout = rollout_of(config)
    assert rollout["name"] == "ascend_safe"
    assert rollout["enforce_eager"] is False
    assert rollout["tensor_model_parallel_size"] == 4
    assert rollout["engine_kwargs"]["ascend_safe"] == {
        **dict.fromkeys(OPTIONS),
        "on_unsafe": "error",
        "verify": "always",
    }
    assert config["algorithm"]["adv_estimator"] == "rloo"
    assert config["trainer"]["n_gpus_per_node"] == 2


@pytest.mark.parametrize("setting", ["kv_rung=direct", "kv_release=direct", "kv_release=reallocate"])
def test_old_names_and_values_of_our_options_compose(setting: str) -> None:
    config = compose(
        "ppo_trainer", "rollout=ascend_safe", f"actor_rollout_ref.rollout.engine_kwargs.ascend_safe.{setting}"
    )
    assert AscendSafeOptions.from_rollout(rollout_of(config)).kv_release == "reallocate"


@pytest.mark.parametrize(("primary", "form"), FORMS)
def test_an_unknown_rollout_lists_the_options(primary: str, form: str) -> None:
    with pytest.raises(ConfigCompositionException) as error:
        compose(primary, f"{form}=nonsense")
    message = str(error.value)
    assert "Could not find 'rollout/nonsense'" in message
    listed = message.partition("Available options in 'rollout':")[2].partition("Config search path")[0].split()
    assert listed == ["ascend_safe", "rollout", "vllm"]


def test_an_unknown_option_of_ours_is_refused_by_hydra() -> None:
    with pytest.raises(ConfigCompositionException) as error:
        compose("ppo_trainer", "rollout=ascend_safe", "actor_rollout_ref.rollout.engine_kwargs.ascend_safe.verfy=off")
    assert "verfy" in str(error.value)


def test_the_options_are_those_of_the_dataclass_and_all_null() -> None:
    text = (Path(plugin_configs()) / "rollout" / "ascend_safe.yaml").read_text(encoding="utf-8")
    listed = yaml.safe_load(text)["engine_kwargs"]["ascend_safe"]
    assert list(listed) == OPTIONS
    assert AscendSafeOptions.from_mapping(listed) == AscendSafeOptions()
    for option in OPTIONS:
        comment, _, _ = text.partition(f"\n    {option}: null\n")
        assert comment.splitlines()[-1].strip().startswith("# "), f"{option} has no comment above it"


def plugin_configs() -> str:
    spec = importlib.util.find_spec("verl_ascend_rollout.configs")
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parent)


# The primary config and the platforms


def test_our_primary_config_is_grpo() -> None:
    config = compose("ascend_safe")
    assert config["algorithm"]["adv_estimator"] == "grpo"
    assert config["algorithm"]["use_kl_in_reward"] is False
    assert config["critic"]["enable"] is None  # verl then makes a critic for gae only
    assert rollout_of(config)["name"] == "ascend_safe"
    assert rollout_of(config)["n"] > 1
    assert rollout_of(config)["calculate_log_probs"] is True


def test_our_primary_config_takes_another_engine() -> None:
    config = compose("ascend_safe", "model_engine=megatron", "platform=npu")
    assert config["actor_rollout_ref"]["actor"]["strategy"] == "megatron"
    assert rollout_of(config)["name"] == "ascend_safe"
    assert config["trainer"]["device"] == "npu"


@pytest.mark.parametrize("platform", ["cpu", "cuda", "npu"])
def test_a_platform_by_name(platform: str) -> None:
    assert compose("ascend_safe", f"platform={platform}")["trainer"]["device"] == platform


@pytest.mark.parametrize(
    ("variable", "platform"),
    [("cpu", "cpu"), ("cuda", "cuda"), ("nvidia", "cuda"), ("npu", "npu"), ("huawei", "npu")],
)
def test_verl_platform_decides_auto(variable: str, platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    by_name = compose("ascend_safe", f"platform={platform}")
    monkeypatch.setenv("VERL_PLATFORM", variable)
    assert compose("ascend_safe") == by_name


def test_the_machine_decides_auto(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.delenv("VERL_PLATFORM")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    found = detect().name
    composition.warn_of_cpu.cache_clear()
    # An import of vLLM in this process raises the root logger's level.
    caplog.set_level(logging.WARNING, logger=composition.logger.name)
    config = compose("ascend_safe")
    assert config["trainer"]["device"] == found
    assert config == compose("ascend_safe", f"platform={found}")
    # The head node of a cluster has no accelerator either: a CPU that nobody asked for is said, once.
    assert sum("takes the CPU" in record.getMessage() for record in caplog.records) == (found == "cpu")


HEAD = Node("10.0.0.1", {"CPU": 16.0})
ON_NPUS = Node("10.0.0.2", {"CPU": 64.0, "NPU": 8.0}, {"facts": {"name": "npu", "soc": "A3", "versions": {}}})
ON_GPUS = Node("10.0.0.2", {"CPU": 64.0, "GPU": 8.0}, {"facts": {"name": "cuda", "soc": None, "versions": {}}})
ON_SLOTS = Node("10.0.0.2", {"CPU": 64.0, "GPU": 8.0}, {"facts": {"name": "cpu", "soc": None, "versions": {}}})
SILENT = Node("10.0.0.2", {"CPU": 64.0, "GPU": 8.0}, error="no answer within 45 s")


@pytest.mark.parametrize(
    ("node", "platform"), [(ON_NPUS, "npu"), (ON_GPUS, "cuda"), (ON_SLOTS, "cpu"), (SILENT, "cpu"), (None, "cpu")]
)
def test_on_a_head_node_without_an_accelerator_the_cluster_decides_auto(
    node: Node | None, platform: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("VERL_PLATFORM")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr("verl_ascend_rollout.platforms.detect.detect", lambda *_, **__: planned("cpu"))
    rollout_choice.say.cache_clear()

    def ask(joined: cluster.Joined) -> tuple[Node, ...]:
        if node is None:
            raise cluster.ClusterError(f"{joined.words} cannot be joined (no): see whether it is up")
        return (HEAD, node)

    monkeypatch.setattr(cluster, "ask", ask)
    compose_once.cache_clear()
    config = compose("ascend_safe", "actor_rollout_ref.rollout.n=5")
    compose_once.cache_clear()
    by_name = compose("ascend_safe", f"platform={platform}", "actor_rollout_ref.rollout.n=5")
    assert config == by_name
    said = f"platform=auto takes {platform}: no accelerator here, and the Ray cluster at 10.0.0.1:6379 says so"
    assert (said in capsys.readouterr().err) == (node not in (SILENT, None))


def test_a_bad_verl_platform_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_PLATFORM", "tpu")
    with pytest.raises(ConfigCompositionException, match="VERL_PLATFORM=tpu") as error:
        compose("ascend_safe")
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is None


def test_an_unknown_platform_lists_the_options() -> None:
    with pytest.raises(ConfigCompositionException) as error:
        compose("ascend_safe", "platform=tpu")
    listed = str(error.value).partition("Available options in 'platform':")[2].partition("Config search")[0].split()
    assert listed == ["auto", "cpu", "cuda", "npu"]


def test_cpu_has_what_a_cpu_needs() -> None:
    config = compose("ascend_safe", "platform=cpu")
    actor, model = config["actor_rollout_ref"]["actor"], config["actor_rollout_ref"]["model"]
    rollout = rollout_of(config)
    assert config["ray_kwargs"]["ray_init"]["num_gpus"] == config["trainer"]["n_gpus_per_node"] == 1
    assert config["ray_kwargs"]["ray_init"]["runtime_env"]["env_vars"] == {"VERL_PLATFORM": "cpu"}
    assert config["trainer"]["nnodes"] == 1
    assert rollout["tensor_model_parallel_size"] == 1
    assert rollout["enable_sleep_mode"] is False
    assert model["use_remove_padding"] is False
    assert model["override_config"] == {"attn_implementation": "sdpa"}
    assert actor["strategy"] == "fsdp2"
    assert config["actor_rollout_ref"]["ref"]["strategy"] == "${actor_rollout_ref.actor.strategy}"
    assert actor["use_torch_compile"] is actor["fsdp_config"]["use_torch_compile"] is False
    processes = [
        rollout["agent"]["num_workers"],
        config["reward"]["num_workers"],
        config["transfer_queue"]["backend"]["SimpleStorage"]["num_data_storage_units"],
    ]
    assert processes == [1, 1, 1]


NEW_TO_VERL = {
    # Fields that verl reads and its YAML files leave out.
    "actor_rollout_ref.rollout.enable_sleep_mode",
    "actor_rollout_ref.model.override_config.attn_implementation",
    "ray_kwargs.ray_init.num_gpus",
    "ray_kwargs.ray_init.runtime_env.env_vars.VERL_PLATFORM",
    "ray_kwargs.ray_init.runtime_env.env_vars.VLLM_ASCEND_ENABLE_NZ",
    "ray_kwargs.ray_init.include_dashboard",
}


def leaves(node: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(node, dict) or not node:
        return {path.removeprefix("."): node}
    return {key: value for name, child in node.items() for key, value in leaves(child, f"{path}.{name}").items()}


@pytest.mark.parametrize("platform", ["cpu", "cuda", "npu"])
def test_every_key_is_one_that_verl_has(platform: str) -> None:
    """A key that verl has renamed would compose without a word and do nothing."""
    verls = leaves(compose("ppo_trainer"))
    folder = Path(plugin_configs())
    for file in (folder / "platform" / f"{platform}.yaml", folder / "ascend_safe.yaml"):
        ours = yaml.safe_load(file.read_text(encoding="utf-8"))
        ours.pop("defaults", None)
        assert set(leaves(ours)) - NEW_TO_VERL <= set(verls), file.name


@pytest.mark.parametrize("platform", ["cpu", "cuda", "npu"])
def test_environment_variables_are_plain_strings(platform: str) -> None:
    # verl hands ray_init to Ray unresolved (trainer/main_ppo.py:74), and Ray takes strings only.
    runtime_env = compose("ascend_safe", f"platform={platform}")["ray_kwargs"]["ray_init"]["runtime_env"]
    for value in runtime_env.get("env_vars", {}).values():
        assert isinstance(value, str) and "${" not in value


# The plug-in among other applications


def test_the_plugin_imports_nothing_heavy() -> None:
    script = (
        "import sys, hydra\n"
        "with hydra.initialize_config_module('hydra.conf', version_base=None): pass\n"
        "assert 'hydra_plugins.verl_ascend_rollout' in sys.modules\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}"
        " & {'torch', 'verl', 'vllm', 'ray', 'transformers', 'numpy', 'verl_ascend_rollout'}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_hydras_namespace_package_has_no_init() -> None:
    spec = importlib.util.find_spec("hydra_plugins")
    assert spec is not None and spec.origin is None


def test_another_application_keeps_its_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With our groups on its search path, `platform=...` would be taken for the choice of an option, and refused."""
    monkeypatch.delitem(sys.modules, "verl", raising=False)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "app.yaml").write_text("platform: linux\nrollout: slow\n", encoding="utf-8")
    config = compose("app", "platform=mac", "rollout=fast", entry_point=tmp_path / "app.py")
    assert config == {"platform": "mac", "rollout": "fast"}


def test_a_primary_config_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        f"defaults:\n  - ppo_trainer\n  - override {LONG}: ascend_safe\n  - _self_\n"
        "actor_rollout_ref: {rollout: {n: 5}}\n",
        encoding="utf-8",
    )
    search_path = create_automatic_config_search_path(str(verl_folder() / "trainer" / "main_ppo.py"), None, "config")
    search_path.prepend("command-line", f"file://{tmp_path}", "schema")  # as hydra does for --config-dir
    hydra = Hydra.create_main_hydra2(task_name="main_ppo", config_search_path=search_path)
    for overrides, name in (([], "ascend_safe"), (["rollout=vllm"], "vllm"), (["rollout=ascend_safe"], "ascend_safe")):
        rollout = hydra.compose_config("mine", overrides, RunMode.RUN, with_log_configuration=False)
        assert rollout.actor_rollout_ref.rollout.name == name
        assert rollout.actor_rollout_ref.rollout.n == 5


@pytest.mark.parametrize(
    "path", ["pkg://verl.trainer.config", "pkg://verl.trainer/config", "{folder}", "file://{folder}"]
)
def test_verls_folder_is_known_however_hydra_writes_it(path: str) -> None:
    folder = verl_folder() / "trainer" / "config"
    assert plugin_module()._verl_config_folder(path.format(folder=folder)) == folder


@pytest.mark.parametrize(
    "path", ["pkg://", "pkg://no_such_package.config", "pkg://__main__", "s3://bucket", "/no/such"]
)
def test_what_is_not_verls_folder_is_left_alone(path: str) -> None:
    assert plugin_module()._verl_config_folder(path) is None


def test_our_entries_are_added_once() -> None:
    search_path = create_automatic_config_search_path(str(verl_folder() / "trainer" / "main_ppo.py"), None, "config")
    before = str(search_path)
    plugin_module().VerlAscendRolloutSearchPath().manipulate_search_path(search_path)
    assert str(search_path) == before
    assert before.count("provider=verl-ascend-rollout") == 2
