"""Routing replay (R3) in verl's own FSDP engine, with real models of transformers, on one CPU process.

The control beside each proof is the same step without the record, or with a wrong one.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from verl_ascend_rollout import events
from verl_ascend_rollout.integration import routing_replay
from verl_ascend_rollout.integration.routing_replay import RoutingReplayError, routers_of
from verl_ascend_rollout.tools import toy_checkpoint
from verl_ascend_rollout.tools.toy_model import Geometry

LENGTHS = (9, 14, 8, 11)
TOP_K, EXPERTS, LAYERS = 4, 60, 3
CLOSE = 1e-5
"""Of a tensor's largest gradient: fp32 rounding, since sums over tokens and experts come in another order (2e-6)."""


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def save_qwen2(folder: Path) -> None:
    """Qwen1.5-MoE in small: not normalised, with a shared expert."""
    sizes = Geometry(
        layers=LAYERS,
        hidden=64,
        head_size=32,
        moe_intermediate=32,
        shared_intermediate=64,
        vocabulary=toy_checkpoint.VOCABULARY,
        positions=256,
    )
    toy_checkpoint.write(folder, sizes, 0, 0.15, rough=True)


def save_qwen3(folder: Path) -> None:
    """Qwen3-MoE in small: normalised, and the layer in the middle has no experts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    save_qwen2(folder)  # for the tokenizer
    config = Qwen3MoeConfig(
        vocab_size=toy_checkpoint.VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    {"qwen2": save_qwen2, "qwen3": save_qwen3}[request.param](folder)
    return folder


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("only_qwen2")
    save_qwen2(folder)
    return folder


def engine_of(folder: Path, **more: Any) -> Any:
    """verl's engine with its model: FSDP2, fp32."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    checkpointing, packed = more.pop("checkpointing", False), more.pop("packed", False)
    plain = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    engine = FSDPEngineWithLMHead(
        HFModelConfig(
            path=str(folder),
            use_remove_padding=packed,
            enable_gradient_checkpointing=checkpointing,
            override_config={"attn_implementation": "sdpa"},
        ),
        FSDPEngineConfig(strategy="fsdp2", use_torch_compile=False, mixed_precision=plain, **more),
        FSDPOptimizerConfig(lr=1e-3, total_training_steps=10),
        CheckpointConfig(),
    )
    engine.initialize()
    return engine


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, 90, (length,), generator=generator) for length in LENGTHS]


def plain_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def native_experts(reference: Any, ids: torch.Tensor) -> torch.Tensor:
    """What transformers' own routers pick, (tokens, LAYERS, TOP_K); zeros in a layer without experts."""
    picked = torch.zeros(len(ids), LAYERS, TOP_K, dtype=torch.long)
    hooks = []
    for router in routers_of(reference):

        def note(_module: Any, _inputs: Any, output: Any, layer: int = router.layer) -> None:
            picked[:, layer] = output[2]

        hooks.append(router.module.register_forward_hook(note))
    with torch.no_grad():
        reference(ids.unsqueeze(0))
    for hook in hooks:
        hook.remove()
    return picked


def records(folder: Path) -> list[torch.Tensor]:
    """A record a sequence, as vLLM gives it: every other token has an expert of another, the last none."""
    reference = plain_model(folder)
    found = []
    for ids in sequences():
        record = native_experts(reference, ids)
        for router in routers_of(reference):
            for row in record[::2, router.layer]:
                row[1] = next(expert for expert in range(7, EXPERTS) if expert not in row)
        record[-1] = 0
        found.append(record)
    return found


