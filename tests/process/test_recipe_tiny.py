"""The demo's parts, without Ray and without an engine: the toy model and data, the reward, the summary, the clean-up.

The numbers in the metrics and events here are made up for the tests; a real run is tests/e2e's business.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import string
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "grpo_tiny_cpu"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"grpo_tiny_cpu_{name}", RECIPE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


make_tiny, reward, demo = _load("make_tiny"), _load("reward"), _load("demo")


# make_tiny ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    make_tiny.make(folder, seed=0, train=64, val=8)
    return folder


def _files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_same_seed_same_files_and_another_seed_another_model(toy: Path, tmp_path: Path) -> None:
    make_tiny.make(tmp_path / "again", seed=0, train=64, val=8)
    make_tiny.make(tmp_path / "other", seed=1, train=64, val=8)
    first, again, other = _files(toy), _files(tmp_path / "again"), _files(tmp_path / "other")
    assert again == first
    assert {name for name in first if other[name] != first[name]} == {
        "model/model.safetensors",
        "train.parquet",
        "val.parquet",
    }


def test_model_loads_whole_in_transformers_and_has_the_shape_of_qwen1_5_moe(toy: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        toy / "model", output_loading_info=True, attn_implementation="sdpa"
    )
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    config = model.config
    assert (config.num_experts, config.num_experts_per_tok, config.tie_word_embeddings) == (60, 4, False)
    assert config.rope_parameters["rope_theta"] == 1e6
    assert model.dtype == torch.bfloat16
    # The first policy is near uniform: no token far from 1/vocabulary, and yet not all alike.
    with torch.no_grad():
        probabilities = model(torch.arange(5, 37)[None]).logits.float().softmax(-1)
    assert probabilities.max() < 10 / config.vocab_size
    assert probabilities.std() > 0.1 / config.vocab_size


def test_tokenizer_has_as_many_tokens_as_the_model_and_one_a_character(toy: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(toy / "model")
    assert len(tokenizer) == json.loads((toy / "model" / "config.json").read_text())["vocab_size"] == 96
    text = "user 0123456789\nabc XYZ ~"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert len(tokens) == len(text)
    assert tokenizer.unk_token_id not in tokens
    assert tokenizer.decode(tokens) == text
    special = tokenizer.convert_tokens_to_ids(list(make_tiny.SPECIAL))
    assert sorted(special) == [0, 1, 2, 3, 4]
    assert tokenizer.decode([*special, *tokens[:4]], skip_special_tokens=True) == "user"
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<eos>")


def test_prompts_have_verls_format_fit_and_do_not_contain_the_answer(toy: Path) -> None:
    transformers = pytest.importorskip("transformers")
    parquet = pytest.importorskip("pyarrow.parquet")
    tokenizer = transformers.AutoTokenizer.from_pretrained(toy / "model")
    for split, count in (("train", 64), ("val", 8)):
        rows = parquet.read_table(toy / f"{split}.parquet").to_pylist()
        assert len(rows) == count
        for index, row in enumerate(rows):
            assert set(row) == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
            assert row["extra_info"] == {"index": index, "split": split}
            assert row["reward_model"] == {"style": "rule", "ground_truth": "16"}
            rendered = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
            assert not set(rendered) & set(string.digits)
            assert rendered.endswith("<|im_start|>assistant\n")
            tokens = tokenizer.encode(rendered, add_special_tokens=False)
            assert tokenizer.unk_token_id not in tokens
            assert len(tokens) <= 48  # run.sh allows 64


def test_make_tiny_says_where_it_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert make_tiny.main([str(tmp_path / "file" / "toy")]) == 1
    assert "cannot write to" in capsys.readouterr().err


# reward -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "score"),
    [("", 0.0), ("abcdefgh", 0.0), ("12ab", 0.125), ("7", 1 / 16), ("0" * 16, 1.0), ("0" * 40, 1.0), ("٣" * 16, 0.0)],
)
def test_reward_is_the_share_of_digits(response: str, score: float) -> None:
    assert reward.compute_score("tiny_digits", response, "16", {"index": 0}, reward_router_address=None) == score


@pytest.mark.parametrize("truth", ["", "x", "0", "-3", None])
def test_reward_refuses_a_ground_truth_that_is_no_count(truth: Any) -> None:
    with pytest.raises(ValueError, match="number of digits"):
        reward.compute_score("tiny_digits", "123", truth)


# summary ------------------------------------------------------------------------------------------------------------


def _metrics(step: int, score: float, pearson: float | None = 0.999, **changes: Any) -> str:
    data = {
        "critic/score/mean": score,
        "training/rollout_actor_probs_pearson_corr": pearson,
        "timing_s/step": 10.0 + step,
        "timing_s/gen": 2.0 * step,
        "timing_s/old_log_prob": 1.0,
        "timing_s/adv": 0.5,
        "timing_s/update_actor": 3.0,
        "timing_s/update_weights": 4.0,
        **changes,
    }
    return json.dumps({"step": step, "data": data})


VALIDATION = json.dumps({"step": 0, "data": {"val-core/tiny_digits/acc/mean@1": 0.1}})
VERSIONS = {"verl": "0.9.1"}


def _event(step: str, before: int | None, after: int | None) -> dict[str, Any]:
    return {"step": step, "process": "worker", "seconds": 0.1, "bytes_before": before, "bytes_after": after}


def _sync(pid: int, path: str) -> dict[str, Any]:
    return {**_event("sync", None, None), "pid": pid, "detail": {"path": path}}


def _summary(lines: list[str], events: list[dict[str, Any]] | None = None, first: float | None = 95.0) -> Any:
    return demo.summarise(
        demo.read_steps(lines),
        events or [],
        seconds_total=200.0,
        seconds_to_first_line=first,
        versions=VERSIONS,
        phases={"training": 80.123},
    )


def test_summary_of_a_metrics_file(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    torn = _metrics(4, 0.9)[:40]
    rows = [VALIDATION, _metrics(1, 0.1), _metrics(2, 0.3, 0.995), _metrics(3, 0.6, 0.998), torn]
    file.write_text("\n".join(rows))
    events = [
        _event("free", 1000, 0),
        _event("free", 0, 0),  # a second free: nothing to do
        *(_sync(pid, path) for path in ("loader", "replay", "replay") for pid in (7, 8)),
        _event("init", 0, 1000),
        _event("init", 1000, 1000),  # a second init
        _event("free", 1000, 10),
        _event("init", 10, 1000),
    ]
    assert _summary(file.read_text().splitlines(), events) == {
        "steps": 3,
        "seconds_total": 200.0,
        "seconds_to_first_step": 84.0,  # 95 less the first step's own 11
        "seconds_per_step": {"generate": 4.0, "sync": 4.0, "train": 4.5},
        "reward_first": 0.1,
        "reward_last": 0.6,
        "pearson_min": 0.995,
        "kv_bytes_freed": 990,
        "kv_bytes_restored": 990,
        "sleep_bytes_freed": None,
        "sync_paths": "loader, 2 replay",
        "versions": VERSIONS,
        "phases": {"training": 80.12},
    }


def test_summary_of_a_run_that_did_nothing() -> None:
    summary = _summary([], first=None)
    assert summary["steps"] == 0
    assert summary["seconds_per_step"] == {"generate": None, "sync": None, "train": None}
    for key in ("seconds_to_first_step", "reward_first", "reward_last", "pearson_min", "kv_bytes_freed"):
        assert summary[key] is None
    assert "stopped after 0 of 3 steps" in demo.verdict(summary, 3)
    assert all(isinstance(line, str) for line in demo.report(summary))


def test_a_free_that_gave_nothing_back_shows_as_zero() -> None:
    assert demo.kv_bytes([_event("free", 1000, 0), _event("free", 1000, 1000), _event("init", 0, 0)]) == (0, 0)


GOOD = [_metrics(1, 0.1), _metrics(2, 0.3), _metrics(3, 0.5)]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (GOOD, None),
        (GOOD[:2], "stopped after 2 of 3"),
        ([*GOOD[:2], _metrics(3, 0.13)], "0.100 to 0.130"),
        ([*GOOD[:2], _metrics(3, 0.05)], "0.100 to 0.050"),
        ([GOOD[0], _metrics(2, 0.3, 0.4), GOOD[2]], "fell to 0.4000"),
        ([GOOD[0], _metrics(2, 0.3, None), GOOD[2]], "missing in at least one step"),
        ([GOOD[0], _metrics(2, 0.3, float("nan")), GOOD[2]], "missing in at least one step"),
        ([*GOOD[:2], _metrics(3, 0.5, **{"critic/score/mean": None})], "no critic/score/mean"),
    ],
)
def test_verdict(lines: list[str], problem: str | None) -> None:
    found = demo.verdict(_summary(lines), 3)
    if problem is None:
        assert found is None
    else:
        assert problem in found


def test_wanted_gain_grows_with_the_steps_and_stays_possible() -> None:
    assert demo.reward_gain_wanted(3) == pytest.approx(0.04)
    assert demo.reward_gain_wanted(12) == demo.reward_gain_wanted(100) == 0.2


def test_last_error_is_the_cause_without_rays_prefix() -> None:
    log = (
        "\x1b[36m(TaskRunnerV1 pid=71)\x1b[0m starting\n"
        "\x1b[36m(TaskRunnerV1 pid=71)\x1b[0m RuntimeError: no place for it\n"
        "Exception ignored in: <function>\nbye\r\n"
    )
    assert demo.last_error(log) == "RuntimeError: no place for it"
    assert demo.log_tail(log, lines=1) == ["bye"]
    assert demo.last_error("all is well\n") is None
    assert demo.last_error("ValueError: first\nascend_safe: no model there\n") == "no model there"


def test_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    demo.plot(demo.read_steps([*GOOD, _metrics(4, 0.6, None)]), tmp_path / "reward.png")
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")


def test_memory_is_drawn_where_the_rollout_wrote_events(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert not demo.plot_memory(tmp_path)  # the stock rollout
    event = {"step": "free", "process": "worker", "seconds": 0.1, "bytes_before": 1 << 28, "bytes_after": 0}
    lines = [json.dumps(event | {"time": at, "pid": 7, "host": "a"}) for at in (10.0, 20.0)]
    (tmp_path / "events.jsonl").write_text("\n".join([*lines, '{"step": "fr']))
    assert demo.plot_memory(tmp_path)
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_versions_name_what_took_part() -> None:
    versions = demo.versions()
    assert set(versions) == {"python", "verl", "vllm", "torch", "ray", "transformers", "verl_ascend_rollout"}
    assert versions["python"] == ".".join(str(part) for part in sys.version_info[:3])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--steps", "2"], "--steps"),
        (["--steps", "many"], "--steps"),
        (["--steps", "1000"], "--steps"),
        (["--seed", "-1"], "--seed"),
        (["--timeout", "0"], "--timeout"),
        (["--rollout", "sglang"], "--rollout"),
        (["--tp", "3"], "--tp"),
        (["--colour"], "--colour"),
    ],
)
def test_bad_arguments_exit_with_2(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        demo.parse(arguments)
    assert exit_.value.code == 2
    assert word in capsys.readouterr().err


def test_output_folder_that_is_a_file_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as exit_:
        demo.parse(["--out", str(tmp_path / "file")])
    assert exit_.value.code == 2
    assert "no folder can be made there" in capsys.readouterr().err


# the whole script, with a stand-in for run.sh -----------------------------------------------------------------------


def _recipe_with(folder: Path, run: str) -> Path:
    """A copy of the demo, less patient, whose run.sh is `run`, a Python program."""
    folder.mkdir()
    source = (RECIPE / "demo.py").read_text()
    assert "\nHERE = " in source
    hasty = "\nfrom verl_ascend_rollout.tools import supervisor\nsupervisor.LEFTOVER = 0.5\nHERE = "
    (folder / "demo.py").write_text(source.replace("\nHERE = ", hasty))
    shutil.copy(RECIPE / "make_tiny.py", folder)
    (folder / "run.py").write_text(run)
    (folder / "run.sh").write_text(f'exec "$PYTHON" "{folder}/run.py" "$@"\n')
    return folder / "demo.py"


def _start(script: Path, out: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(script), "--out", str(out), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "MPLBACKEND": "Agg"},
    )


WRITE_METRICS = f"""
import os, sys, time
print("ray init kwargs: ...", flush=True)
lines = {[_metrics(step, 0.1 * step) for step in (1, 2, 3)]!r}
for line in lines:
    with open(os.environ["VERL_FILE_LOGGER_PATH"], "a") as stream:
        stream.write(line + "\\n")
    time.sleep(0.1)
