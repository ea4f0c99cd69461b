"""A stream that is not this model's is refused in both passes, with the name of each wrong tensor, all in one error.

Beside it the controls: what looks odd, and is right, is taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from checkpoint_pair import Checkpoint, Tensors
from families import TAKEN_MERGED, TIED_HEADS
from loaded_model import LoadedModel, NamedTensor, differences
from specimen import Specimen, named, refusal

BF16 = ("bfloat16",)
TOGETHER = 6
"""How many tensors are wrong at once: an error may count the rest of a long list."""

EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"
MERGED = "model.layers.0.mlp.experts.gate_up_proj"

Change = Callable[[torch.Tensor], torch.Tensor]


def _needs(dimensions: int, change: Change) -> Callable[[torch.Tensor], torch.Tensor | None]:
    """The change, of tensors of that many dimensions and of more than one element."""
    return lambda tensor: change(tensor) if tensor.dim() >= dimensions and tensor.numel() > 1 else None


def _turned(tensor: torch.Tensor) -> torch.Tensor | None:
    return tensor.transpose(-1, -2).contiguous() if tensor.shape[-1] != tensor.shape[-2] else None


SHAPES: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "zero_size": lambda tensor: tensor.new_empty(0),
    "no_rows": _needs(1, lambda tensor: tensor[:0]),
    "one_element": _needs(1, lambda tensor: tensor.flatten()[:1]),
    "no_dimensions": _needs(1, lambda tensor: tensor.flatten()[0]),
    "half_of_the_rows": _needs(1, lambda tensor: tensor[: len(tensor) // 2]),
    "half_of_the_columns": _needs(2, lambda tensor: tensor[..., : tensor.shape[-1] // 2]),
    "one_row_less": _needs(1, lambda tensor: tensor[:-1]),
    "one_row_more": _needs(1, lambda tensor: torch.cat([tensor, tensor[:1]])),
    "one_column_more": _needs(2, lambda tensor: torch.cat([tensor, tensor[..., :1]], dim=-1)),
    "double_rows": _needs(1, lambda tensor: torch.cat([tensor, tensor])),
    "transposed": _needs(2, _turned),
    "flat": _needs(2, lambda tensor: tensor.flatten()),
    "one_dimension_more": _needs(1, lambda tensor: tensor[None]),
    "as_many_elements_in_other_rows": _needs(2, lambda tensor: tensor.reshape(2 * len(tensor), -1)),
}
DTYPES: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    str(dtype).removeprefix("torch."): lambda tensor, dtype=dtype: tensor.to(dtype)
    for dtype in (torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
}
MALFORMED = {**SHAPES, **DTYPES}

HARD = ("qwen3_moe", "llama_bias", "phi3", "gpt_oss", "granitemoe", "jamba", "deepseek_v3")
"""Families in which a wrong tensor meets different loaders: experts, biases and a padded vocabulary, fused projections,
merged experts that are copied by slices, a loader that collects first, convolutions and A_log, latent attention."""


def _kinds(tensors: Tensors) -> list[str]:
    """One name of each kind: of those that differ only in numbers the last, so the last layer and the last expert."""
    return list({re.sub(r"\d+", "N", name): name for name in sorted(tensors)}.values())


def _replaced(tensors: Tensors, wrong: Tensors) -> list[NamedTensor]:
    return list({**tensors, **wrong}.items())


def _both_passes(
    specimen: Specimen, good: Iterable[NamedTensor], bad: list[NamedTensor], names: Iterable[str], verify: str = "first"
) -> list[str]:
    """What is wrong with the answers to a bad stream: through the model's loader, and where it could be replayed.

    Args:
        specimen: the model.
        good: a whole stream, which makes the next one a later sync.
        bad: the stream to be refused.
        names: of the tensors that are wrong in it; the answer names all of them, and none that is right.
        verify: the user's option.
    """
    found = []
    good, names = list(good), set(names)
    right = {name for name, _ in bad} - names
    for when in ("first sync", "after a good sync"):
        specimen.loaded.start_over()
        if when == "after a good sync":
            specimen.loaded.sync(good)
        said = refusal(lambda: specimen.loaded.sync(bad, verify=verify))
        unnamed, too_many = sorted(names - named(said)), sorted(right & named(said))
        if unnamed:
            found.append(f"{when}: {', '.join(unnamed)} not in: {said or '(accepted)'}")
        elif too_many:
            found.append(
                f"{when}: {', '.join(too_many)}, which {'is' if len(too_many) == 1 else 'are'} right, in: {said}"
            )
    return found


@pytest.mark.specimens(HARD, BF16)
@pytest.mark.parametrize("malformed", MALFORMED)
def test_wrong_tensors_of_every_kind_are_named_in_one_error(specimen: Specimen, malformed: str) -> None:
    a, b = specimen.pair.a.published, specimen.pair.b.published
    made = {name: MALFORMED[malformed](b[name]) for name in _kinds(b)}
    wrong = {name: tensor for name, tensor in made.items() if tensor is not None and _differs(tensor, b[name])}
    if specimen.pair.family.name == "granitemoe" and malformed == "one_dimension_more":
        # vLLM's loader takes the experts out of it as out of the right one, and puts each where it belongs.
        wrong = {name: tensor for name, tensor in wrong.items() if not name.endswith("output_linear.weight")}
    assert wrong
    found = []
    names = list(wrong)
    for first in range(0, len(names), TOGETHER):
        some = names[first : first + TOGETHER]
        bad = _replaced(b, {name: wrong[name] for name in some})
        found += _both_passes(specimen, a.items(), bad, some)
    assert not found, f"{specimen.name}, {malformed}:\n" + "\n".join(found)


def _differs(tensor: torch.Tensor, right: torch.Tensor) -> bool:
    return tensor.shape != right.shape or tensor.dtype != right.dtype


@pytest.mark.specimens(("qwen3_moe", "llama_bias"), BF16)
@pytest.mark.parametrize("malformed", MALFORMED)
def test_one_wrong_tensor_by_itself_is_named_and_the_next_whole_sync_is_right(
    specimen: Specimen, malformed: str
) -> None:
    a, b = specimen.pair.a.published, specimen.pair.b.published
    found = []
    for name in _kinds(b):
        tensor = MALFORMED[malformed](b[name])
        if tensor is not None and _differs(tensor, b[name]):
            found += _both_passes(specimen, a.items(), _replaced(b, {name: tensor}), [name])
    specimen.loaded.sync(b.items())
    assert not specimen.unlike_fresh("B")
    assert not found, f"{specimen.name}, {malformed}:\n" + "\n".join(found)


EXPERTS: dict[str, Change] = {
    "an_expert_less": lambda tensor: tensor[:-1],
    "an_expert_more": lambda tensor: torch.cat([tensor, tensor[:1]]),
    "nan": lambda tensor: _with_one(tensor, float("nan")),
    "fp32_beyond_bf16": lambda tensor: _with_one(tensor.float(), 3.4e38),
}


@pytest.mark.specimens(("qwen3_moe",), BF16)
@pytest.mark.parametrize("malformed", [*MALFORMED, *EXPERTS])
def test_merged_experts_that_are_wrong_are_named_as_they_were_sent(specimen: Specimen, malformed: str) -> None:
    a, b = specimen.pair.a.state_dict, specimen.pair.b.state_dict
    names = [MERGED, MERGED.replace("gate_up", "down").replace("layers.0", "layers.1")]
    made = {name: {**MALFORMED, **EXPERTS}[malformed](b[name]) for name in names}
    wrong = {name: tensor for name, tensor in made.items() if tensor is not None}
    found = _both_passes(specimen, a.items(), _replaced(b, wrong), wrong, verify="always")
    assert not found, f"{specimen.name}, {malformed}:\n" + "\n".join(found)


@pytest.mark.specimens(sorted(TAKEN_MERGED), BF16)
def test_merged_experts_that_are_left_out_are_named_as_they_are_sent(specimen: Specimen) -> None:
    a, b = specimen.pair.a.state_dict, specimen.pair.b.state_dict
    found = []
    specimen.loaded.start_over()
    for name in [name for name in _kinds(b) if name.endswith((".gate_up_proj", ".down_proj"))]:
        specimen.loaded.sync(a.items())
        without = [pair for pair in b.items() if pair[0] != name]
        for when in ("after a good sync", "after a failed sync"):
            said = refusal(lambda without=without: specimen.loaded.sync(without))
            if named(said) & b.keys() != {name}:
                found.append(f"{name} left out {when}: {said or '(accepted)'}")
    assert not found, f"{specimen.name}:\n" + "\n".join(found)


@pytest.mark.specimens(("qwen3_moe", "mixtral", "olmoe"), BF16)
def test_experts_of_which_a_rank_sends_its_half_are_refused_sync_after_sync(specimen: Specimen) -> None:
    """A tensor-parallel trainer that forgot to gather: every expert comes with half of its rows."""

    def half(checkpoint: Checkpoint) -> list[NamedTensor]:
        shard = re.compile(r"\.experts\.\d+\.(gate_proj|up_proj|w1|w3)\.")
        tensors = checkpoint.published.items()
        return [(name, tensor[: len(tensor) // 2] if shard.search(name) else tensor) for name, tensor in tensors]

    specimen.loaded.start_over()
    for number, which in enumerate("BAB", 1):
        said = refusal(lambda which=which: specimen.loaded.sync(half(specimen.pair[which]), verify="always"))
        assert ".experts." in said, f"{specimen.name}, sync {number}: {said or 'accepted'}"
    specimen.loaded.sync(specimen.pair.b.published.items())
    assert not specimen.unlike_fresh("B")


def _unknown(tensors: Tensors) -> dict[str, Tensors]:
    """What a Qwen3-MoE does not have, by a word for it."""
    experts = 1 + max(int(name.split(".experts.")[1].split(".")[0]) for name in tensors if ".experts." in name)
    one = torch.ones(1, dtype=torch.bfloat16)
    layer = {name: tensor for name, tensor in tensors.items() if ".layers.1." in name and ".experts." not in name}
    return {
        "an_expert": {EXPERT.replace(".3.", f".{experts}."): tensors[EXPERT]},
        "all_tensors_of_an_expert": {
            EXPERT.replace(".3.up", f".{experts}.{part}"): tensors[EXPERT.replace("up", part)]
            for part in ("gate", "up", "down")
        },
        "a_bias_of_the_head": {"lm_head.bias": torch.ones(500, dtype=torch.bfloat16)},
        "a_bias_of_q": {QUERY.replace("weight", "bias"): torch.ones(128, dtype=torch.bfloat16)},
        "a_bias_of_a_norm": {NORM.replace("weight", "bias"): torch.ones(128, dtype=torch.bfloat16)},
        "a_bias_of_an_expert": {EXPERT.replace("weight", "bias"): torch.ones(64, dtype=torch.bfloat16)},
        "a_scale_of_the_kv_cache": {QUERY.replace("q_proj.weight", "k_proj.k_scale"): one},
        "a_scale_of_a_weight": {f"{QUERY}_scale": one, f"{EXPERT}_scale_inv": one},
        "a_bias_of_the_router": {"model.layers.0.mlp.gate.e_score_correction_bias": torch.ones(8)},
        "a_layer": {name.replace("layers.1", "layers.2"): layer[name] for name in list(layer)[:TOGETHER]},
        "an_adapter": {QUERY.replace("weight", "lora_A.weight"): torch.ones(8, 128, dtype=torch.bfloat16)},
        "a_wrapper": {f"_fsdp_wrapped_module.{NORM}": tensors[NORM], f"module.{QUERY}": tensors[QUERY]},
        "something_else": {"critic.score.weight": one, "model.rotary": one},
        "a_value_head": {"v_head.summary.weight": torch.ones(1, 128, dtype=torch.bfloat16)},
    }


UNKNOWN = (
    *("an_expert", "all_tensors_of_an_expert", "a_bias_of_the_head", "a_bias_of_q", "a_bias_of_a_norm"),
    *("a_bias_of_an_expert", "a_scale_of_the_kv_cache", "a_scale_of_a_weight", "a_bias_of_the_router", "a_layer"),
    *("an_adapter", "a_wrapper", "something_else", "a_value_head"),
)


@pytest.mark.specimens(("qwen3_moe",), BF16)
@pytest.mark.parametrize("what", UNKNOWN)
def test_what_the_model_does_not_have_is_named(specimen: Specimen, what: str) -> None:
    b = specimen.pair.b.published
    extra = _unknown(b)[what]
    found = _both_passes(specimen, specimen.pair.a.published.items(), [*b.items(), *extra.items()], extra)
    assert not found, f"{specimen.name}, {what}:\n" + "\n".join(found)


@pytest.mark.specimens(("qwen3_moe", "llama_bias", "granitemoe", "jamba"), BF16)
def test_a_name_that_comes_twice_is_named(specimen: Specimen) -> None:
    b = specimen.pair.b.published
    for name in _kinds(b):
        found = _both_passes(specimen, specimen.pair.a.published.items(), [*b.items(), (name, b[name])], [name])
        assert not found, f"{specimen.name}:\n" + "\n".join(found)


@pytest.mark.specimens(("qwen3_moe", "deepseek_v2"), BF16)
def test_experts_that_come_merged_and_one_by_one_are_named(specimen: Specimen) -> None:
    a, b = specimen.pair.a, specimen.pair.b
    merged = [name for name in b.state_dict if name not in b.published and name.endswith("gate_up_proj")][-1:]
    extra = [(name, b.state_dict[name]) for name in merged]
    for good in (a.published, a.state_dict):
        for bad in ([*b.published.items(), *extra], [*extra, *b.published.items()]):
            specimen.loaded.start_over()
            for when in ("first sync", "after a good sync"):
                said = refusal(lambda bad=bad: specimen.loaded.sync(bad))
                assert merged[0].removesuffix("gate_up_proj") in said, f"{specimen.name}, {when}: {said or 'accepted'}"
                specimen.loaded.sync(good.items())


@pytest.mark.specimens(("qwen3_moe", "granitemoe", "llama_bias"), BF16)
def test_several_things_wrong_are_all_in_one_error(specimen: Specimen) -> None:
    a, b = specimen.pair.a.published, specimen.pair.b.published
    left_out, short, integer, twice, nan = [name for name in _kinds(b) if b[name].dim() >= 1][:5]
    wrong = {
        short: b[short][: len(b[short]) // 2],
        integer: b[integer].to(torch.int64),
        nan: torch.full_like(b[nan], float("nan")),
    }
    bad = [(name, tensor) for name, tensor in _replaced(b, wrong) if name != left_out]
    bad += [(twice, b[twice]), ("model.unknown.weight", b[twice])]
    names = [left_out, short, integer, twice, nan, "model.unknown.weight"]
    specimen.loaded.start_over()
    for when in ("after a good sync", "after a failed sync"):
        if when == "after a good sync":
            specimen.loaded.sync(a.items(), verify="always")
        said = refusal(lambda: specimen.loaded.sync(bad, verify="always"))
        unnamed = sorted(set(names) - named(said))
        assert not unnamed, f"{specimen.name}, {when}: {unnamed} not in: {said or '(accepted)'}"


@pytest.mark.specimens(("qwen3_moe", "llama_bias"), BF16)
@pytest.mark.parametrize("malformed", ["half_of_the_rows", "double_rows", "zero_size", "int8", "bool", "float8_e4m3fn"])
def test_verify_off_lets_no_wrong_tensor_pass(specimen: Specimen, malformed: str) -> None:
    a, b = specimen.pair.a.published, specimen.pair.b.published
    names = _kinds(b)[:TOGETHER]
    wrong = {name: MALFORMED[malformed](b[name]) for name in names}
    found = _both_passes(specimen, a.items(), _replaced(b, wrong), names, verify="off")
    assert not found, f"{specimen.name}, {malformed}:\n" + "\n".join(found)


@pytest.mark.specimens(("qwen3_moe", "llama_bias", "granitemoe"), BF16)
def test_verify_off_lets_nothing_be_left_out_or_added(specimen: Specimen) -> None:
    a, b = specimen.pair.a.published, specimen.pair.b.published
    found = _both_passes(specimen, a.items(), [*b.items(), ("foo.weight", b[NORM])], ["foo.weight"], verify="off")
    specimen.loaded.sync(a.items(), verify="off")
    for name in _kinds(b):
        without = [pair for pair in b.items() if pair[0] != name]
        said = refusal(lambda without=without: specimen.loaded.sync(without, verify="off"))
        if name not in named(said):
            found.append(f"{name} left out: {said or '(accepted)'}")
    assert not found, f"{specimen.name}:\n" + "\n".join(found)


# --------------------------------------------------------------------------------------------------------------------
# values


def _with_one(tensor: torch.Tensor, value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1] = value
    return changed


VALUES: dict[str, Change] = {
    "nan": lambda tensor: _with_one(tensor, float("nan")),
    "inf": lambda tensor: _with_one(tensor, float("inf")),
    "minus_inf": lambda tensor: _with_one(tensor, float("-inf")),
    "fp32_beyond_bf16": lambda tensor: _with_one(tensor.float(), 3.4e38),
}
BEYOND_FP16: dict[str, Change] = {
    "bf16_beyond_fp16": lambda tensor: _with_one(tensor, 70000.0),
    "fp32_beyond_fp16": lambda tensor: _with_one(tensor.float(), -70000.0),
}


@pytest.mark.specimens(("qwen3_moe", "llama_bias", "granitemoe", "gpt_oss", "mamba2"), BF16)
@pytest.mark.parametrize("value", VALUES)
def test_one_value_that_is_not_finite_is_named(specimen: Specimen, value: str) -> None:
    _values(specimen, VALUES[value])


@pytest.mark.specimens(("qwen3_moe", "llama_bias", "granitemoe"), ("float16",))
@pytest.mark.parametrize("value", [*VALUES, *BEYOND_FP16])
def test_one_value_that_is_not_finite_in_an_fp16_engine_is_named(specimen: Specimen, value: str) -> None:
    _values(specimen, {**VALUES, **BEYOND_FP16}[value])


def _values(specimen: Specimen, change: Change) -> None:
    a, b = specimen.pair.a.published, specimen.pair.b.published
    # What the engine keeps in fp32 has room for more, and what it computes from a value may not.
    names = [name for name in _kinds(b) if not re.search(r"A_log|dt_bias|\.D$|correction_bias", name)][-TOGETHER:]
    bad = _replaced(b, {name: change(b[name]) for name in names})
    found = _both_passes(specimen, a.items(), bad, names, verify="always")
    assert not found, f"{specimen.name}:\n" + "\n".join(found)


@pytest.mark.specimens(("qwen3_moe",), BF16)
def test_verify_first_looks_at_the_values_until_a_sync_has_passed_and_again_after_a_failure(specimen: Specimen) -> None:
    b = specimen.pair.b.published
    nan = _replaced(b, {NORM: _with_one(b[NORM], float("nan"))})
    specimen.loaded.start_over()
    assert refusal(lambda: specimen.loaded.sync(list(b.items())[1:]))
    assert NORM in named(refusal(lambda: specimen.loaded.sync(nan)))
    specimen.loaded.sync(b.items())
    assert refusal(lambda: specimen.loaded.sync(list(b.items())[1:]))
    assert NORM in named(refusal(lambda: specimen.loaded.sync(nan)))


# --------------------------------------------------------------------------------------------------------------------
# controls


@pytest.mark.specimens(("qwen3_moe", "llama_bias"), ("bfloat16", "float16"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_are_cast_as_a_fresh_load_casts_them(specimen: Specimen, dtype: torch.dtype, tmp_path: Path) -> None:
    """A trainer's own values, which the engine's dtype rounds: not bf16 ones in wider memory."""
    noise = torch.Generator().manual_seed(3)
    tensors = {
        name: (tensor.float() + torch.randn(tensor.shape, generator=noise) * 1e-3).to(dtype)
        for name, tensor in specimen.pair.b.published.items()
    }
    fresh = LoadedModel(specimen.pair.b.written(tensors, tmp_path), specimen.dtype).state()
    specimen.loaded.start_over()
    for number in (1, 2):
        specimen.loaded.sync(tensors.items(), verify="always")
        unlike = differences(specimen.loaded.state(), fresh)
        assert not unlike, f"{specimen.name}, {dtype}, sync {number}: {unlike[:4]}"
        specimen.loaded.sync(specimen.pair.a.published.items())


@pytest.mark.specimens(("qwen3_moe", "llama_tied", "qwen2_moe", "phi3"), BF16)
def test_inverse_frequencies_of_old_checkpoints_are_taken(specimen: Specimen) -> None:
    frequencies = [(f"model.layers.{layer}.self_attn.rotary_emb.inv_freq", torch.ones(16)) for layer in (0, 1)]
    specimen.loaded.start_over()
    for which in "BAB":
        specimen.loaded.sync([*specimen.pair[which].published.items(), *frequencies], verify="always")
        assert not specimen.unlike_fresh(which)


@pytest.mark.specimens(TIED_HEADS, BF16)
def test_a_tied_head_is_taken_beside_its_embedding_and_refused_where_it_is_another(specimen: Specimen) -> None:
    a, b = specimen.pair.a, specimen.pair.b
    head = b.state_dict["lm_head.weight"]
    specimen.loaded.start_over()
    for which in "BAB":
        stream = [
            *specimen.pair[which].published.items(),
            ("lm_head.weight", specimen.pair[which].state_dict["lm_head.weight"]),
        ]
        for order in (stream, stream[::-1]):
            specimen.loaded.sync(order, verify="always")
            assert not specimen.unlike_fresh(which)
    embedding = next(name for name, tensor in b.published.items() if tensor.equal(head))
    other = [*b.published.items(), ("lm_head.weight", a.state_dict["lm_head.weight"])]
    for when in ("after a good sync", "after a failed sync"):
        said = refusal(lambda: specimen.loaded.sync(other))
        assert "lm_head.weight" in said or embedding in said, f"{specimen.name}, {when}: {said or 'accepted'}"
