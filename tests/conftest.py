"""What several suites share: the environment of a machine without an accelerator, and the toy recipe."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fresh_process import FreshProcesses

ROOT = Path(__file__).resolve().parent.parent

if importlib.util.find_spec("hypothesis") is not None:  # not in the emulator's environment
    import hypothesis

    # How long an example takes says how busy the machine is, and what the first of them had to import.
    hypothesis.settings.register_profile("busy", deadline=None)
    hypothesis.settings.load_profile("busy")

# Before anything imports verl: the suites run on a machine without an accelerator.
os.environ.setdefault("VERL_PLATFORM", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@pytest.fixture(autouse=True)
def _caplog_hears_everything(caplog: pytest.LogCaptureFixture) -> None:
    """Importing vLLM's server raises each root handler to ERROR, and pytest's handler lives as long as its process."""
    caplog.handler.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def load_recipe() -> Callable[[str], ModuleType]:
    """Loads a module of the toy recipe by name; the recipe is a folder of scripts and no package."""
    return _load_recipe


@pytest.fixture(scope="session")
def verl_wheel(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The unpacked wheel of a verl release, for the front of `sys.path`; skips where no index has it."""
    from verl_ascend_rollout.tools.doctor import wheels

    @functools.cache
    def unpacked(version: str) -> str:
        try:
            opened = wheels.get({"verl": version}, wheels.cache_folder(), say=False)
        except wheels.WheelError as error:
            pytest.skip(f"verl {version} cannot be had to test with: {error}")
        opened.close()
        folder = tmp_path_factory.mktemp(f"verl-{version}")
        with zipfile.ZipFile(opened.wheels[0].path) as archive:
            archive.extractall(folder)
        return str(folder)

    return unpacked


def _load_recipe(name: str) -> ModuleType:
    path = ROOT / "recipes" / "grpo_tiny_cpu" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fresh_process() -> Iterator[FreshProcesses]:
    """Call a function in a process of its own, without the ten seconds that `import verl` takes: see the class."""
    processes = FreshProcesses()
    yield processes
    processes.close()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--strict-skips",
        action="store_true",
        help="fail when a test was skipped for another reason than an accelerator or a shell that is not there, or a "
        "part that this stack of the NPU emulator does not have",
    )


# With several workers (pytest-xdist, `-n`) a file's tests stay together, and so do those that share what takes seconds
# to start: the engine of tests/engine, and what TOGETHER says.  What takes longest begins.

TOGETHER = {
    "the server of fresh processes": ("test_cpu_platform", "test_plugin"),
    "the processes that send and receive": ("test_transport", "test_transport_faults"),
    "matplotlib": ("test_bench", "test_bench_kv", "test_compare", "test_timeline"),
    "vLLM and transformers": (
        *("test_expert_parts", "test_tied", "test_toy_checkpoint"),
        *("test_weight_account", "test_weight_layouts", "test_weight_replay"),
    ),
}
"""What files of tests/unit and tests/process share."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        # Not `--dist loadgroup`, which does nothing with pytest 9.2 (xdist 3.8 renames tests in a way of its own).
        def _split_scope(self, nodeid: str) -> str:
            file = str(super()._split_scope(nodeid))
            if file.startswith("tests/engine/"):
                return "tests/engine/"
            if file == "tests/process/test_doctor.py":
                # A process for each test, and nothing shared: more than half of what one worker has to do.
                return f"{file} {zlib.crc32(nodeid.encode()) % 4}"
            return next((shared for shared, stems in TOGETHER.items() if Path(file).stem in stems), file)

    return Scheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in ("engine", "e2e")])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print each skip with its reason."""
    for report in terminalreporter.stats.get("skipped", []):
        terminalreporter.write_line(f"skipped: {report.nodeid}: {_reason(report)}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A test that could run here and was skipped fails the run."""
    if not session.config.getoption("--strict-skips"):
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter is not None else []
    allowed = "accelerator|this stack|only root|zsh is not installed"
    if any(not re.search(allowed, _reason(report)) for report in skipped):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _reason(report: pytest.TestReport) -> str:
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