"""


def test_a_good_run_ends_with_0_a_summary_and_a_plot(tmp_path: Path) -> None:
    script = _recipe_with(tmp_path / "recipe", WRITE_METRICS)
    process = _start(script, tmp_path / "out", "--steps", "3")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stdout + stderr
    assert "starting Ray" in stdout
    assert "step  3/3  reward 0.300" in stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["steps"], summary["reward_last"]) == (3, pytest.approx(0.3))
    assert (summary["rollout"], summary["tensor_parallel"], summary["problem"]) == ("ascend_safe", 1, None)
    assert list(summary["phases"]) == ["importing verl", "starting Ray"]
    assert (tmp_path / "out" / "reward.png").exists()


OWN_RAY = "++ray_kwargs.ray_init.address=local"
"""Without it the demo would join a cluster that somebody has started on this machine."""


def test_what_hides_vllm_is_shown_and_can_be_left(tmp_path: Path) -> None:
    said = "import sys; print('import fix: ./vllm hides it', sys.argv[1:], flush=True)\nsys.exit(1)\n"
    script = _recipe_with(tmp_path / "recipe", said)
    stdout, _ = _start(script, tmp_path / "out").communicate(timeout=120)
    assert f"import fix: ./vllm hides it ['{OWN_RAY}']" in stdout
    stdout, _ = _start(script, tmp_path / "out", "--no-import-fix").communicate(timeout=120)
    assert f"import fix: ./vllm hides it ['--no-import-fix', '{OWN_RAY}']" in stdout


def test_a_failed_run_ends_with_1_one_sentence_and_the_end_of_the_log(tmp_path: Path) -> None:
    script = _recipe_with(tmp_path / "recipe", 'print("before"); raise RuntimeError("no place for the engine")')
    process = _start(script, tmp_path / "out")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 1, stdout + stderr
    sentence = stderr.strip().splitlines()[-1]
    assert sentence.startswith(
        "demo: training stopped with exit code 1 after 0 of 12 steps: RuntimeError: no place for the engine"
    )
    assert "before" in stderr
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["problem"] in sentence


def test_the_control_runs_verls_own_rollout_on_as_many_devices(tmp_path: Path) -> None:
    script = _recipe_with(tmp_path / "recipe", "import os, sys; print(sys.argv[1:], os.environ['DEVICES'])")
    process = _start(script, tmp_path / "out", "--rollout", "vllm", "--tp", "2")
    process.communicate(timeout=120)
    assert f"['rollout=vllm', '{OWN_RAY}'] 2" in (tmp_path / "out" / "train.log").read_text()


def test_a_run_that_takes_too_long_ends_with_1(tmp_path: Path) -> None:
    script = _recipe_with(tmp_path / "recipe", "import time; time.sleep(600)")
    process = _start(script, tmp_path / "out", "--timeout", "1")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "did not end within 1 s" in stderr.splitlines()[-1]


# What Ray and vLLM do to a clean-up: a daemon in a session of its own whose parent has ended, which does not listen to
# SIGTERM and holds a shared-memory segment.
LEAVE_ORPHANS = """
import os, signal, subprocess, sys, time
daemon = '''
import mmap, os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
name = "/dev/shm/ascend_safe_test_" + str(os.getpid())
with open(name, "w+b") as stream:
    stream.truncate(4096)
    mapped = mmap.mmap(stream.fileno(), 4096)
with open(sys.argv[1], "w") as stream:
    stream.write(str(os.getpid()) + " " + name)
time.sleep(600)
'''
note = os.path.join(os.environ["OUT"], "orphan")
middle = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1], sys.argv[2]], " \\
    "start_new_session=True)"
