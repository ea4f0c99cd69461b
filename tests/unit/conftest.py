"""The fixture for tests that need a process in which verl has not been imported yet."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fresh_process import FreshProcesses


@pytest.fixture(scope="session")
def fresh_process() -> Iterator[FreshProcesses]:
    """Call a function in a process of its own, without the ten seconds that `import verl` takes: see the class."""
    processes = FreshProcesses()
    yield processes
    processes.close()
