"""One engine for all tests that need one, its checkpoints, and the table of what was measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# tests/conftest.py says cpu, for the other suites.
os.environ["VERL_PLATFORM"] = "npu"
# A device of its own for each test process: another one's engine takes memory of a shared device between two looks at
# it, and the stock sleep() asserts that nothing did.
os.environ["FAKE_CANN_RUN"] = f"tests_npu_{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}"

from toy_engine import EXTENSION, Checkpoint, Engine, make_checkpoint, make_llm

MEASURED = "measured: "
"""How a test's properties begin that belong into the table."""


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Checkpoint]:
    """Four checkpoints of one shape; the first is the one that the engine is started with."""
    return [make_checkpoint(tmp_path_factory.mktemp(f"checkpoint{seed}") / "model", seed) for seed in range(4)]


@pytest.fixture(scope="session")
def engine(checkpoints: list[Checkpoint]) -> Iterator[Engine]:
    """The engine as the rollout configures it: sleep mode on, eager, weights loaded in place."""
    found = Engine(make_llm(checkpoints[0].path, worker_extension_cls=EXTENSION))
    found.call("ascend_safe_configure", kv_release="auto", weight_path="by_layout", verify="always")
    yield found


@pytest.fixture
def synced(engine: Engine) -> Callable[[Checkpoint], dict[str, Any]]:
    """Load a checkpoint into the running engine, in buckets, as the rollout's weight sync does."""

    def sync(checkpoint: Checkpoint) -> dict[str, Any]:
        summary: dict[str, Any] = engine.call("ascend_safe_reload_from_disk", str(checkpoint.path))
        return summary

    return sync


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Callable[[str, object], None]:
    """Note a figure for the table at the end of the run."""

    def note(what: str, figure: object) -> None:
        # With the test's report: it may run in another process than the one that writes the table.
        record_property(f"{MEASURED}{what}", f"{figure:.4f}" if isinstance(figure, float) else str(figure))

    return note


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    found = [pair for report in reports if getattr(report, "when", "") == "call" for pair in report.user_properties]
    measured = [(name.removeprefix(MEASURED), figure) for name, figure in found if name.startswith(MEASURED)]
    if not measured:
        return
    from fake_npu.stack_label import label

    terminalreporter.section(label())
    terminalreporter.write_line(
        "largest |log-prob difference| from Hugging Face on a CPU (bf16), where a line says nothing else"
    )
    width = max(len(what) for what, _ in measured)
    for what, figure in measured:
        terminalreporter.write_line(f"{what.ljust(width)}  {figure}")
