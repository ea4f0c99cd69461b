"""Every sync of every family leaves bit for bit what a fresh load of the same checkpoint leaves, or is refused by name.

The models are built by vLLM's own loader in this process, without an engine.  A cell that fails says family, dtype,
which sync of which way, and the first tensors that differ.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from families import FAMILIES, MERGED, TAKEN_MERGED, TIED_HEADS
from loaded_model import emptied
from specimen import Specimen, named, refusal
from streams import BY_OTHER_NAMES, EVERYWHERE, Way, published

from verl_ascend_rollout.events import EVENTS_VARIABLE, load

DTYPES = ("bfloat16", "float16")
ALL = [family.name for family in FAMILIES]
ASKED = ("gpt_oss", "granitemoehybrid", "minimax_m2", "jamba", "llama4", "gpt_neox", "mamba2", "falcon_h1")
"""Families whose loader computes with a weight or permutes it, so that every sync asks it; and phi_by_transformers,
whose loader makes a parameter anew."""
OTHER_NAMES = tuple(name for name in ALL if name in MERGED or name in TIED_HEADS)


@pytest.mark.specimens(ALL, DTYPES)
def test_two_fresh_loads_have_no_parameter_in_common_and_layers_have_outputs(specimen: Specimen) -> None:
    a, b = specimen.fresh["A"], specimen.fresh["B"]
    assert a.keys() == b.keys()
    names = {name if "." in name else f".{name}" for name, _ in specimen.loaded.model.named_parameters()}
    same = [name for name in names if a[name].numel() and a[name].shape == b[name].shape and a[name].equal(b[name])]
    assert not same, f"{specimen.name}: a test would not see whether these were synced"
    outputs = [name for name in a if "output for" in name]
    assert outputs and not any(a[name].equal(b[name]) for name in outputs)


@pytest.mark.specimens(ALL, DTYPES)
@pytest.mark.parametrize("way", EVERYWHERE, ids=lambda way: way.name)
def test_a_sync_leaves_what_a_fresh_load_leaves(specimen: Specimen, way: Way) -> None:
    _follow(specimen, way)


@pytest.mark.specimens(ALL, DTYPES)
def test_what_is_left_of_a_weight_that_a_layer_keeps_elsewhere_has_the_dtype_of_a_fresh_load(
    specimen: Specimen,
) -> None:
    """vLLM casts inputs to it (gate_linear.py)."""
    fresh = emptied(specimen.fresh["B"])
    specimen.loaded.start_over()
    for number in (1, 2):
        refused = refusal(lambda: specimen.loaded.sync(specimen.pair.b.published.items()))
        assert not refused, f"{specimen.name}, sync {number}: refused, and is right: {refused}"
        found = emptied(specimen.loaded.state())
        unlike = [
            f"{name} ({found.get(name)} for {dtype})" for name, dtype in fresh.items() if found.get(name) != dtype
        ]
        assert not unlike, f"{specimen.name}, sync {number}: {len(unlike)}: {', '.join(unlike[:4])}"


@pytest.mark.specimens(ALL, DTYPES[:1])
def test_what_a_loader_only_copies_is_repeated_without_it(specimen: Specimen) -> None:
    specimen.loaded.start_over()
    assert not refusal(lambda: specimen.loaded.sync(specimen.pair.b.published.items()))
    assert specimen.loaded.is_replayed() is (specimen.pair.family.name not in (*ASKED, "phi_by_transformers"))


@pytest.mark.specimens(OTHER_NAMES, DTYPES)
@pytest.mark.parametrize("way", BY_OTHER_NAMES, ids=lambda way: way.name)
def test_a_sync_by_the_names_of_memory_leaves_what_a_fresh_load_leaves(specimen: Specimen, way: Way) -> None:
    _follow(specimen, way)


def _follow(specimen: Specimen, way: Way) -> None:
    """Sync after sync of a new worker: the first goes through the model's loader, the later ones may be replayed."""
    specimen.loaded.start_over()
    may_refuse = way.names is not published and _may_refuse_merged(specimen)
    known = specimen.pair.a.published.keys()
    for number, (which, stream) in enumerate(way.streams(specimen.checkpoint), 1):
        step = f"{specimen.name}, {way.name}, sync {number} ({which})"
        said = refusal(lambda stream=stream: specimen.loaded.sync(stream, bucket=way.bucket))
        if said:
            others = [name for name, _ in stream if name not in known]
            assert may_refuse and others, f"{step}: refused, and is right: {said}"
            assert named(said) & set(others), f"{step}: refused without the name of a tensor: {said}"
            continue
        unlike = specimen.unlike_fresh(which)
        assert not unlike, f"{step}: accepted with {unlike}"


@pytest.mark.specimens(("qwen3_moe", "granitemoe", "phi3"), DTYPES[:1])
def test_a_checkpoint_that_is_loaded_again_from_its_files_leaves_what_a_fresh_load_leaves(specimen: Specimen) -> None:
    specimen.loaded.start_over()
    for number, which in enumerate("BAB", 1):
        checkpoint = specimen.pair[which]
        answer = specimen.loaded.reload(checkpoint.folder)
        unlike = specimen.unlike_fresh(which)
        assert not unlike, f"{specimen.name}, reload {number} ({which}): accepted with {unlike}"
        assert answer["tensors"] == len(checkpoint.published)
        assert answer["bytes"] == sum(tensor.nbytes for tensor in checkpoint.published.values())


