"""A weight sync through vLLM's own bracket leaves what a fresh load leaves, where the kernels had it, or is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from checkpoint_pair import Pair
from families import FAMILIES
from loaded_model import LoadedModel, NamedTensor, State, differences, tensors
from specimen import Specimen, named, refusal
from stand_in_blackwell import blackwell, loaded_on_cuda
from streams import Way, state_dict

from verl_ascend_rollout.worker.weights import meta_layers, paths, vllm_reload
from verl_ascend_rollout.worker.weights import sync as weight_sync

ALL = [family.name for family in FAMILIES]
BF16 = ("bfloat16",)
REFUSED = ("granitemoehybrid", "mamba2", "falcon_h1")
"""Families that vLLM's bracket cannot load here: a Mamba mixer reads its convolution through a buffer, which is a view
of a parameter that has been packed since."""


def addresses(model: torch.nn.Module) -> dict[str, tuple[Any, ...]]:
    """Where each tensor of a model is, and how it lies there: what a captured graph knows of it."""
    found = {}
    for prefix, layer in model.named_modules():
        attributes = {name: value for name, value in vars(layer).items() if isinstance(value, torch.Tensor)}
        for name, tensor in {**layer._parameters, **layer._buffers, **attributes}.items():
            if tensor is not None:
                found[f"{prefix}.{name}"] = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
    return found


def moved(before: dict[str, tuple[Any, ...]], model: torch.nn.Module) -> list[str]:
    now = addresses(model)
    return [name for name in before.keys() | now.keys() if before.get(name) != now.get(name)]


@pytest.mark.specimens(ALL, BF16)
def test_syncs_leave_what_a_fresh_load_leaves_at_the_same_addresses(specimen: Specimen) -> None:
    specimen.loaded.start_over("layerwise")
    before = addresses(specimen.loaded.model)
    for number, (which, stream) in enumerate(Way("shuffled", shuffled=True, syncs="BABA").streams(specimen.checkpoint)):
        step = f"{specimen.name}, sync {number} ({which})"
        said = refusal(lambda stream=stream: specimen.loaded.sync(stream))
        if said and specimen.pair.family.name in REFUSED:
            # Where oneDNN packs the weight, as on a processor with AMX; elsewhere it stays, and the sync must be right.
            assert "conv_weights was a view of a parameter" in said
            continue
        assert not said, f"{step}: refused, and is right: {said}"
        unlike = specimen.unlike_fresh(which)
        assert not unlike, f"{step}: accepted with {unlike}"
        assert not moved(before, specimen.loaded.model), step


@pytest.mark.specimens(("qwen3_moe", "gpt_oss", "granitemoe", "llama_tied"), BF16)
def test_wrong_streams_are_refused_by_name_and_the_next_sync_is_right_at_the_same_addresses(specimen: Specimen) -> None:
    specimen.loaded.start_over("layerwise")
    before = addresses(specimen.loaded.model)
    a, b = specimen.pair.a.published, specimen.pair.b.published
    name = next(name for name in b if "layers.1" in name and b[name].dim() >= 2)
    wrong: dict[str, tuple[str, dict[str, torch.Tensor]]] = {
        "nothing": (name, {other: b[other] for other in b if other != name}),
        "half of the rows": (name, {**b, name: b[name][: len(b[name]) // 2]}),
        "one row more": (name, {**b, name: torch.cat([b[name], b[name][:1]])}),
        "integers": (name, {**b, name: b[name].to(torch.int8)}),
        "a NaN": (name, {**b, name: torch.full_like(b[name], float("nan"))}),
        "Inf after the cast": (name, {**b, name: torch.full(b[name].shape, 1e300, dtype=torch.float64)}),
        "a bias that the model does not have": ("model.norm.bias", {**b, "model.norm.bias": torch.ones(128)}),
    }
    found = []
    for what, (blamed, stream) in wrong.items():
        said = refusal(lambda stream=stream: specimen.loaded.sync(stream.items()))
        # What gpt-oss's loader makes of experts has no tensor's name any more.
        if blamed not in named(said) and not (what == "Inf after the cast" and "w2_weight" in said):
            found.append(f"{what}: {blamed} not in: {said or '(accepted)'}")
        for which, right in (("A", a), ("B", b)):
            said = refusal(lambda right=right: specimen.loaded.sync(right.items()))
            unlike = said or specimen.unlike_fresh(which) or moved(before, specimen.loaded.model)
            if unlike:
                found.append(f"{which} after {what}: {unlike}")
    assert not found, f"{specimen.name}:\n" + "\n".join(found)


@pytest.mark.specimens(("qwen3_moe", "llama_tied"), BF16)
def test_a_sync_that_is_broken_off_leaves_a_model_that_the_next_one_fills(specimen: Specimen) -> None:
    """In between the engine refuses to generate (tests/engine)."""
    specimen.loaded.start_over("layerwise")
    before = addresses(specimen.loaded.model)
    stream = list(specimen.pair.b.published.items())

    def broken(after: int) -> Iterator[NamedTensor]:
        yield from stream[:after]
        raise OSError("the trainer is gone")

    for after in (0, 1, len(stream) // 2, len(stream)):
        with pytest.raises(OSError, match="the trainer is gone"):
            specimen.loaded.sync(broken(after))
        assert not moved(before, specimen.loaded.model)
        assert not any(parameter.is_meta for parameter in specimen.loaded.model.parameters())
        specimen.loaded.sync(stream)
        assert not specimen.unlike_fresh("B")


# --------------------------------------------------------------------------------------------------------------------
# where vLLM's bracket alone is wrong


@pytest.mark.specimens(("qwen3_moe", "llama_tied", "gpt_oss"), BF16)
def test_control_vllms_bracket_alone_is_wrong_here_without_a_word(specimen: Specimen) -> None:
    """If this fails, vLLM has mended it: experts on a CPU, a head that is tied and packed, or gpt-oss's own loader."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    loaded = specimen.loaded
    loaded.start_over("layerwise")
    loaded.sync(specimen.pair.a.published.items())
    with torch.no_grad(), set_current_vllm_config(loaded.config):
        initialize_layerwise_reload(loaded.model)
        loaded.model.load_weights((name, tensor.clone()) for name, tensor in specimen.pair.b.published.items())
        finalize_layerwise_reload(loaded.model, loaded.config.model_config)
    assert specimen.unlike_fresh("B")
    loaded.sync(specimen.pair.b.published.items())
    assert not specimen.unlike_fresh("B")


