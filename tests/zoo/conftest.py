"""One model at a time, for all tests of its family and dtype."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from checkpoint_pair import Pair, make_pair
from families import BY_NAME
from specimen import Specimen


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "specimens(families, dtypes): the models that a test is for")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Let a test say by `@pytest.mark.specimens(families, dtypes)` which models it is for."""
    marker = metafunc.definition.get_closest_marker("specimens")
    if marker is not None:
        families, dtypes = marker.args
        cells = [(family, dtype) for family in families for dtype in dtypes if dtype in BY_NAME[family].dtypes]
        metafunc.parametrize("specimen", cells, ids=["-".join(cell) for cell in cells], indirect=True, scope="session")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """The checkpoints of a family; made once, for all dtypes."""
    made: dict[str, Pair] = {}

    def pair(family: str) -> Pair:
        if family not in made:
            made[family] = make_pair(BY_NAME[family], tmp_path_factory.mktemp(family))
        return made[family]

    return pair


@pytest.fixture(scope="session")
def specimen(request: pytest.FixtureRequest, pairs: Callable[[str], Pair]) -> Iterator[Specimen]:
    """The model of a family and dtype; the one before it is let go."""
    family, dtype = request.param
    threads = torch.get_num_threads()
    # Layers of a few rows: several threads wait for each other, twenty times as long on a machine that is in use.
    torch.set_num_threads(1)
    yield Specimen.of(pairs(family), dtype)
    torch.set_num_threads(threads)
    gc.collect()
