"""Each weight path on a real engine: ten syncs, byte for byte against fresh loads, and streams that are no model.

The engine sleeps before each sync and has captured graphs, so a weight that moved, or that a sleep lost, shows.  verl's
own sequence has no manifest: that it takes streams that are no model is noted, not judged.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from verl_ascend_rollout.options import WeightPath

pytestmark = pytest.mark.engine

HERE = Path(__file__).resolve().parent
PATHS = [path for path in get_args(WeightPath) if path != "auto"]
SECONDS = 500


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, kit_environment: dict[str, str], on_gpu: bool
) -> Callable[[str], dict[str, Any]]:
    """What weight_paths.py found on a path, each asked once, in a process of its own."""
    known: dict[str, dict[str, Any]] = {}

    def ask(path: str) -> dict[str, Any]:
        if path == "verl" and not on_gpu:
            pytest.skip("verl's sequence cannot load weights that vLLM's CPU kernels packed: needs an accelerator")
        if path not in known:
            folder = tmp_path_factory.mktemp(path)
            command = [sys.executable, str(HERE / "weight_paths.py"), path, str(folder)]
            done = subprocess.run(
                command, env=kit_environment, capture_output=True, text=True, timeout=SECONDS, check=False
            )
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
            known[path] = json.loads((folder / "found.json").read_text())
        return known[path]

    return ask


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "path" in metafunc.fixturenames:
        one = metafunc.config.getoption("--weight-path", None)
        metafunc.parametrize("path", [one] if one else PATHS)


def test_ten_syncs_are_byte_for_byte_a_fresh_load_at_the_same_addresses(path: str, found: Any) -> None:
    facts = found(path)
    assert facts["engine"]["weight_path"] == path
    assert facts["checkpoints_differ"], "two checkpoints that answer alike would prove nothing"
    assert len(facts["syncs"]) == 10
    wrong = [sync for sync in facts["syncs"] if sync.get("error") or sync["different"] or sync["moved"]]
    assert wrong == []


def test_the_answers_after_each_sync_are_a_fresh_engines(path: str, found: Any) -> None:
    facts = found(path)
    assert facts["two_calls_alike"], "an engine that does not answer alike twice cannot be compared"
    assert [sync["same_answers"] for sync in facts["syncs"]] == [True] * 10


def test_each_sleep_gives_back_the_kv_cache_and_the_weights(path: str, found: Any, on_gpu: bool) -> None:
    facts = found(path)
    expected = facts["engine"]["kv_bytes"] + (facts["engine"]["weight_bytes"] if on_gpu else 0)
    assert expected > 0
    assert min(sync["freed"] for sync in facts["syncs"]) >= expected


def test_streams_that_are_no_model_are_refused_by_name_and_a_whole_one_mends_the_engine(path: str, found: Any) -> None:
    facts = found(path)
    if path != "verl":
        assert {case: refusal for case, refusal in facts["malformed"].items() if not refusal["named"]} == {}
    # That verl's sequence takes such a stream without a word is why there are others.
    assert facts["afterwards"].get("error") is None
    assert facts["afterwards"]["different"] == []
    assert facts["afterwards"]["same_answers"]