@contextmanager
def as_vllm_has_it(method: Any, known: Any) -> Iterator[None]:
    """What is left of `_as_for_the_first_time` without what it does."""
    yield


@pytest.mark.specimens(("qwen3_moe",), BF16)
def test_experts_that_their_method_leaves_unpacked_are_seen(
    specimen: Specimen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method that keeps a kernel, and does less with weights when it has one, cannot pass for one that does not."""
    specimen.loaded.start_over("layerwise")
    with monkeypatch.context() as patch:
        patch.setattr(meta_layers, "_as_for_the_first_time", as_vllm_has_it)
        said = refusal(lambda: specimen.loaded.sync(specimen.pair.b.published.items()))
    assert "its kernel keeps w13_weight in another form than after the first load" in said
    specimen.loaded.sync(specimen.pair.b.published.items())
    assert not specimen.unlike_fresh("B")


@pytest.mark.specimens(("qwen3_moe",), BF16)
@pytest.mark.parametrize("lost", ["forgotten", "another in its place"])
def test_what_vllm_keeps_for_a_layer_and_does_not_load_as_it_came_is_seen(
    specimen: Specimen, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tensors have come, and been counted on the meta device; the layer's memory tells another story."""
    give_memory = vllm_reload.give_memory

    def change(layer: torch.nn.Module) -> None:
        kept = vllm_reload.info(layer).loaded_weights
        if len(kept) > 3:
            kept[1:2] = [] if lost == "forgotten" else [kept[2]]
        give_memory(layer)

    specimen.loaded.start_over("layerwise")
    with monkeypatch.context() as patch:
        patch.setattr(vllm_reload, "give_memory", change)
        said = refusal(lambda: specimen.loaded.sync(specimen.pair.b.published.items()))
    assert "not every element of model.layers.0.mlp.experts.routed_experts." in said
    specimen.loaded.sync(specimen.pair.b.published.items())
    assert not specimen.unlike_fresh("B")


@pytest.mark.specimens(("llama_tied",), BF16)
def test_a_layer_that_is_passed_over_is_named(specimen: Specimen, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM would put its old weights back, and say nothing that anybody reads."""
    process = meta_layers.MetaLayers._process
    specimen.loaded.start_over("layerwise")
    with monkeypatch.context() as patch:
        patch.setattr(
            meta_layers.MetaLayers,
            "_process",
            lambda layers, layer: None if layer is specimen.loaded.model.model.norm else process(layers, layer),
        )
        said = refusal(lambda: specimen.loaded.sync(specimen.pair.b.published.items()))
    assert said == "model.norm was not loaded"
    specimen.loaded.sync(specimen.pair.b.published.items())
    assert not specimen.unlike_fresh("B")


# --------------------------------------------------------------------------------------------------------------------
# Blackwell


BLOCKED = ("qwen3_moe", "qwen2_moe", "glm4_moe")


@pytest.fixture(params=BLOCKED)
def pair(request: pytest.FixtureRequest, pairs: Callable[[str], Pair]) -> Pair:
    """Checkpoints whose experts are blocked; a step of vLLM's blocks has 128 rows and 64 columns, as theirs have."""
    return pairs(request.param)


@pytest.fixture
def on_blackwell(pair: Pair) -> Iterator[tuple[LoadedModel, dict[str, State]]]:
    """A model with blocked experts, and what fresh loads of its checkpoints are."""
    with blackwell():
        fresh = {which: tensors(loaded_on_cuda(pair[which].folder).model) for which in "AB"}
        loaded = loaded_on_cuda(pair.a.folder)
        loaded.start_over("layerwise")
        yield loaded, fresh


def experts(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in model.named_parameters() if name.endswith(("w13_weight", "w2_weight"))}


def test_blocked_experts_are_right_after_every_sync_at_the_same_addresses(
    on_blackwell: tuple[LoadedModel, dict[str, State]], pair: Pair
) -> None:
    loaded, fresh = on_blackwell
    assert all(weight.dim() == 4 for weight in experts(loaded.model).values())
    before = addresses(loaded.model)
    for way in (Way("published", syncs="BABA", shuffled=True), Way("merged", names=state_dict, syncs="BA")):
        for which, stream in way.streams(lambda which: pair[which]):
            loaded.sync(stream)
            assert not differences(tensors(loaded.model), fresh[which]), f"{way.name}, {which}"
            assert not moved(before, loaded.model)


def test_blocked_experts_are_loaded_layerwise_and_the_reason_names_them(
    on_blackwell: tuple[LoadedModel, dict[str, State]],
) -> None:
    loaded, _ = on_blackwell
    path, reasons = paths.choose("auto", loaded.model, loaded.config)
    assert path == "layerwise"
    assert len(reasons) == 1 and reasons[0].startswith("by_layout: ") and "w13_weight (repacked)" in reasons[0]
    assert "w13_weight (repacked)" in weight_sync.obstacle(loaded.model)


def test_control_a_loader_alone_cannot_load_blocked_experts(
    on_blackwell: tuple[LoadedModel, dict[str, State]], pair: Pair
) -> None:
    """What verl does (0.9.1, vllm_rollout/utils.py): load into the kernels' tensors, then process (verl#7978)."""
    loaded, fresh = on_blackwell
    with torch.no_grad(), pytest.raises((RuntimeError, IndexError, AssertionError)):
        loaded.model.load_weights(pair.b.published.items())
    loaded.sync(pair.b.published.items())
    assert not differences(tensors(loaded.model), fresh["B"])


def test_half_of_a_blocked_expert_is_refused_by_name(
    on_blackwell: tuple[LoadedModel, dict[str, State]], pair: Pair
) -> None:
    loaded, fresh = on_blackwell
    b = pair.b.published
    name = next(name for name in b if ".experts.3.up_proj" in name)
    for wrong in (b[name][: len(b[name]) // 2], torch.cat([b[name], b[name]]), b[name].to(torch.int8)):
        said = refusal(lambda wrong=wrong: loaded.sync({**b, name: wrong}.items()))
        assert name in named(said), said
    loaded.sync(b.items())
    assert not differences(tensors(loaded.model), fresh["B"])


def test_a_method_that_orders_rows_otherwise_once_it_has_a_kernel_is_refused(
    on_blackwell: tuple[LoadedModel, dict[str, State]], pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shape, dtype and blocks are as before: where single elements lie gives it away."""
    from flashinfer.fused_moe import core

    loaded, fresh = on_blackwell
    order = core.get_w2_permute_indices_with_cache
    with monkeypatch.context() as patch:
        patch.setattr(core, "get_w2_permute_indices_with_cache", lambda *of: order(*of).flip(0))
        said = refusal(lambda: loaded.sync(pair.b.published.items()))
    assert "its kernel keeps w2_weight in another form than after the first load" in said
    loaded.sync(pair.b.published.items())
    assert not differences(tensors(loaded.model), fresh["B"])
