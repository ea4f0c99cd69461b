"""Which rung of the KV-cache ladder a worker gets, by what it has: attributes alone, no engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from verl_ascend_rollout.worker import kv_cache


def worker(*, sleep_mode: bool = False, eager: bool = True, connector: Any = None, **missing: bool) -> SimpleNamespace:
    """The attributes of vLLM's worker that the probe asks for (vLLM 0.28)."""
    model = SimpleNamespace(enable_sleep_mode=sleep_mode, enforce_eager=eager)
    compilation = SimpleNamespace(static_forward_context={})
    config = SimpleNamespace(model_config=model, compilation_config=compilation, kv_transfer_config=connector)
    runner = SimpleNamespace(
        kv_caches=[], kv_cache_config=object(), initialize_kv_cache_tensors=lambda: None, vllm_config=config
    )
    for name in missing:
        delattr(runner, name)
    return SimpleNamespace(model_runner=runner, vllm_config=config)


class Refusing:
    """The base class of vLLM's sleep-mode back ends (vLLM 0.32): it cannot discard."""

    def discard(self, tags: tuple[str, ...]) -> None:
        raise RuntimeError("does not support selective discard")


Refusing.__name__ = "SleepModeBackend"


class CheckpointBackend(Refusing):
    pass


class CuMemBackend(Refusing):
    def discard(self, tags: tuple[str, ...]) -> None:
        pass


@pytest.mark.parametrize(
    ("wish", "engine", "rung", "obstacle"),
    [
        ("auto", {"sleep_mode": True}, "sleep", "no `discard` (vllm#44890"),
        ("auto", {"sleep_mode": True, "eager": False}, "sleep", "no `discard`"),
        ("auto", {}, "direct", "without sleep mode"),
        ("release_kv_cache", {"sleep_mode": True}, "sleep", "vllm#44890"),
        ("release_kv_cache", {}, "direct", "vllm#44890"),
        ("sleep", {"sleep_mode": True}, "sleep", None),
        ("sleep", {}, "direct", "without sleep mode"),
        ("direct", {"sleep_mode": True}, "direct", None),
        ("direct", {"eager": False}, "keep", "does not run in eager mode"),
        ("direct", {"connector": object()}, "keep", "KV connector"),
        ("auto", {"kv_caches": True}, "keep", "no `kv_caches`"),
        ("keep", {"sleep_mode": True}, "keep", None),
    ],
)
def test_the_first_rung_that_works_at_or_below_the_wish(
    wish: str, engine: dict[str, Any], rung: str, obstacle: str | None
) -> None:
    found = kv_cache.probe(worker(**engine), wish)
    assert found.rung == rung
    if obstacle is None:
        assert found.obstacles == ()
    else:
        assert any(obstacle in sentence for sentence in found.obstacles)
    # What was walked past is said once each.
    assert len(set(found.obstacles)) == len(found.obstacles)


@pytest.mark.parametrize(
    ("backend", "device", "sleep_mode", "rung", "obstacle"),
    [
        (CuMemBackend(), "cuda", True, "release_kv_cache", None),
        (CheckpointBackend(), "cuda", True, "sleep", "CheckpointBackend cannot discard one tag"),
        (CuMemBackend(), "cuda", False, "direct", "without sleep mode, whose allocator"),
        (CuMemBackend(), "cpu", True, "sleep", "vLLM's CPU worker refuses it"),
    ],
)
def test_a_kv_only_release_where_vllm_has_one(
    backend: Any, device: str, sleep_mode: bool, rung: str, obstacle: str | None
) -> None:
    it = worker(sleep_mode=sleep_mode)
    it.discard, it.sleep_mode_backend, it.device = lambda tags: None, backend, torch.device(device)
    found = kv_cache.probe(it, "auto")
    assert found.rung == rung
    assert obstacle is None or any(obstacle in sentence for sentence in found.obstacles)


def test_the_kv_only_release_discards_and_wakes_one_tag() -> None:
    calls: list[Any] = []
    it = worker(sleep_mode=True)
    it.model_runner.kv_caches = [torch.zeros(64)]
    it.discard = lambda tags: calls.append(("discard", tags))
    it.wake_up = lambda tags: calls.append(("wake_up", tags))
    freed = kv_cache.free(it, "release_kv_cache")
    assert freed.changed and (freed.bytes_before, freed.bytes_after) == (256, 0)
    assert not kv_cache.free(it, "release_kv_cache").changed
    made = kv_cache.init(it, "release_kv_cache")
    assert made.changed and made.bytes_after == 256
    assert calls == [("discard", ("kv_cache",)), ("wake_up", ["kv_cache"])]


def test_every_thing_that_stands_in_the_way_is_said() -> None:
    found = kv_cache.probe(worker(eager=False, connector=object(), kv_caches=True))
    assert len(found.obstacles) == 5