def by_hand(folder: Path, record: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gradients of `loss`, by name, of a model whose routers are written out here: one sequence at a time."""
    reference = plain_model(folder)
    now: dict[str, torch.Tensor] = {}

    def written_out(gate: Any, layer: int) -> Callable[[torch.Tensor], Any]:
        def forward(hidden: torch.Tensor) -> Any:
            logits = hidden.reshape(-1, hidden.shape[-1]) @ gate.weight.T
            probabilities = logits.softmax(-1)
            recorded = now["record"][:, layer]
            own = probabilities.argsort(-1, descending=True)[:, :TOP_K]
            chosen = torch.stack([mine if row.eq(0).all() else row for row, mine in zip(recorded, own, strict=True)])
            weights = torch.stack([row[picks] for row, picks in zip(probabilities, chosen, strict=True)])
            if gate.norm_topk_prob:
                weights = weights / weights.sum(-1, keepdim=True)
            return logits, weights, chosen

        return forward

    for router in routers_of(reference):
        router.module.forward = written_out(router.module, router.layer)
    for ids, rows in zip(sequences(), record, strict=True):
        now["record"] = rows
        log_probs = reference(ids.unsqueeze(0)).logits[0].log_softmax(-1)
        rolled = ids.roll(-1)[:-1]
        (log_probs[torch.arange(len(ids) - 1), rolled] * weight_of(len(ids))[:-1]).sum().backward()
    return {name: parameter.grad for name, parameter in reference.named_parameters() if parameter.grad is not None}


def weight_of(length: int) -> torch.Tensor:
    """A weight for each token of the loss; the last has nothing to predict."""
    return torch.cat([torch.linspace(0.5, 1.5, length - 1), torch.zeros(1)])


def loss(model_output: Any, data: Any, dp_group: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    weights = torch.cat([weight_of(int(length)) for length in data["input_ids"].offsets().diff()])
    return (model_output["log_probs"].values() * weights).sum(), {}


def batch_of(
    record: list[torch.Tensor] | None, *, packed: bool = False, dynamic: bool = False, replay: bool = True
) -> Any:
    from verl.utils import tensordict_utils as tu

    def nested(values: list[torch.Tensor]) -> torch.Tensor:
        offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
        return torch.nested.nested_tensor_from_jagged(torch.cat(values), offsets=offsets)

    tensors = {
        "input_ids": nested(sequences()),
        "position_ids": nested([torch.arange(length) for length in LENGTHS]),
        "loss_mask": nested([torch.ones(length, dtype=torch.long) for length in LENGTHS]),
    }
    if record is not None:
        tensors["routed_experts"] = nested([rows.to(torch.int16) for rows in record])
    settings = {
        "use_remove_padding": packed,
        "use_dynamic_bsz": dynamic,
        "max_token_len_per_gpu": 24,
        "micro_batch_size_per_gpu": 2,
        "temperature": 1.0,
        "enable_routing_replay": replay,
    }
    return tu.get_tensordict(tensors, settings)


def gradients(engine: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            found[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def step(engine: Any, data: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """One pass with gradients, as verl's worker has it, without the optimizer's step."""
    with engine.train_mode(disable_auto_offload=True):
        engine.optimizer_zero_grad()
        output = engine.forward_backward_batch(data, loss, forward_only=False)
        return output, gradients(engine)


def furthest(some: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert some.keys() == other.keys()
    return max(float((some[name] - other[name]).abs().max() / (other[name].abs().max() + 1e-9)) for name in other)


@pytest.mark.parametrize(
    ("checkpointing", "packed", "dynamic"),
    [(False, False, False), (True, False, False), (False, True, True), (True, True, False)],
)
def test_the_gradients_are_those_computed_by_hand_with_the_recorded_experts(
    group: None, model: Path, checkpointing: bool, packed: bool, dynamic: bool
) -> None:
    record = records(model)
    wanted = by_hand(model, record)
    engine = engine_of(model, checkpointing=checkpointing, packed=packed)
    output, found = step(engine, batch_of(record, packed=packed, dynamic=dynamic))
    assert furthest(found, wanted) < CLOSE
    routers = [name for name in found if name.endswith("mlp.gate.weight")]
    assert routers and all(found[name].abs().max() > 1e-4 for name in routers), "no gradient through the router"
    # One of eight is not the router's own, and what differs makes more of them differ in the layers above.
    (share,) = output["metrics"]["routing_replay/agreement"]
    assert 0.7 < share < 0.95
    (without,) = output["metrics"]["routing_replay/tokens_without_record"]
    assert without == len(LENGTHS)
    # Control: native routing is not within rounding of it; and the next pass, which is not marked, is native again.
    data = batch_of(record, packed=packed, dynamic=dynamic, replay=False)
    _, native = step(engine, data)
    assert furthest(native, found) > 0.01
    _, bare = step(engine_of(model, checkpointing=checkpointing, packed=packed), data)
    assert furthest(native, bare) == 0.0


def test_a_pass_without_gradients_replays_and_leaves_an_event(group: None, qwen2: Path, tmp_path: Path) -> None:
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngine, FSDPEngineWithLMHead

    file = tmp_path / "events.jsonl"
    replayed = (FSDPEngine.forward_backward_batch, FSDPEngineWithLMHead.prepare_model_inputs)
    routing_replay.switch_on(str(file), replayed)
    engine = engine_of(qwen2)
    record = records(qwen2)
    record[2][:] = 0  # an answer whose record was dropped
    with engine.eval_mode(disable_auto_offload=True):
        output = engine.forward_backward_batch(batch_of(record), None, forward_only=True)
    assert "routing_replay/agreement" not in output["metrics"]
    (event,) = events.read(file)
    tokens = sum(LENGTHS) - LENGTHS[2] - 3
    detail = event["detail"]
    assert (event["step"], event["process"], detail["pass"]) == ("routing", "trainer", "log_prob")
    assert (detail["tokens"], detail["cells"], detail["sequences"]) == (tokens, tokens * LAYERS, len(LENGTHS))
    assert (detail["native"], detail["unrecorded"]) == (LENGTHS[2] + 3, 1)
    assert 0 < detail["differed"] < detail["cells"]
    routing_replay.switch_on(None, replayed)
    with pytest.raises(RoutingReplayError, match="bare of this verl is not the one that is known"):

        def bare() -> None: ...

        bare.__qualname__ = "bare"
        routing_replay.switch_on(None, (bare,))


def test_the_legacy_trainers_padded_batch_gives_each_token_the_same_record(qwen2: Path) -> None:
    """verl's own way from prompts padded left and answers padded right to what its engine takes."""
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import left_right_2_no_padding

    prompt, prompts, answers = 4, 7, 12
    ids, record = sequences(), records(qwen2)
    whole = torch.zeros(len(ids), prompts + answers, dtype=torch.long)
    mask, positions = torch.zeros_like(whole), torch.zeros_like(whole)
    experts = torch.zeros(*whole.shape, LAYERS, TOP_K, dtype=torch.int16)
    for row, (tokens, rows) in enumerate(zip(ids, record, strict=True)):
        place = slice(prompts - prompt, prompts - prompt + len(tokens))  # agent_loop.py:783-809
        whole[row, place], mask[row, place], experts[row, place] = tokens, 1, rows.to(torch.int16)
        positions[row, place] = torch.arange(len(tokens))
    padded = {"input_ids": whole, "attention_mask": mask, "position_ids": positions, "routed_experts": experts}
    batch = left_right_2_no_padding(tu.get_tensordict({**padded, "response_mask": mask[:, prompts:]}))
    rows, owner = routing_replay.lay_out(
        batch["routed_experts"], batch["input_ids"].offsets().diff().tolist(), (1, sum(LENGTHS)), packed=True, padding=0
    )
    assert torch.equal(batch["input_ids"].values(), torch.cat(ids))
    assert torch.equal(rows.long(), torch.cat(record))
    assert owner.bincount().tolist() == list(LENGTHS)


def shifted(record: list[torch.Tensor]) -> list[torch.Tensor]:
    """By one token, as where vLLM's record lacks the first."""
    return [torch.cat([rows[1:], rows[:1] * 0]) for rows in record]


def layers_shifted(record: list[torch.Tensor]) -> list[torch.Tensor]:
    return [rows.roll(1, dims=1) for rows in record]


def of_another_model(record: list[torch.Tensor]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    random = [torch.rand(len(rows), LAYERS, EXPERTS, generator=generator).argsort(-1)[..., :TOP_K] for rows in record]
    return [
        torch.where(rows.eq(0).all(-1, keepdim=True), rows, other) for rows, other in zip(record, random, strict=True)
    ]


def one_answer_shifted(record: list[torch.Tensor]) -> list[torch.Tensor]:
    return [record[0], shifted(record[1:2])[0], *record[2:]]


def changed(value: int) -> Callable[[list[torch.Tensor]], list[torch.Tensor]]:
    def change(record: list[torch.Tensor]) -> list[torch.Tensor]:
        record[1][2, 0, 3] = value
        return record

    return change


def twice(record: list[torch.Tensor]) -> list[torch.Tensor]:
    record[1][2, :, 3] = record[1][2, :, 0]
    return record


def one_layer_missing(record: list[torch.Tensor]) -> list[torch.Tensor]:
    record[1][2, 1] = 0
    return record


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (shifted, r"not of this policy: in 4 of 4 sequences"),
        (layers_shifted, r"not of this policy: in 4 of 4 sequences"),
        (of_another_model, r"not of this policy: in 4 of 4 sequences"),
        (one_answer_shifted, r"not of this policy: in 1 of 4 sequences"),
        (
            lambda record: [rows[..., :2] for rows in record],
            r"of another model: it has 3 layers with 2 experts a token",
        ),
        (lambda record: [rows[:, :2] for rows in record], r"of another model: it has 2 layers with 4 experts"),
        (changed(EXPERTS), r"it has experts that are not there \(60 experts, 4 a token\)"),
        (twice, r"it has an expert twice for a token"),
        (one_layer_missing, r"it has tokens recorded in some layers only"),
        (lambda record: [rows * 0 for rows in record], r"none of the 42 tokens of this batch has its experts recorded"),
        (lambda record: None, r"this batch has no record of routing \(routed_experts\)"),
    ],
)
def test_a_record_that_is_not_this_policys_stops_the_step(
    group: None, qwen2: Path, spoil: Callable[[Any], Any], says: str
) -> None:
    """Before the optimizer's step; the same record unspoilt passes (above)."""
    engine = engine_of(qwen2)
    with pytest.raises(RoutingReplayError, match=says) as raised:
        step(engine, batch_of(spoil(exact(qwen2))))
    sentence = str(raised.value)
    assert "\n" not in sentence
    assert re.search(r"set it to False|set actor_rollout_ref\.rollout\.enable_rollout_routing_replay=False", sentence)
    assert engine._ascend_safe_replay is None


