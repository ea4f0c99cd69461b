"""The worker takes the first path of the policy's list that works for its model, and says why not those before it."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from verl_ascend_rollout.worker.weights import layerwise, paths, sync

MODEL = torch.nn.Module()


def config(**there: Any) -> Any:
    """What of vLLM's VllmConfig is looked at."""
    quantization = there.pop("quantization", None)
    settings = {"lora_config": None, "speculative_config": None, **there}
    return types.SimpleNamespace(model_config=types.SimpleNamespace(quantization=quantization), **settings)


@pytest.fixture
def obstacles(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What speaks against each of our paths; to be filled by a test."""
    found = {"by_layout": "", "layerwise": ""}
    monkeypatch.setattr(sync, "obstacle", lambda model: found["by_layout"])
    monkeypatch.setattr(layerwise, "obstacle", lambda model: found["layerwise"])
    return found


@pytest.mark.parametrize("proposed", ["auto", paths.AUTO, list(paths.AUTO)])
def test_the_first_that_works_is_taken(obstacles: dict[str, str], proposed: Any) -> None:
    assert paths.choose(proposed, MODEL, config()) == ("by_layout", [])
    obstacles["by_layout"] = "2 weights are repacked"
    assert paths.choose(proposed, MODEL, config()) == ("layerwise", ["by_layout: 2 weights are repacked"])
    obstacles["layerwise"] = "this vLLM has none"
    reasons = ["by_layout: 2 weights are repacked", "layerwise: this vLLM has none"]
    assert paths.choose(proposed, MODEL, config()) == ("verl", reasons)


@pytest.mark.parametrize("path", ["by_layout", "layerwise", "verl"])
def test_a_path_that_the_user_set_is_taken_whatever_speaks_against_it(obstacles: dict[str, str], path: str) -> None:
    obstacles.update(by_layout="no", layerwise="no")
    assert paths.choose(path, MODEL, config(quantization="fp8")) == (path, [])


def test_where_nothing_of_a_list_works_the_first_is_taken_and_its_sync_says_why(obstacles: dict[str, str]) -> None:
    obstacles.update(by_layout="no", layerwise="neither")
    assert paths.choose(("by_layout", "layerwise"), MODEL, config()) == (
        "by_layout",
        ["by_layout: no", "layerwise: neither"],
    )


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ({"lora_config": object()}, "LoRA adapters"),
        ({"quantization": "fp8"}, "quantized weights"),
        ({"speculative_config": object()}, "a drafter"),
        ({"lora_config": object(), "quantization": "fp8"}, "LoRA adapters and quantized weights"),
    ],
)
def test_more_than_plain_weights_goes_by_verls_own_sequence(
    obstacles: dict[str, str], there: dict[str, Any], words: str
) -> None:
    path, reasons = paths.choose("auto", MODEL, config(**there))
    assert path == "verl"
    assert reasons == [f"{each}: it does not load {words}" for each in ("by_layout", "layerwise")]


def test_layouts_that_nobody_recorded_are_said() -> None:
    assert "VLLM_PLUGINS" in sync.obstacle(MODEL)
