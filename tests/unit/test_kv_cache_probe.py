"""Which rung of the KV-cache ladder a worker gets, by what it has: attributes alone, no engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

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


@pytest.mark.parametrize(
    ("wish", "engine", "rung", "obstacle"),
    [
        ("auto", {"sleep_mode": True}, "sleep", None),
        ("auto", {"sleep_mode": True, "eager": False}, "sleep", None),
        ("auto", {}, "direct", "without sleep mode"),
        ("release_kv_cache", {"sleep_mode": True}, "sleep", "vllm#44890"),
        ("release_kv_cache", {}, "direct", "vllm#44890"),
        ("sleep", {}, "direct", "without sleep mode"),
        ("direct", {"sleep_mode": True}, "direct", None),
        ("direct", {"eager": False}, "keep", "does not run in eager mode"),
        ("direct", {"connector": object()}, "keep", "KV connector"),
        ("auto", {"kv_caches": True}, "keep", "no `kv_caches`"),
        ("auto", {"initialize_kv_cache_tensors": True}, "keep", "no `initialize_kv_cache_tensors`"),
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


def test_every_thing_that_stands_in_the_way_is_said() -> None:
    found = kv_cache.probe(worker(eager=False, connector=object(), kv_caches=True))
    assert len(found.obstacles) == 4