def test_a_shifted_record_changes_no_weight_in_a_whole_step(group: None, qwen2: Path) -> None:
    """verl's own step, with the optimizer's; the control is the same step with the record as it is."""
    engine = engine_of(qwen2)

    def weights() -> list[torch.Tensor]:
        return [parameter.full_tensor().detach().clone() for parameter in engine.module.parameters()]

    before = weights()
    with engine.train_mode(disable_auto_offload=True):
        with pytest.raises(RoutingReplayError, match="shifted by some tokens, and nothing was trained with it"):
            engine.train_batch(batch_of(shifted(exact(qwen2))), loss)
        assert all(torch.equal(one, other) for one, other in zip(before, weights(), strict=True))
        engine.train_batch(batch_of(exact(qwen2)), loss)
    assert not all(torch.equal(one, other) for one, other in zip(before, weights(), strict=True))


def test_later_updates_of_a_batch_use_the_record_though_the_router_has_moved_on(group: None, qwen2: Path) -> None:
    """Several epochs and mini-batches; the control is the next batch, whose record should be of these weights."""
    engine, data = engine_of(qwen2), batch_of(exact(qwen2))

    def log_probs() -> None:
        with engine.eval_mode(disable_auto_offload=True):
            engine.forward_backward_batch(data, None, forward_only=True)

    log_probs()
    step(engine, data)
    with torch.no_grad():
        for router in routers_of(engine.module):
            router.module.weight.copy_(-router.module.weight)
    output, found = step(engine, data)
    assert output["metrics"]["routing_replay/agreement"][0] < routing_replay.FLOOR
    _, native = step(engine, batch_of(None, replay=False))
    assert furthest(native, found) > 0.01
    with pytest.raises(RoutingReplayError, match="not of this policy"):
        log_probs()


