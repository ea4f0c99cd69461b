"""Weight syncs, cell by cell: each rank's slice of each model and shape, three syncs with wake-ups between.

Every tensor that hangs on the model must equal that of a fresh load of the same weights, byte for byte, at the address
that it had before.  The control is verl 0.9.1's own sequence on the same cells.  The tables below say what each
release makes of it; a test fails where a table and the release disagree.

Real vLLM models, vllm-ascend's own loaders, processing and `NPUWorker.sleep` and `wake_up`, on a stand-in CANN.
"""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from typing import Any

import pytest
from packaging.version import Version
from test_field_bugs import BUGS, in_a_process_of_its_own

RELEASE = ".".join(str(part) for part in Version(importlib.metadata.version("vllm-ascend")).release[:2])

EQUAL, WRONG, RAISES = "equal", "silently wrong", "raises"

VERL = {
    "0.11": "guesses in its loaders",
    "0.13": "guesses in verl's wrapper",
    "0.18": "guesses in verl's wrapper",
    "0.23": "guesses in verl's wrapper",
    "0.28": "refuses",
    "0.30": "refuses",
}
"""What comes of verl 0.9.1's sequence, by vllm-ascend's release:

-   verl's NPU wrapper turns a parameter round by its shape (utils/vllm/npu_vllm_patch.py:241): silently wrong wherever
    one of the expert weights is square on a rank, right elsewhere.
-   vllm-ascend 0.11's own loaders turn the incoming tensor round by its shape (ops/common_fused_moe.py:336): silently
    wrong as well, but for hidden == intermediate, where the rank's slice is then out of range.  verl 0.9.1 cannot be
    imported beside vLLM 0.11 at all; what is run is its sequence without its NPU patches.
-   From vLLM 0.24 on its patches find nothing to patch: checkpoint form meets kernel form, which the sizes refuse.
"""


def expected_of_verl(cell: dict[str, Any]) -> str:
    """The outcome of verl's sequence on one cell."""
    if VERL[RELEASE] == "refuses":
        return RAISES
    if VERL[RELEASE] == "guesses in its loaders" and cell["hidden"] == cell["intermediate"]:
        return RAISES
    return WRONG if cell["square"] else EQUAL


MERGED = {
    "qwen2_moe": {**dict.fromkeys(("0.11", "0.13", "0.18", "0.23"), RAISES), "0.28": EQUAL, "0.30": EQUAL},
    # vLLM 0.18 and 0.23 pass over names that they do not know (models/qwen3_moe.py): the experts stay as they were.
    "qwen3_moe": {"0.11": RAISES, "0.13": RAISES, "0.18": WRONG, "0.23": WRONG, "0.28": EQUAL, "0.30": EQUAL},
}
"""What the release's own loader makes of experts that come as one 3-D tensor a layer, by model and release."""

