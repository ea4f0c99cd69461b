"""Where the tests of this folder can run: on a GPU, or, as far as a CPU goes, in the kit's rehearsal."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from verl_ascend_rollout.platforms import cuda
from verl_ascend_rollout.platforms.base import ROOT, installed_versions

HERE = Path(__file__).resolve().parent
REHEARSAL = os.environ.get("GPU_KIT_REHEARSAL") == "1"
ON_GPU = cuda.find(ROOT, os.environ, installed_versions()) is not None

if ON_GPU:
    # tests/conftest.py says cpu, for the other suites.
    os.environ["VERL_PLATFORM"] = "cuda"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if ON_GPU or REHEARSAL:
        return
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.skip(reason="requires one NVIDIA GPU (no accelerator is here)"))


@pytest.fixture(scope="session")
def on_gpu() -> bool:
    return ON_GPU


@pytest.fixture(scope="session")
def kit_environment() -> dict[str, str]:
    """For a process that imports what lies in this folder, as vLLM's worker does."""
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


sys.path.insert(0, str(HERE))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--weight-path", help="run the tests of weight paths with this one only")
