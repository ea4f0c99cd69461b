"""Our own options as users give them: from a command line, a YAML file, or Python."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from verl_ascend_rollout import options
from verl_ascend_rollout.options import KEY, AscendSafeOptions, OptionError


def test_nothing_given_is_the_defaults() -> None:
    defaults = AscendSafeOptions()
    assert AscendSafeOptions.from_mapping(None) == AscendSafeOptions.from_mapping({}) == defaults
    assert defaults.as_dict() == {
        "on_unsafe": "keep",
        "kv_release": "auto",
        "weight_path": "auto",
        "verify": "first",
        "parity": "warn",
        "sync_timeout": 600.0,
        "on_engine_death": "stop",
        "max_engine_restarts": 3,
        "events": None,
    }


def test_null_is_the_default_and_leaves_the_others() -> None:
    given = AscendSafeOptions.from_mapping(
        {"on_unsafe": None, "kv_release": "reallocate", "verify": None, "events": "events.jsonl"}
    )
    assert given == AscendSafeOptions(kv_release="reallocate", events="events.jsonl")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("on_unsafe", value) for value in ("keep", "error")),
        *(("kv_release", value) for value in ("auto", "kv_only", "sleep", "reallocate", "keep")),
        *(("parity", value) for value in ("warn", "error", "off")),
        *(("weight_path", value) for value in ("auto", "by_layout", "layerwise", "verl")),
        *(("verify", value) for value in ("first", "always", "off")),
    ],
)
def test_every_value_that_is_documented_is_taken(name: str, value: str) -> None:
    assert AscendSafeOptions.from_mapping({name: value}).as_dict()[name] == value


@pytest.mark.parametrize("name", ["kv_release", "kv_rung"])
@pytest.mark.parametrize(
    ("old", "new"), [("release_kv_cache", "kv_only"), ("direct", "reallocate"), ("sleep", "sleep"), ("auto", "auto")]
)
def test_old_names_and_values_are_taken_and_each_is_said_once(
    name: str, old: str, new: str, caplog: pytest.LogCaptureFixture
) -> None:
    options._say_once.cache_clear()
    for _ in range(3):
        assert AscendSafeOptions.from_mapping({name: old}) == AscendSafeOptions(kv_release=new)  # type: ignore[arg-type]
    said = [record.getMessage() for record in caplog.records]
    expected = [f"{KEY}: the option kv_rung is called kv_release now; the old name will go"] * (name == "kv_rung")
    expected += [f"{KEY}.kv_release: the value {old} is called {new} now; the old word will go"] * (old != new)
    assert said == expected


def test_an_old_name_that_is_null_is_not_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    options._say_once.cache_clear()
    assert AscendSafeOptions.from_mapping({"kv_release": "sleep", "kv_rung": None}).kv_release == "sleep"
    assert not caplog.records


@pytest.mark.parametrize("given", [("kv_release", "kv_rung"), ("kv_rung", "kv_release")])
def test_both_names_must_agree(given: tuple[str, str]) -> None:
    same = AscendSafeOptions.from_mapping(dict(zip(given, ("reallocate", "direct"), strict=True)))
    assert same.kv_release == "reallocate"
    with pytest.raises(OptionError, match="kv_release is set twice, to 'keep' and to 'sleep'"):
        AscendSafeOptions.from_mapping(dict(zip(given, ("keep", "sleep"), strict=True)))


def test_seconds_are_a_number() -> None:
    assert AscendSafeOptions.from_mapping({"sync_timeout": 30}).sync_timeout == 30.0
    assert AscendSafeOptions.from_mapping({"sync_timeout": 0.5}).sync_timeout == 0.5


def test_a_bare_off_in_yaml_is_the_word() -> None:
    given = yaml.safe_load("verify: off")
    assert given == {"verify": False}, "YAML 1.1 no longer reads `off` as False: the exception for it can go"
    assert AscendSafeOptions.from_mapping(given).verify == "off"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"verify": True}, "verify=True is not possible: choose one of first, always, off"),
        ({"verify": "on"}, "verify='on' is not possible: choose one of first, always, off"),
        ({"verify": "First"}, "verify='First' is not possible"),
        ({"verify": ["first"]}, "verify=['first'] is not possible"),
        # False stands for "off" only where "off" is a choice.
        ({"kv_release": False}, "kv_release=False is not possible: choose one of auto, kv_only, sleep, reallocate"),
        ({"on_unsafe": 1}, "on_unsafe=1 is not possible: choose one of keep, error"),
        *(
            ({"sync_timeout": bad}, f"sync_timeout={bad!r} is not possible: it takes a number of seconds above 0")
            for bad in (0, -1.5, "600", True, float("inf"), float("nan"))
        ),
        *(
            (
                {"max_engine_restarts": bad},
                f"max_engine_restarts={bad!r} is not possible: it takes a whole number above 0",
            )
            for bad in (0, -1, 2.5, "3", True)
        ),
        ({"on_engine_death": "reboot"}, "on_engine_death='reboot' is not possible: choose one of stop, restart"),
        ({"events": 7}, "events=7 is not possible: it takes a file path"),
        ({"events": False}, "events=False is not possible: it takes a file path"),
    ],
)
def test_a_bad_value_is_one_sentence_with_the_choices(given: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError) as error:
        AscendSafeOptions.from_mapping(given)
    message = str(error.value)
    assert message.startswith(f"{KEY}: ")
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("verfy", "verify"),
        ("kv-release", "kv_release"),
        ("kv_rang", "kv_release"),
        ("on_unsave", "on_unsafe"),
        ("event", "events"),
    ],
)
def test_an_unknown_key_names_the_options_and_the_one_that_was_meant(key: str, meant: str) -> None:
    with pytest.raises(OptionError) as error:
        AscendSafeOptions.from_mapping({key: "x"})
    assert str(error.value) == (
        f"{KEY}: unknown option {key!r} (did you mean {meant!r}?): the options are events, kv_release, "
        "max_engine_restarts, on_engine_death, on_unsafe, parity, sync_timeout, verify, weight_path"
    )


@pytest.mark.parametrize("key", ["gpu_memory_utilization", 3])
def test_an_unknown_key_that_resembles_none_is_not_guessed_at(key: object) -> None:
    with pytest.raises(OptionError, match=r"unknown option .*: the options are") as error:
        AscendSafeOptions.from_mapping({key: None})  # type: ignore[dict-item]
    assert "did you mean" not in str(error.value)


def test_all_problems_are_said_at_once() -> None:
    with pytest.raises(OptionError) as error:
        AscendSafeOptions.from_mapping({"verfy": "off", "kv_release": "fast", "events": 3, "on_unsafe": "error"})
    message = str(error.value)
    for part in ("unknown option 'verfy'", "kv_release='fast'", "events=3"):
        assert part in message
    assert message.count(KEY) == 1
    assert "on_unsafe=" not in message


@pytest.mark.parametrize("given", ["verify=off", ["verify"], 3])
def test_what_is_no_mapping_is_refused(given: Any) -> None:
    with pytest.raises(OptionError, match="must be a mapping of options, got"):
        AscendSafeOptions.from_mapping(given)


class LikeVerls(SimpleNamespace):
    """verl's RolloutConfig as far as it matters: attributes, and `get` from its BaseConfig."""

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key, default)


