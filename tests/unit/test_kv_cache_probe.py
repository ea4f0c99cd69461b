"""How a worker gives the KV cache back, by what it has: attributes alone, no engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from verl_ascend_rollout.platforms.detect import planned
from verl_ascend_rollout.policy.engine_args import decide
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
    ("asked", "engine", "method", "obstacle"),
    [
        ("auto", {"sleep_mode": True}, "sleep", "no `discard` (vllm#44890"),
        ("auto", {"sleep_mode": True, "eager": False}, "sleep", "no `discard`"),
        ("auto", {}, "reallocate", "without sleep mode"),
        (["kv_only", "sleep", "keep"], {"sleep_mode": True}, "sleep", "vllm#44890"),
        (["kv_only", "reallocate", "keep"], {}, "reallocate", "vllm#44890"),
        ("sleep", {"sleep_mode": True}, "sleep", None),
        (["sleep", "keep"], {}, "keep", "without sleep mode"),
        ("reallocate", {"sleep_mode": True}, "reallocate", None),
        (["reallocate", "keep"], {"eager": False}, "keep", "does not run in eager mode"),
        ("reallocate", {"connector": object()}, "keep", "KV connector"),
        ("auto", {"kv_caches": True}, "keep", "no `kv_caches`"),
        ("keep", {"sleep_mode": True}, "keep", None),
        (["keep"], {}, "keep", None),
    ],
)
def test_the_first_method_of_the_list_that_works(
    asked: str | list[str], engine: dict[str, Any], method: str, obstacle: str | None
) -> None:
    found = kv_cache.probe(worker(**engine), asked)
    assert found.method == method
    if obstacle is None:
        assert found.obstacles == ()
    else:
        assert any(obstacle in sentence for sentence in found.obstacles)
    # What was walked past is said once each.
    assert len(set(found.obstacles)) == len(found.obstacles)


@pytest.mark.parametrize(
    ("backend", "device", "sleep_mode", "method", "obstacle"),
    [
        (CuMemBackend(), "cuda", True, "kv_only", None),
        (CheckpointBackend(), "cuda", True, "sleep", "CheckpointBackend cannot discard one tag"),
        (CuMemBackend(), "cuda", False, "reallocate", "without sleep mode, whose allocator"),
        (CuMemBackend(), "cpu", True, "sleep", "vLLM's CPU worker refuses it"),
    ],
)
def test_a_kv_only_release_where_vllm_has_one(
    backend: Any, device: str, sleep_mode: bool, method: str, obstacle: str | None
) -> None:
    it = worker(sleep_mode=sleep_mode)
    it.discard, it.sleep_mode_backend, it.device = lambda tags: None, backend, torch.device(device)
    found = kv_cache.probe(it, "auto")
    assert found.method == method
    assert obstacle is None or any(obstacle in sentence for sentence in found.obstacles)


@pytest.mark.parametrize(("version", "method"), [("0.30.0", "sleep"), ("0.31.0", "kv_only"), (None, "kv_only")])
def test_auto_reaches_the_kv_only_release_by_what_the_policy_proposes(version: str | None, method: str) -> None:
    it = worker(sleep_mode=True)
    it.discard, it.sleep_mode_backend, it.device = lambda tags: None, CuMemBackend(), torch.device("cuda")
    proposed = decide(planned("cuda", versions={"vllm": version} if version else {}))["kv_release"].value
    assert kv_cache.probe(it, proposed).method == method


def test_a_method_that_does_not_exist_is_no_method_that_works() -> None:
    with pytest.raises(KeyError, match="direct"):
        kv_cache.probe(worker(), ["direct", "keep"])


def test_the_kv_only_release_discards_and_wakes_one_tag() -> None:
    calls: list[Any] = []
    it = worker(sleep_mode=True)
    it.model_runner.kv_caches = [torch.zeros(64)]
    it.discard = lambda tags: calls.append(("discard", tags))
    it.wake_up = lambda tags: calls.append(("wake_up", tags))
    freed = kv_cache.free(it, "kv_only")
    assert freed.changed and (freed.bytes_before, freed.bytes_after) == (256, 0)
    assert not kv_cache.free(it, "kv_only").changed
    made = kv_cache.init(it, "kv_only")
    assert made.changed and made.bytes_after == 256
    assert calls == [("discard", ("kv_cache",)), ("wake_up", ["kv_cache"])]


def test_a_kv_cache_that_sleeps_is_known_to_also_where_the_weights_do_not_wake_up() -> None:
    it = worker(sleep_mode=True)
    it.model_runner.kv_caches = [torch.zeros(64)]
    it.sleep = lambda level: None
    woken: list[list[str]] = []

    def no_memory(tags: list[str]) -> None:
        raise RuntimeError("out of memory")

    it.wake_up = no_memory
    with pytest.raises(RuntimeError, match="out of memory"):
        kv_cache.free(it, "sleep")
    assert kv_cache.kv_bytes(it) == 0
    it.wake_up = lambda tags: woken.append(tags)
    assert kv_cache.init(it, "sleep").changed and woken == [["kv_cache"]]


def test_every_thing_that_stands_in_the_way_is_said() -> None:
    found = kv_cache.probe(worker(eager=False, connector=object(), kv_caches=True))
    assert len(found.obstacles) == 5


def test_a_device_that_the_model_runner_alone_knows() -> None:
    """vllm-ascend 0.11: a worker without one was taken for a CPU's, and what a sleep gave back was never counted."""
    there = SimpleNamespace(device=torch.device("meta"))
    assert kv_cache.device_of(SimpleNamespace(device=None, model_runner=there)).type == "meta"
    assert kv_cache.device_of(SimpleNamespace(model_runner=there)).type == "meta"
    assert kv_cache.device_of(SimpleNamespace(device=torch.device("cpu"), model_runner=there)).type == "cpu"
    assert kv_cache.device_of(SimpleNamespace(model_runner=None)).type == "cpu"