def exact(folder: Path) -> list[torch.Tensor]:
    """The record of an engine that routes as the trainer does."""
    reference = plain_model(folder)
    found = [native_experts(reference, ids) for ids in sequences()]
    for rows in found:
        rows[-1] = 0
    return found


def test_an_exact_record_changes_nothing(group: None, model: Path) -> None:
    engine = engine_of(model)
    output, found = step(engine, batch_of(exact(model)))
    assert output["metrics"]["routing_replay/agreement"] == [1.0]
    assert output["metrics"]["routing_replay/cells_differed"] == [0.0]
    _, native = step(engine, batch_of(None, replay=False))
    assert furthest(native, found) < CLOSE


def test_a_record_of_other_lengths_is_refused() -> None:
    values = torch.zeros(20, LAYERS, TOP_K, dtype=torch.int16)
    nested = torch.nested.nested_tensor_from_jagged(values, offsets=torch.tensor([0, 9, 20]))
    with pytest.raises(RoutingReplayError, match=r"of \[9, 11\]... tokens, and the sequences have \[10, 10\]"):
        routing_replay.lay_out(nested, [10, 10], (1, 20), packed=True, padding=0)
    with pytest.raises(RoutingReplayError, match=r"of \[10, 10\]... tokens"):
        routing_replay.lay_out(values.view(2, 10, LAYERS, TOP_K), [9, 10], (2, 10), packed=False, padding=0)


