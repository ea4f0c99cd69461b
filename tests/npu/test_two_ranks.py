"""Tensor and expert parallelism on two emulated NPUs, over HCCL in shared memory, against one."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from test_field_bugs import in_a_process_of_its_own
from toy_engine import TOLERANCE, Answer, Checkpoint, Engine

pytestmark = pytest.mark.engine

RELEASE = Version(importlib.metadata.version("vllm-ascend")).release[:2]


@pytest.fixture
def folder(checkpoints: list[Checkpoint], tmp_path: Path) -> Path:
    for number in (0, 1):
        (tmp_path / f"model{number}").symlink_to(checkpoints[number].path)
    return tmp_path


def largest_difference(one: list[Answer], other: list[Any]) -> float:
    pairs = zip(one, other, strict=True)
    return max(abs(a - b) for (_, first), (_, second) in pairs for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("case", ["tensor_parallel", "expert_parallel"])
def test_two_ranks_answer_as_one_does(
    case: str, folder: Path, engine: Engine, checkpoints: list[Checkpoint], report: Any
) -> None:
    engine.call("ascend_safe_reload_from_disk", str(checkpoints[0].path))
    alone = engine.answers()
    found = in_a_process_of_its_own(case, folder, script="two_rank_cases.py")
    assert [tokens for tokens, _ in found["fresh"]] == [tokens for tokens, _ in alone]
    difference = largest_difference(alone, found["fresh"])
    report(f"{case}: two ranks against one, log-probs", difference)
    assert difference < TOLERANCE
    assert found["after init"] == found["fresh"]
    assert [change["changed"] for change in found["free"] + found["init"]] == [True] * 4
    # Bit for bit what an engine of the same kind answers that has loaded the checkpoint at its start.
    other = in_a_process_of_its_own(f"{case}_fresh", folder, script="two_rank_cases.py")["fresh"]
    assert found["sync 1"] == found["sync 3"] == other != found["fresh"] == found["sync 2"]
    for number, checkpoint in enumerate((checkpoints[1], checkpoints[0], checkpoints[1]), start=1):
        gap = checkpoint.gap(found[f"sync {number}"])
        report(f"{case}: sync {number} on two ranks", gap)
        assert gap < TOLERANCE


@pytest.mark.skipif(RELEASE < (0, 23), reason="this stack's vLLM records no routing as verl takes it")
@pytest.mark.parametrize("case", ["tensor_parallel_records", "expert_parallel_records"])
def test_two_ranks_record_the_experts_that_the_model_picks(
    case: str, folder: Path, checkpoints: list[Checkpoint], report: Any
) -> None:
    """Of each token but the last; the control is the other model, whose they would be if a sync missed a router."""
    found = in_a_process_of_its_own(case, folder, script="two_rank_cases.py")
    for state, own, other in (("fresh", 0, 1), ("synced", 1, 0)):
        same, cells = cells_alike(found[state], checkpoints[own].reference)
        report(f"{case}, {state}: cells recorded as transformers picks them", f"{same} of {cells}")
        assert same > 0.95 * cells
        same, cells = cells_alike(found[state], checkpoints[other].reference)
        assert same < 0.1 * cells


def cells_alike(answers: list[Any], model: Any) -> tuple[int, int]:
    """In how many cells (token and layer) the record has what transformers' routers pick, and how many there are."""
    import torch

    from verl_ascend_rollout.integration.routing_replay import routers_of

    logits: list[Any] = []
    routers = routers_of(model)
    hooks = [
        router.module.register_forward_hook(lambda _module, _inputs, output: logits.append(output[0]))
        for router in routers
    ]
    same = cells = 0
    for tokens, record in answers:
        logits.clear()
        with torch.no_grad():
            model(torch.tensor([tokens]))
        own = torch.stack([one.topk(routers[0].top_k).indices for one in logits], 1)[:-1]
        equal = (torch.tensor(record).sort(-1).values == own.sort(-1).values).all(-1)
        same, cells = same + int(equal.sum()), cells + equal.numel()
    for hook in hooks:
        hook.remove()
    return same, cells


@pytest.mark.cluster
@pytest.mark.skipif(RELEASE < (0, 18), reason="this stack's vLLM takes no rank for a request")
def test_data_parallel_ranks_answer_as_a_fresh_engine_does(folder: Path) -> None:
    """Bit for bit, on both ranks, with the experts spread over them."""
    found = in_a_process_of_its_own("data_parallel", folder, script="two_rank_cases.py")
    fresh = in_a_process_of_its_own("data_parallel_fresh", folder, script="two_rank_cases.py")["fresh"]
    assert found["sync 1"] == found["sync 3"] == fresh != found["fresh"] == found["sync 2"]


def test_level_2_sleep_loses_the_dispatchers_expert_ids(folder: Path, report: Any) -> None:
    """verl#7086: a plain tensor in the weights' pool, which neither a sync nor the saved buffers bring back.

    vllm-ascend registers it as a buffer from 0.28 on.  Our policy sleeps at level 1 in every release.
    """
    from verl_ascend_rollout.platforms.detect import detect
    from verl_ascend_rollout.policy import engine_args

    found = in_a_process_of_its_own("sleep_level_2", folder, script="two_rank_cases.py")
    assert found["before"][0] is not None
    assert found["level 1"] == found["before"]
    assert (found["level 2"] != found["before"]) == (RELEASE < (0, 28))
    decided = engine_args.decide(detect({"VERL_PLATFORM": "npu"}), engine_args.EngineRequest(expert_parallel_size=2))
    assert decided["sleep_level"].value == 1
    report("expert ids after level-2 sleep with EP", "kept" if found["level 2"] == found["before"] else "lost (stock)")
