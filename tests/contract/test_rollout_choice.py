"""`rollout=ascend_safe` takes effect: in each form, on each primary config, and with all that verl's own scripts say.

On the installed verl, and on each other release whose wheel is at hand (`ascend-safe doctor --for verl==...` gets it).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ascend_scripts
import pytest
import verl_configs
from ascend_scripts import LONG, NAME, SCRIPTS, overrides
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf, open_dict
from verl_configs import MAIN_PPO, Verl, compose, compose_whole, settings

from verl_ascend_rollout.integration import composition, rollout_choice
from verl_ascend_rollout.options import OLD_OPTIONS, AscendSafeOptions

FORMS = ["rollout", "+rollout", LONG]
INSTALLED = verl_configs.installed()
PPO = (INSTALLED, MAIN_PPO, "ppo_trainer")


@pytest.fixture(autouse=True)
def a_driver_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    rollout_choice.say.cache_clear()


def jobs() -> list[Any]:
    """Each release with each primary config, and with each engine that is no primary config of its own."""
    found = []
    for verl in verl_configs.releases():
        engines = [] if verl.version.startswith("0.7") else ["megatron", "veomni", "torchtitan"]
        primaries = [*verl.primaries(), *((MAIN_PPO, "ppo_trainer", f"model_engine={engine}") for engine in engines)]
        found += [pytest.param((verl, *job), id="-".join([verl.version, *job[1:]])) for job in primaries]
    return found


def changed(stock: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What differs between two jobs, without the prefix of the rollout's settings."""
    missing = object()
    names = {name for name in stock.keys() | other.keys() if stock.get(name, missing) != other.get(name, missing)}
    return {name.removeprefix("actor_rollout_ref.rollout."): other.get(name) for name in names}


OURS = {
    "name": "ascend_safe",
    "enforce_eager": None,
    **{f"engine_kwargs.ascend_safe.{option}": None for option in (*AscendSafeOptions().as_dict(), *OLD_OPTIONS)},
}


@pytest.mark.parametrize("job", jobs())
def test_every_form_changes_the_name_and_our_options_and_nothing_else(job: tuple[Verl, str, str]) -> None:
    stock = compose(*job)
    assert len(stock) > 300
    for form in FORMS:
        assert changed(stock, compose(*job, f"{form}=ascend_safe")) == OURS, form
    # The other side of an A/B, in one form: the others are translated alike.
    assert changed(stock, compose(*job, "rollout=vllm")) == {"name": "vllm"}


def test_every_kind_of_primary_config_was_tried() -> None:
    names = {job.values[0][2] for job in jobs()}
    kinds = ("ppo_trainer", "ppo_megatron_trainer", "fully_async_ppo_trainer", "one_step_off_ppo_trainer")
    assert {*kinds, "_generated_ppo_veomni_trainer", "_generated_ppo_torchtitan_trainer"} <= names


# verl's own scripts


@pytest.mark.parametrize("script", SCRIPTS, ids=[script["script"] for script in SCRIPTS])
def test_a_script_of_verls_runs_on_ascend_safe_or_stops(script: dict[str, Any]) -> None:
    """What the script sets stays as it is: the option is merged below it."""
    given: list[str] = script["overrides"]
    named = next(override.partition("=")[2] for override in given if override.startswith(f"{NAME}="))
    ends = {form: ascend_scripts.driver(INSTALLED, script, overrides(script, form)) for form in ascend_scripts.FORMS}
    if named != "vllm":
        for form in ("appended", "long form"):
            assert (ends[form].config, ends[form].status) == (None, 2)
            (sentence,) = ends[form].said.splitlines()
            assert sentence.startswith(f"ascend_safe: rollout=ascend_safe and {NAME}={named} contradict each other")
        return
    script_itself = ascend_scripts.driver(INSTALLED, script, given).config
    assert script_itself is not None
    sets_eager = any("rollout.enforce_eager=" in override for override in given)
    expected = {name: value for name, value in OURS.items() if name != "enforce_eager" or not sets_eager}
    for form, end in ends.items():
        assert end.config is not None
        assert changed(settings(script_itself), settings(end.config)) == expected, form
        replaces = f"ascend_safe: rollout=ascend_safe replaces {NAME}=vllm: "
        assert end.said.startswith(replaces) == (form != "in its place")
        assert end.said.count("\n") == (form != "in its place")


def test_the_decisions_for_verls_scripts_are_the_reviewed_ones() -> None:
    """ascend_scripts.py, run as a script, writes the file again; then see what has changed, and why."""
    assert ascend_scripts.FILE.read_text(encoding="utf-8") == ascend_scripts.table(INSTALLED)