def test_a_batch_of_equal_lengths_that_came_dense_is_laid_out_the_same() -> None:
    values = torch.randint(0, EXPERTS, (20, LAYERS, TOP_K), dtype=torch.int16)
    nested = torch.nested.nested_tensor_from_jagged(values, offsets=torch.tensor([0, 10, 20]))
    for packed, shape in ((True, (1, 20)), (False, (2, 10))):
        some = routing_replay.lay_out(nested, [10, 10], shape, packed, 0)
        other = routing_replay.lay_out(values.view(2, 10, LAYERS, TOP_K), [10, 10], shape, packed, 0)
        assert all(torch.equal(one, two) for one, two in zip(some, other, strict=True))


ULYSSES = """
import json, os, sys, torch
rank, port, folder, attention = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2")
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[5])
import verl
import test_routing_replay as test
from transformers import modeling_flash_attention_utils as flash

def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
    ends = cu_seqlens_q.tolist()
    one_by_one = [[x[a:b].transpose(0, 1) for x in (q, k, v)] for a, b in zip(ends, ends[1:])]
    attend = torch.nn.functional.scaled_dot_product_attention
    return torch.cat([attend(*qkv, is_causal=causal, scale=softmax_scale).transpose(0, 1) for qkv in one_by_one])

flash._lazy_imports = lambda *args, **kwargs: (None, varlen, None, flash._pad_input, flash._unpad_input)
torch.distributed.init_process_group("gloo")
engine = test.engine_of(folder, packed=True, checkpointing=True, ulysses_sequence_parallel_size=2)
for module in engine.module.modules():
    if hasattr(getattr(module, "config", None), "_attn_implementation"):
        module.config._attn_implementation = attention
record = test.records(folder)
output, found = test.step(engine, test.batch_of(record, packed=True))
_, native = test.step(engine, test.batch_of(record, packed=True, replay=False))
wanted = test.by_hand(folder, record)
metrics = {name: value[0] for name, value in output["metrics"].items() if name.startswith("routing_replay")}
gaps = {"replayed": test.furthest(found, wanted), "native": test.furthest(native, wanted)}
torch.distributed.destroy_process_group()
print(json.dumps({**gaps, **metrics}))
"""