KWARGS = {"vllm": {"enable_log_requests": True}, "ascend_safe": {"verify": "always", "kv_release": None}}


@pytest.mark.parametrize(
    "rollout",
    [
        {"engine_kwargs": KWARGS},
        OmegaConf.create({"engine_kwargs": KWARGS}),
        LikeVerls(engine_kwargs=KWARGS),
        LikeVerls(engine_kwargs=OmegaConf.create(KWARGS)),
    ],
    ids=["mapping", "OmegaConf", "verl", "verl with OmegaConf inside"],
)
def test_from_a_rollout_config(rollout: Any) -> None:
    assert AscendSafeOptions.from_rollout(rollout) == AscendSafeOptions(verify="always")


@pytest.mark.parametrize(
    "rollout",
    [
        {},
        {"engine_kwargs": None},
        {"engine_kwargs": {"vllm": {}}},
        OmegaConf.create({"engine_kwargs": {"ascend_safe": None}}),
        LikeVerls(engine_kwargs={}),
    ],
)
def test_a_rollout_config_without_our_key_has_the_defaults(rollout: Any) -> None:
    assert AscendSafeOptions.from_rollout(rollout) == AscendSafeOptions()


def test_a_rollout_config_with_a_mistake_is_refused() -> None:
    with pytest.raises(OptionError, match="verfy"):
        AscendSafeOptions.from_rollout(OmegaConf.create({"engine_kwargs": {"ascend_safe": {"verfy": "off"}}}))