# The name and the choice


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(("chosen", "named"), [("ascend_safe", "vllm"), ("vllm", "ascend_safe")])
def test_the_choice_wins_over_the_name_of_the_other(
    chosen: str, named: str, order: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose(*PPO, *[f"rollout={chosen}", f"{NAME}={named}"][::order])
    assert config[NAME] == chosen
    assert capsys.readouterr().err == (
        f"ascend_safe: rollout={chosen} replaces {NAME}={named}: the rollout of this job is {chosen} (rollout={named} "
        "chooses the other)\n"
    )


@pytest.mark.parametrize("job", [PPO, (INSTALLED, MAIN_PPO, "_generated_ppo_trainer")], ids=lambda job: job[2])
@pytest.mark.parametrize("engine", ["sglang", "trtllm", "hf"])
def test_another_engine_is_refused(job: tuple[Verl, str, str], engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        compose_whole(*job, "rollout=ascend_safe", f"{NAME}={engine}")
    assert stop.value.code == 2
    assert f"take out rollout=ascend_safe to run on {engine}" in capsys.readouterr().err
    assert compose(*job, f"{NAME}={engine}")[NAME] == engine


def test_without_a_choice_the_name_is_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("ascend_safe", "vllm", "sglang"):
        assert changed(compose(*PPO), compose(*PPO, f"{NAME}={name}")) == {"name": name}
    assert compose(*PPO, "+rollout_of_mine=ascend_safe", f"{NAME}=vllm")[NAME] == "vllm"
    assert capsys.readouterr().err == ""


def test_the_last_choice_wins() -> None:
    assert compose(*PPO, "rollout=ascend_safe", f"{LONG}=vllm")[NAME] == "vllm"
    assert compose(*PPO, f"+{LONG}=vllm", "++rollout=vllm", "rollout=ascend_safe")[NAME] == "ascend_safe"


def test_a_name_that_only_the_job_can_resolve_is_left_to_it() -> None:
    assert compose(*PPO, "rollout=ascend_safe", f"{NAME}=${{oc.env:NO_SUCH_NAME}}")[NAME] == "${oc.env:NO_SUCH_NAME}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout=nonsense", "Could not find 'rollout/nonsense'"),
        ("+rollout=nonsense", "Could not find 'rollout/nonsense'"),
        ("rollout={name:vllm}", "Could not override 'rollout'"),
    ],
)
def test_what_is_no_choice_is_hydras_to_refuse(override: str, message: str) -> None:
    with pytest.raises(ConfigCompositionException, match=message):
        compose_whole(*PPO, override)


def test_a_job_that_trains_nothing_has_no_rollout() -> None:
    with pytest.raises(ConfigCompositionException, match="Could not override 'rollout'"):
        compose_whole(INSTALLED, MAIN_PPO, "sft_trainer_engine", "rollout=ascend_safe")


# Primary configs of the user's own


def in_a_folder(folder: Path, name: str, text: str, *overrides: str) -> dict[str, Any]:
    """Compose the user's own primary config, in a folder of theirs, with verl's configs on its search path."""
    (folder / "config").mkdir(exist_ok=True)
    header = f"hydra:\n  searchpath: ['file://{INSTALLED.folder}/trainer/config']\n"
    (folder / "config" / f"{name}.yaml").write_text(header + text, encoding="utf-8")
    return compose(INSTALLED, str(folder / "recipe.py"), name, *overrides)


@pytest.mark.parametrize("form", FORMS)
def test_the_users_own_primary_config_keeps_what_it_sets(form: str, tmp_path: Path) -> None:
    settings = (
        "defaults: [ppo_trainer, _self_]\nrollout: {nodes: 2}\n"
        "actor_rollout_ref: {rollout: {name: vllm, enforce_eager: true, free_cache_engine: false, n: 5}}\n"
    )
    stock = in_a_folder(tmp_path, "mine", settings)
    ours = in_a_folder(tmp_path, "mine", settings, f"{form}=ascend_safe")
    assert changed(stock, ours) == {name: value for name, value in OURS.items() if name != "enforce_eager"}
    assert ours["rollout.nodes"] == 2


def test_a_group_of_the_users_own_named_rollout_stays_theirs(tmp_path: Path) -> None:
    (tmp_path / "config" / "rollout").mkdir(parents=True)
    (tmp_path / "config" / "rollout" / "slow.yaml").write_text("# @package slow\nspeed: 1\n", encoding="utf-8")
    text = "defaults: [ppo_trainer, rollout: slow, _self_]\n"
    assert in_a_folder(tmp_path, "mine", text, "rollout=slow")["slow.speed"] == 1
    assert in_a_folder(tmp_path, "mine", text, f"{LONG}=ascend_safe")[NAME] == "ascend_safe"


def test_a_saved_job_keeps_its_options_and_changes_sides(tmp_path: Path) -> None:
    """`.hydra/config.yaml` as a primary config: flat, and as the job ran."""
    events = "actor_rollout_ref.rollout.engine_kwargs.ascend_safe.events"
    job = compose_whole(*PPO, "rollout=ascend_safe", f"{events}=here.jsonl", "trainer.nnodes=2")
    with open_dict(job):
        del job["hydra"]
    (tmp_path / "config").mkdir()
    OmegaConf.save(job, tmp_path / "config" / "saved.yaml")
    saved = (INSTALLED, str(tmp_path / "main.py"), "saved")
    assert changed(compose(*saved), compose(*saved, "rollout=ascend_safe")) == {}
    assert compose(*saved, "+rollout=ascend_safe", f"{events}=there.jsonl")[events] == "there.jsonl"
    other = compose(*saved, "rollout=vllm")
    assert changed(compose(*PPO, "rollout=vllm", "trainer.nnodes=2"), other) == {"engine_kwargs.ascend_safe": None}


# Elsewhere


def test_the_choice_is_written_down() -> None:
    """In hydra's own record of the job, and with the check that runs before it."""
    for name in ("ppo_trainer", "_generated_ppo_trainer"):
        hydra = compose_whole(INSTALLED, MAIN_PPO, name, "+rollout=ascend_safe").hydra
        assert hydra.runtime.choices[LONG] == "ascend_safe"
        assert hydra.callbacks.ascend_safe["_target_"] == composition.DRIVER_CHECK
    assert "ascend_safe" in compose_whole(*PPO, f"{NAME}=ascend_safe").hydra.callbacks
    assert compose_whole(*PPO, "rollout=vllm").hydra.callbacks == {}