ATTENTION_SCALES = ["_k_scale", "_prob_scale", "_q_scale", "_v_scale", "k_range", "q_range", "v_range"]
LOST_IN_LEVEL_2 = {
    "0.11": ATTENTION_SCALES,
    "0.13": sorted([*ATTENTION_SCALES, "global_expert_map"]),
    "0.18": [],
    "0.23": [],
    "0.28": ["_ascend_expert_map"],
    "0.30": ["_ascend_expert_map"],
}
"""Plain tensors in the weights' pool that a sleep at level 2 discards and nothing brings back, by release."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return in_a_process_of_its_own("matrix", tmp_path_factory.mktemp("matrix"), script="weight_matrix_cases.py")


def outcome(syncs: list[dict[str, Any]]) -> str:
    """One word for the syncs of a cell."""
    if any(sync["error"] for sync in syncs):
        return RAISES
    return WRONG if any(sync["different"] for sync in syncs) else EQUAL


@pytest.mark.parametrize("way", ["ours", "ours beside verl"])
def test_each_sync_equals_a_fresh_load_at_the_same_addresses(way: str, found: dict[str, Any], report: Any) -> None:
    wrong = {name: syncs for name, cell in found["cells"].items() for syncs in [cell[way]] if not flawless(syncs)}
    assert wrong == {}
    tensors = sum(3 * cell["tensors"] for cell in found["cells"].values())
    report(f"weight matrix, {way}: cells, tensors compared", f"{len(found['cells'])}, {tensors} (byte-equal, unmoved)")


def flawless(syncs: list[dict[str, Any]]) -> bool:
    return len(syncs) == 3 and not any(sync["error"] or sync["different"] or sync["moved"] for sync in syncs)


def test_the_matrix_has_every_cell(found: dict[str, Any], report: Any) -> None:
    names = set(found["cells"])
    for model in ("qwen2_moe", "qwen3_moe"):
        for shape in ("plain", "H == 2*I/tp", "I/tp == H", "I == H", "odd"):
            assert {f"{model} {shape} tp{tp} rank{rank}" for tp in (1, 2, 4) for rank in range(tp)} <= names
        assert {f"{model} I/tp == 96 tp8 rank{rank}" for rank in range(8)} <= names
    squares = Counter(cell["square"] for cell in found["cells"].values())
    assert min(squares[which] for which in ("", "w13_weight", "w2_weight")) >= 14
    report("weight matrix, seconds", f"{found['seconds']:.0f}")


@pytest.mark.parametrize("way", ["verl", "verl, never asleep"])
def test_the_control_fails_where_the_table_says(way: str, found: dict[str, Any], report: Any) -> None:
    assert bool(found["verl cannot be imported"]) == (RELEASE == "0.11")
    got = {name: outcome(cell[way]) for name, cell in found["cells"].items()}
    expected = {name: expected_of_verl(cell) for name, cell in found["cells"].items()}
    assert got == expected
    for cell in found["cells"].values():
        # Wrong is exactly the square weight; all else is right.
        different = {name.rpartition(".")[2] for sync in cell[way] for name in sync["different"]}
        assert different == ({cell["square"]} if outcome(cell[way]) == WRONG else set())
    counts = ", ".join(f"{number} {word}" for word, number in sorted(Counter(got.values()).items()))
    report(f"weight matrix, control ({way})", counts)


def test_wake_ups_that_no_sync_follows_are_settled(found: dict[str, Any]) -> None:
    """An adapter-only sync, or a colocated reward model."""
    for case in found["no sync"].values():
        turned = {name.rpartition(".")[2] for names in case["stock"] for name in names}
        assert turned == ({"w13_weight", "w2_weight"} if RELEASE in BUGS["wake-up transpose"] else set())
        assert case["settled"] == case["again"] == [[], []]
        assert case["loaders"] == ["", ""]
        assert case["synced"] == case["moved"] == []


def test_experts_in_one_tensor_a_layer(found: dict[str, Any], report: Any) -> None:
    for name, case in found["merged experts"].items():
        assert case["ours"] == []
        stock = outcome([case["stock"]])
        assert stock == MERGED[name.split()[0]][RELEASE]
        report(f"merged experts by the stock loader, {name}", f"{stock} {case['stock']['error']}".strip())


def test_tied_embeddings(found: dict[str, Any]) -> None:
    tied = found["tied embeddings"]
    for which in ("without", "first", "last"):
        assert tied[which] == {"different": [], "moved": [], "error": ""}, which
    assert "is not the same as the other of model.embed_tokens.weight and lm_head.weight" in tied["another"]["error"]


def test_level_2_sleep_loses_tensors_that_are_no_buffers(found: dict[str, Any], report: Any) -> None:
    """Why our policy sleeps at level 1 on an NPU (see also test_two_ranks.py)."""
    assert found["sleep level 2"]["level 1"] == []
    lost = sorted({name.rpartition(".")[2] for name in found["sleep level 2"]["level 2"]})
    assert lost == LOST_IN_LEVEL_2[RELEASE]
    report("lost in a level-2 sleep with EP, after a sync", ", ".join(lost) or "nothing of the model")


def test_vllms_own_bracket_is_right_from_024_on_and_silently_wrong_nowhere(found: dict[str, Any]) -> None:
    """Not what `auto` takes here, but what a user may set (`weight_path: layerwise`)."""
    for name, cell in found["layerwise"].items():
        outcomes = [*cell["asleep"], *cell["awake"]]
        if RELEASE in ("0.28", "0.30"):
            assert not any(outcome["error"] for outcome in outcomes), f"{name}: {cell['obstacle']}, {outcomes[0]}"
        accepted = [outcome for outcome in outcomes if not outcome["error"]]
        assert not any(outcome["different"] or outcome["moved"] for outcome in accepted), f"{name}: {accepted}"