def _may_refuse_merged(specimen: Specimen) -> bool:
    return specimen.pair.family.name in MERGED and specimen.pair.family.name not in TAKEN_MERGED


@pytest.mark.specimens(OTHER_NAMES, DTYPES)
def test_a_sync_by_other_names_than_the_last_leaves_what_a_fresh_load_leaves(specimen: Specimen) -> None:
    assert specimen.pair.a.published.keys() != specimen.pair.a.state_dict.keys()
    specimen.loaded.start_over()
    may_refuse = _may_refuse_merged(specimen)
    for number, (which, names) in enumerate(
        (("B", "published"), ("A", "state_dict"), ("B", "published"), ("A", "state_dict"), ("A", "published")), 1
    ):
        step = f"{specimen.name}, sync {number} ({which} by its {names} names)"
        said = refusal(
            lambda which=which, names=names: specimen.loaded.sync(getattr(specimen.pair[which], names).items())
        )
        assert not said or (may_refuse and names == "state_dict"), f"{step}: refused, and is right: {said}"
        unlike = "" if said else specimen.unlike_fresh(which)
        assert not unlike, f"{step}: accepted with {unlike}"


@pytest.mark.specimens(("qwen3_moe", "mixtral", "llama_bias", "phi3"), DTYPES[:1])
def test_a_first_sync_goes_through_the_loader_and_so_does_the_one_after_a_failure_and_the_others_are_replayed(
    specimen: Specimen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What these tests call both passes."""
    monkeypatch.setenv(EVENTS_VARIABLE, str(tmp_path / "events.jsonl"))
    specimen.loaded.start_over()
    for _ in range(2):
        specimen.loaded.sync(specimen.pair.b.published.items())
    assert refusal(lambda: specimen.loaded.sync([]))
    for _ in range(2):
        specimen.loaded.sync(specimen.pair.b.published.items())
    paths = [event["detail"]["path"] for event in load(tmp_path / "events.jsonl").events]
    assert paths == ["loader", "replay", "loader", "replay"]


@pytest.mark.specimens(ALL, DTYPES)
def test_six_tensors_left_out_in_turn_are_each_named_in_both_passes_and_the_next_whole_sync_is_right(
    specimen: Specimen,
) -> None:
    specimen.loaded.start_over()
    wrong = []
    a, b = specimen.pair.a.published, specimen.pair.b.published
    for dropped in _one_of_each_kind(list(b), 6, seed=specimen.name):
        specimen.loaded.sync(a.items())
        without = [(name, tensor) for name, tensor in b.items() if name != dropped]
        # After a sync that passed it may be replayed; after one that failed it goes through the model's loader.
        for after in ("after a good sync", "after a failed sync"):
            said = refusal(lambda without=without: specimen.loaded.sync(without))
            if named(said) & b.keys() != {dropped}:
                wrong.append(f"{dropped} left out {after}: {said or 'accepted'}")
    for which in "BA":
        said = refusal(lambda which=which: specimen.loaded.sync(specimen.pair[which].published.items()))
        unlike = said or specimen.unlike_fresh(which)
        if unlike:
            wrong.append(f"{which} after the failures: {unlike}")
    assert not wrong, f"{specimen.name}: " + "\n".join(wrong)


@pytest.mark.specimens(ALL, DTYPES[:1])
def test_a_tensor_left_out_of_the_very_first_sync_is_named_or_its_layer_is(specimen: Specimen) -> None:
    wrong = []
    b = specimen.pair.b.published
    for dropped in _one_of_each_kind(list(b), 6, seed=f"first, {specimen.name}"):
        # Nobody has told this worker how the trainer names its tensors.
        specimen.loaded.start_over()
        said = refusal(lambda dropped=dropped: specimen.loaded.sync((name, b[name]) for name in b if name != dropped))
        layer = re.search(r"\.\d+\.", dropped)
        if not said or not (dropped in said or layer is None or layer[0] in said):
            wrong.append(f"{dropped}: {said or 'accepted'}")
    assert not wrong, f"{specimen.name}: " + "\n".join(wrong)


@pytest.mark.specimens(ALL, DTYPES[:1])
def test_a_sync_of_nothing_is_refused_in_both_passes(specimen: Specimen) -> None:
    specimen.loaded.start_over()
    assert refusal(lambda: specimen.loaded.sync([])), f"{specimen.name}: an empty first sync was accepted"
    specimen.loaded.sync(specimen.pair.b.published.items())
    assert refusal(lambda: specimen.loaded.sync([])), f"{specimen.name}: an empty later sync was accepted"


def _one_of_each_kind(names: list[str], count: int, seed: str) -> list[str]:
    """Some of the names; of those that differ only in numbers (layers, experts) one, as long as there are others."""
    draw = random.Random(seed)
    kinds: dict[str, list[str]] = {}
    for name in sorted(names):
        kinds.setdefault(re.sub(r"\d+", "N", name), []).append(name)
    chosen = draw.sample(sorted(kinds), min(count, len(kinds)))
    return [draw.choice(kinds[kind]) for kind in chosen]