subprocess.run([sys.executable, "-c", middle, daemon, note], check=True)
while not os.path.exists(note) or not open(note).read():
    time.sleep(0.05)
open(os.path.join(os.environ["OUT"], "ready"), "w").close()
END
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/shm and child subreapers are Linux's")
@pytest.mark.parametrize("number", [None, signal.SIGTERM], ids=["crash", "SIGTERM"])
def test_nothing_is_left_behind(tmp_path: Path, number: signal.Signals | None) -> None:
    end = "time.sleep(600)" if number is not None else "time.sleep(0.5); sys.exit(3)"
    script = _recipe_with(tmp_path / "recipe", LEAVE_ORPHANS.replace("END", end))
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    process = _start(script, tmp_path / "out")
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "out" / "ready").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.1)
        pid, segment = (tmp_path / "out" / "orphan").read_text().split()
        assert Path(segment).exists() and psutil.pid_exists(int(pid))
        if number is not None:
            process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == (1 if number is None else 130)
        if number is not None:
            assert f"stopped by {number.name}" in stderr
        assert not psutil.pid_exists(int(pid))
        assert not Path(segment).exists()
        assert bystander.poll() is None, "a process that is not the demo's was ended"
    finally:
        process.kill()
        bystander.kill()
        bystander.wait()