def on_two_ranks(folder: Path, attention: str) -> list[tuple[str, str]]:
    """What ULYSSES prints on each of two ranks, and its errors."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    command = [sys.executable, "-c", textwrap.dedent(ULYSSES)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(port), str(folder), attention, str(Path(__file__).parent)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    return [rank.communicate(timeout=240) for rank in ranks]


def test_with_ulysses_the_gradients_are_those_computed_by_hand(qwen2: Path) -> None:
    """Two ranks, verl's all-to-alls over gloo, gradient checkpointing; flash attention's kernel is a stand-in, in
    plain torch."""
    said = on_two_ranks(qwen2, "flash_attention_2")
    assert all(out.rstrip().endswith("}") for out, _ in said), said
    ranks = [json.loads(out.splitlines()[-1]) for out, _ in said]
    for found in ranks:
        assert found["replayed"] < CLOSE < 0.01 < found["native"], ranks
    # Each has compared its own half of the tokens, of which those at an answer's end have no record.
    assert sum(found["routing_replay/tokens_without_record"] for found in ranks) == len(LENGTHS)
    recorded = sum(LENGTHS) - len(LENGTHS)
    assert sum(found["routing_replay/cells"] for found in ranks) == recorded * LAYERS


def test_with_ulysses_and_sdpa_each_rank_attends_to_its_own_tokens_only_and_the_step_is_stopped(qwen2: Path) -> None:
    """Why pre-flight refuses it: verl divides the tokens, and its all-to-alls are in flash attention only."""
    assert any("record of routing is not of this policy" in errors for _, errors in on_two_ranks(qwen2, "sdpa"))


OLD = """
import sys
sys.path[:0] = sys.argv[2:]
import torch, transformers
assert transformers.__version__ == "4.57.6", transformers.__version__
from transformers import AutoModelForCausalLM
from verl_ascend_rollout.integration.routing_replay import RoutingReplay, routers_of
reference = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="sdpa")
ids = torch.arange(5, 25).unsqueeze(0)
logits = reference(ids, output_router_logits=True).router_logits
native = torch.stack([one.topk(4).indices for one in logits], 1)
record = native.clone()
record[:, :, 1] = (native.max(-1).values + 1) % 60
record[-1] = 0
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="sdpa")
model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
model.train()
replay = RoutingReplay(model)
assert [router.layer for router in replay.routers] == [0, 1, 2]
replay.use(record.to(torch.int16), torch.zeros(20, dtype=torch.long), 1)
out = model(ids).logits[0].log_softmax(-1)
out[torch.arange(19), ids[0, 1:]].sum().backward()
found = replay.finish()
assert (found.tokens, found.native, found.cells) == (19, 1, 57), found

# By hand: the block's own experts, with the weights written out.
import types
def block(self, hidden, layer):
    flat = hidden.reshape(-1, hidden.shape[-1])
    scores = self.gate(flat)
    probabilities = scores.softmax(-1)
    own = scores.topk(4).indices
    rows = []
    for token, (told, mine) in enumerate(zip(record[:, layer], own)):
        chosen = mine if bool(told.eq(0).all()) else told
        weights = probabilities[token][chosen]
        if self.norm_topk_prob:
            weights = weights / weights.sum()
        one = flat[token:token + 1]
        rows.append(sum(weight * self.experts[int(expert)](one)[0] for weight, expert in zip(weights, chosen)))
    routed = torch.stack(rows)
    shared = torch.sigmoid(self.shared_expert_gate(flat)) * self.shared_expert(flat)
    return (routed + shared).reshape(hidden.shape), scores
for layer, one in enumerate(reference.model.layers):
    one.mlp.forward = types.MethodType(lambda self, hidden, layer=layer: block(self, hidden, layer), one.mlp)
out = reference(ids).logits[0].log_softmax(-1)
out[torch.arange(19), ids[0, 1:]].sum().backward()
for (name, mine), (_, wanted) in zip(model.named_parameters(), reference.named_parameters()):
    if wanted.grad is None:
        assert mine.grad is None or not mine.grad.any(), name
        continue
    torch.testing.assert_close(mine.grad, wanted.grad, rtol=2e-5, atol=5e-6, msg=lambda text: name + text)
print("RIGHT")
"""


def test_transformers_4_57_whose_blocks_pick_the_experts(qwen2: Path, old_transformers: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OLD, str(qwen2), *old_transformers], capture_output=True, text=True, timeout=240
    )
    assert "RIGHT" in done.stdout, done.stdout + done.stderr[-3000:]


@pytest.fixture(scope="module")
def old_transformers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """transformers 4.57.6 and the hub's client of its time, for the front of `sys.path`; skips without an index."""
    from verl_ascend_rollout.tools.doctor import wheels

    folder = tmp_path_factory.mktemp("transformers_4_57")
    for name, version in (("transformers", "4.57.6"), ("huggingface-hub", "0.36.0")):
        try:
            opened = wheels.get({name: version}, wheels.cache_folder(), say=False)
        except wheels.WheelError as error:
            pytest.skip(f"{name} {version} cannot be had to test with: {error}")
        opened.close()
        with zipfile.ZipFile(opened.wheels[0].path) as archive:
            archive.extractall(folder)
    return [str(folder)]