def test_ctrl_c_ends_with_130_and_one_sentence(tmp_path: Path) -> None:
    script = _recipe_with(tmp_path / "recipe", "import time; print('ray init kwargs:', flush=True); time.sleep(600)")
    process = _start(script, tmp_path / "out")
    assert process.stdout is not None
    while "starting Ray" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == "demo: stopped by SIGINT; everything that it had started was ended\n"


# the training commands of all recipes, with what stands for Python --------------------------------------------------


@pytest.fixture
def command_line(tmp_path: Path) -> Any:
    """Runs a recipe's run.sh with a Python that prints its words; the exit status, and what was printed."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\n[ "$2" = verl_ascend_rollout.import_fix ] || echo "$@" "$VERL_FILE_LOGGER_PATH"\n')
    python.chmod(0o755)
    cwd = tmp_path / "cwd"
    cwd.mkdir()

    def run(recipe: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHON": str(python), **variables}
        script = RECIPE.parent / recipe / "run.sh"
        return subprocess.run([script, *words], cwd=cwd, env=environ, capture_output=True, text=True, timeout=60)

    run.cwd = cwd  # type: ignore[attr-defined]
    return run


RECIPES = sorted(file.parent.name for file in RECIPE.parent.glob("*/run.sh"))


@pytest.mark.parametrize("words", [["--cfg", "job", "platform=npu"], ["platform=npu", "-c", "job"], ["--info=config"]])
@pytest.mark.parametrize("recipe", RECIPES[:2])
def test_to_print_the_configuration_takes_no_data_and_makes_no_folder(
    recipe: str, words: list[str], command_line: Any
) -> None:
    done = command_line(recipe, *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"hydra.run.dir='{command_line.cwd}/outputs/{recipe}/hydra'" in done.stdout
    assert list(command_line.cwd.iterdir()) == []
    # verl's plug-in would make the folder of verl's metrics.
    assert done.stdout.endswith(" \n")
    # Without it, what is missing is said.
    done = command_line(recipe, "platform=npu")
    assert done.returncode == 2 and done.stderr.startswith("run.sh: no data at ")


@pytest.mark.parametrize(
    ("recipe", "name", "value"),
    [
        *((recipe, "TP", "0") for recipe in RECIPES[:2]),
        *((recipe, "NODES", "1 + 1") for recipe in RECIPES[:2]),
        *((recipe, "DEVICES", value) for recipe in RECIPES for value in ("abc", "-1", "08")),
        ("grpo_tiny_cpu", "STEPS", "1e3"),
    ],
)
def test_a_number_that_is_none_is_one_sentence(recipe: str, name: str, value: str, command_line: Any) -> None:
    done = command_line(recipe, "--cfg", "job", **{name: value})
    assert done.returncode == 2
    assert done.stderr == f"run.sh: {name}={value} is no whole number of at least 1\n"
    assert done.stdout == "" and list(command_line.cwd.iterdir()) == []


# gsm8k --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (None, "has neither train.jsonl nor main/train-*.parquet: download gsm8k there"),
        ('{"question": "1+1?"}', "train.jsonl line 2 has no text 'answer', which each record of gsm8k has"),
        ('{"question": 1, "answer": "2"}', "train.jsonl line 2 has no text 'question'"),
        ("[]", "train.jsonl line 2 has no text 'question'"),
        ("{", "train.jsonl line 2 is no JSON"),
    ],
)
def test_data_that_is_not_gsm8k_is_one_sentence(
    line: str | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow")
    spec = importlib.util.spec_from_file_location("prepare_gsm8k", RECIPE.parent / "prepare_gsm8k.py")
    assert spec is not None and spec.loader is not None
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    good = '{"question": "1+1?", "answer": "so #### 2"}\n'
    if line is not None:
        (tmp_path / "test.jsonl").write_text(good)
        (tmp_path / "train.jsonl").write_text(good + line)
    assert prepare.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("prepare_gsm8k.py: ") and captured.err.count("\n") == 1 and says in captured.err
    assert not (tmp_path / "out").exists()
    (tmp_path / "test.jsonl").write_text(good)
    (tmp_path / "train.jsonl").write_text(good)
    assert prepare.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
