"""`ascend-safe` as a person types it."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from verl_ascend_rollout import __version__, options
from verl_ascend_rollout.tools import terminal
from verl_ascend_rollout.tools.cli import main
from verl_ascend_rollout.tools.report import Check


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VERL_PLATFORM", "CUDA_VISIBLE_DEVICES", "VLLM_ASCEND_ENABLE_NZ", "PYTORCH_NPU_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)


def explained(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, object]:
    assert main(["explain", "--json", *options]) == 0
    return {row["name"]: row["value"] for row in json.loads(capsys.readouterr().out)["decisions"]}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ascend-safe {__version__}\n"


def test_explain_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    assert main(["explain"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("platform cpu (verl's cpu)")
    assert "VERL_PLATFORM=cpu says so" in out
    assert "abilities sleep_mode no" in out
    row = next(line for line in out.splitlines() if line.startswith("kv_release"))
    assert row.split()[1:3] == ["reallocate,", "keep"]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_explain_is_as_wide_as_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["explain", "--platform", "npu", "--soc", "A2", "--vllm-ascend", "0.18.0"]) == 0
    plain = capsys.readouterr().out
    # One name of Ray's has 59 characters, and its value is beside it.
    assert max(map(len, plain.splitlines())) <= max(columns, 63)
    assert "decoding is what a rollout spends its time on" in " ".join(plain.split())
    assert "docs" not in plain and "inferred" not in plain
    assert main(["explain", "--platform", "npu", "--soc", "A2", "--vllm-ascend", "0.18.0", "--sources"]) == 0
    assert "inferred, from " in " ".join(capsys.readouterr().out.split())


# argparse itself leaves out what nobody reads, from Python 3.11 on.
HELP_WITHOUT_A_READER = 0 if sys.version_info >= (3, 11) else 141


@pytest.mark.parametrize(
    ("argv", "status"),
    [(["explain", "--platform", "npu"], 141), (["doctor", "--all"], 0), (["--help"], HELP_WITHOUT_A_READER)],
)
def test_a_reader_that_has_gone_is_no_traceback(argv: list[str], status: int) -> None:
    """`ascend-safe ... | head`, which has read enough before anything comes."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "verl_ascend_rollout.tools.cli", *argv]
    answer = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert answer.stderr == ""
    assert answer.returncode == status


@pytest.mark.parametrize(
    "argv",
    [
        ["timeline", ""],
        ["timeline", "a.jsonl", "--out", ""],
        ["explain", "--model", ""],
        ["explain", "--config", ""],
        ["compare", "a.json", ""],
        ["compare", "a.json", "b.json", "--junit", ""],
        ["doctor", "--json", ""],
        ["doctor", "--for", "vllm==0.18.0", "--wheels", ""],
        ["bench", "kv", "--model", ""],
        ["bench", "weights", "--plot", ""],
        ["smoke", ""],
        ["smoke", "--tiny", "--out", ""],
        ["smoke", "--bundle", ""],
    ],
    ids=" ".join,
)
def test_an_empty_name_is_named(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """As a variable that is not set gives it: `ascend-safe timeline "$EVENTS"`."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    option = (
        argv[-2] if argv[-2].startswith("--") else {"timeline": "EVENTS", "compare": "REPORT"}.get(argv[0], "MODEL")
    )
    assert re.search(rf"error: argument (\S+/)?{option}(/\S+)?: it is empty: name a file or a folder\n$", captured.err)
    assert captured.out == ""


@pytest.mark.parametrize("argv", [["explain", "--platform", "npu"], ["doctor"], ["completion", "bash"]])
def test_a_full_disk_is_one_sentence(argv: list[str]) -> None:
    command = [sys.executable, "-m", "verl_ascend_rollout.tools.cli", *argv]
    with open("/dev/full", "wb") as full:
        answer = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert answer.stderr == "ascend-safe: what is printed cannot be written: No space left on device\n"
    assert answer.returncode == 1


@pytest.mark.parametrize("argv", [["explain", "--platform", "npu"], ["doctor"]])
def test_without_an_output_the_answer_is_the_exit_status(argv: list[str]) -> None:
    command = ["bash", "-c", '"$@" >&-', "bash", sys.executable, "-m", "verl_ascend_rollout.tools.cli", *argv]
    answer = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (answer.returncode, answer.stderr) == (0, "")


@pytest.mark.parametrize(("variable", "coloured"), [(None, True), ("1", False)])
def test_verdicts_have_colours_unless_nobody_wants_them(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, coloured: bool
) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Screen())
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv("NO_COLOR", variable)
    found = (Check("a.b", "fail", "[not] markup"), Check("c", "pass", "fi\x1b[2Jne"))
    terminal.checks(terminal.console(), found)
    written = sys.stdout.getvalue()  # type: ignore[attr-defined]
    assert ("\x1b[31mFAIL" in written) == coloured
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", written).splitlines()]
    assert lines == ["FAIL    a.b: [not] markup", "PASS    c: fi\N{REPLACEMENT CHARACTER}[2Jne"]
    assert coloured or "\x1b" not in written


def test_a_line_of_progress_is_known_again(capsys: pytest.CaptureFixture[str]) -> None:
    """As `doctor --live` reads smoke's."""
    progress = terminal.Progress(terminal.console())
    progress.phase("loading weights")
    progress.line("smoke: PASS")
    phase, other = capsys.readouterr().out.splitlines()
    found = terminal.PHASE.match(phase)
    assert found is not None and found[1] == "loading weights"
    assert terminal.PHASE.match(other) is None


def test_explain_a_planned_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--platform", "npu", "--soc", "A3", "--vllm-ascend", "0.18.0"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("platform npu (verl's huawei), SoC A3\n  planned: nothing on this machine was looked at\n")
    assert "versions vllm-ascend 0.18.0" in out
    assert "FULL_DECODE_ONLY" in out


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        (["--platform", "cpu"], "enforce_eager", True),
        (["--platform", "cpu", "--enforce-eager", "false"], "kv_release", ["keep"]),
        (["--platform", "cuda"], "enforce_eager", False),
        (["--platform", "cuda", "--enforce-eager", "true"], "enforce_eager", True),
        (["--platform", "cuda", "--lora"], "sleep_level", 1),
        (["--platform", "cuda", "--mtp"], "sleep_level", 1),
        (["--platform", "cuda", "--enable-sleep-mode", "false"], "kv_release", ["keep"]),
        (["--platform", "cuda", "--enable-sleep-mode", "false", "--kv-release", "reallocate"], "enforce_eager", True),
        (["--platform", "cuda", "--free-cache-engine", "false"], "kv_release", ["keep"]),
        (["--platform", "npu", "--soc", "a2", "--vllm-ascend", "0.23.0"], "enforce_eager", False),
        (["--platform", "npu", "--soc", "910B3", "--vllm-ascend", "0.23.0"], "enforce_eager", False),
        (["--platform", "npu", "--soc", "310P", "--vllm-ascend", "0.23.0"], "enforce_eager", True),
        (["--platform", "npu", "--vllm", "0.11.0"], "environment.VLLM_USE_V1", "1"),
    ],
)
def test_explain_json(capsys: pytest.CaptureFixture[str], options: list[str], name: str, value: object) -> None:
    assert explained(capsys, *options)[name] == value


@pytest.mark.parametrize("option", [("--kv-rung", "direct"), ("--kv-rung", "reallocate"), ("--kv-release", "direct")])
def test_explain_takes_the_old_words_and_says_so(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, option: tuple[str, str]
) -> None:
    options._say_once.cache_clear()
    decided = explained(capsys, "--platform", "cuda", "--enable-sleep-mode", "false", *option)
    assert decided["kv_release"] == ["reallocate", "keep"]
    assert len(caplog.records) == ("rung" in option[0]) + (option[1] == "direct")


def test_the_old_word_is_not_advertised(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--kv-release METHOD auto, kv_only, sleep, reallocate, keep" in " ".join(out.split()) and "rung" not in out
    assert main(["explain", "--kv-rung", "fast"]) == 2
    assert "argument --kv-rung: invalid choice: 'fast'" in capsys.readouterr().err


def test_json_has_the_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--json", "--platform", "npu", "--soc", "A5"]) == 0
    platform = json.loads(capsys.readouterr().out)["platform"]
    assert (platform["name"], platform["verl_name"], platform["soc"]) == ("npu", "huawei", "A5")
    assert platform["evidence"] == ["planned: nothing on this machine was looked at"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "COMMAND"),
        (["explian"], "invalid choice"),
        (["explain", "--platform", "tpu"], "invalid choice"),
        (["explain", "--soc", "A3"], "--soc describes a machine that is only planned: say --platform as well"),
        (["explain", "--vllm-ascend", "0.18.0"], "--vllm-ascend describes a machine"),
        (["explain", "--vllm", "0.18.0"], "--vllm describes a machine"),
        (["explain", "--platform", "cuda", "--soc", "A3"], "--soc needs --platform npu, not cuda"),
        (["explain", "--platform", "cpu", "--vllm-ascend", "0.18.0"], "--vllm-ascend needs --platform npu, not cpu"),
        (["explain", "--platform", "npu", "--soc", "A9"], "'A9' is no Ascend chip that is known here"),
        (["explain", "--platform", "npu", "--vllm", "newest"], "'newest' is no version"),
        (["explain", "--enforce-eager", "maybe"], "invalid choice"),
    ],
)
def test_usage_errors_exit_2(capsys: pytest.CaptureFixture[str], argv: list[str], says: str) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("argv", "environ", "says"),
    [
        (["explain", "--platform", "cpu", "--kv-release", "sleep"], {}, "kv_release=sleep cannot work"),
        (["explain", "--platform", "cpu", "--kv-release", "keep", "--on-unsafe", "error"], {}, "contradict each other"),
        (["explain", "--platform", "npu", "--soc", "310P", "--expert-parallel-size", "2"], {}, "expert parallelism"),
        (["explain"], {"VERL_PLATFORM": "tpu"}, "VERL_PLATFORM=tpu names no platform"),
        (
            ["explain"],
            {"VERL_PLATFORM": "npu", "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"},
            "PYTORCH_NPU_ALLOC_CONF=expandable_segments:True cannot work",
        ),
    ],
)
def test_what_cannot_work_exits_1_with_one_sentence(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    environ: dict[str, str],
    says: str,
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert main(argv) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("ascend-safe: ")
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_the_environment_of_this_prompt_says_nothing_about_a_planned_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ASCEND_ENABLE_NZ", "1")
    assert explained(capsys, "--platform", "npu")["environment.VLLM_ASCEND_ENABLE_NZ"] == "0"


COMPOSED = """
actor_rollout_ref:
  model:
    path: {model}
    lora_rank: 0
  rollout:
    name: ascend_safe
    enforce_eager: false
    tensor_model_parallel_size: 2
    max_num_seqs: ${{data.batch}}
    load_format: ???
    mtp: null
    engine_kwargs:
      vllm: {{additional_config: {{weight_nz_mode: 0}}}}
      ascend_safe: {{kv_release: null, on_unsafe: error}}
data: {{batch: 100}}
"""


@pytest.fixture
def composed(tmp_path: Path) -> Path:
    """A job's composed configuration, and its model beside it."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps({"model_type": "qwen2_moe", "num_hidden_layers": 24, "num_experts": 60, "head_dim": 128})
    )
    file = tmp_path / "config.yaml"
    file.write_text(COMPOSED.format(model=model))
    return file


def test_explain_reads_a_composed_configuration(capsys: pytest.CaptureFixture[str], composed: Path) -> None:
    decided = explained(
        capsys, "--platform", "npu", "--soc", "A2", "--vllm-ascend", "0.18.0", "--config", str(composed)
    )
    assert decided["enforce_eager"] is False
    assert decided["cudagraph_capture_sizes"] == [1, 2, 4, 8, 16, 32, 64, 100]
    assert decided["environment.VLLM_ASCEND_ENABLE_FUSED_MC2"] == "0"
    # An option of the command goes before the file.
    decided = explained(capsys, "--platform", "npu", "--config", str(composed), "--enforce-eager", "true")
    assert decided["enforce_eager"] is True


def test_explain_knows_the_model_of_the_configuration(capsys: pytest.CaptureFixture[str], composed: Path) -> None:
    kwargs = composed.read_text().replace(
        "weight_nz_mode: 0", "weight_nz_mode: 0}, compilation_config: {cudagraph_mode: PIECEWISE"
    )
    composed.write_text(kwargs)
    machine = ("--platform", "npu", "--soc", "A2", "--vllm-ascend", "0.18.0")
    assert main(["explain", *machine, "--config", str(composed)]) == 0
    assert "24 layers that" in " ".join(capsys.readouterr().out.split())
    (composed.parent / "model" / "config.json").unlink()
    assert main(["explain", *machine, "--config", str(composed)]) == 0
    assert "is not on this machine: what depends on it is not known (--model DIR)" in capsys.readouterr().out


def test_explain_reads_the_rollouts_settings_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "rollout.yaml"
    file.write_text("enforce_eager: true\ncudagraph_capture_sizes: [1, 2]\n")
    decided = explained(capsys, "--platform", "cuda", "--config", str(file))
    assert decided["enforce_eager"] is True
    assert decided["sleep_level"] == 2
    file.write_text("actor_rollout_ref: {rollout: {name: vllm}, model: {lora: {rank: 8}}}\n")
    assert main(["explain", "--platform", "cuda", "--config", str(file)]) == 0
    out = capsys.readouterr().out
    assert "actor_rollout_ref.rollout.name is vllm" in out
    assert "the base model (LoRA)" in " ".join(out.split())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        ("", "has neither actor_rollout_ref.rollout nor a setting of a rollout"),
        ("a: [1", "is no YAML file"),
        ("\x00\x01", "is no YAML file"),
        ("[1, 2]", "has no settings in it"),
        ("3", "has no settings in it"),
        ("[" * 2_000, "is no YAML file: it is nested too deeply"),
        ("a: &a [*a]", "is no YAML file"),
        ("a: " + "9" * 10_000, "is no YAML file"),
        ("trainer: {logger: console}", "has neither actor_rollout_ref.rollout nor a setting of a rollout"),
        ("actor_rollout_ref: {rollout: {max_num_seqs: '${nothing}', name: x}}", "cannot be resolved"),
        ("max_num_seqs: many", "must be a whole number"),
        ("tensor_model_parallel_size: -4", "must be a whole number from 1 to"),
        ("cudagraph_capture_sizes: 7", "must be a list of whole numbers"),
        ("engine_kwargs: [1]", "must be a mapping"),
        ("engine_kwargs: {ascend_safe: {kv_rang: direct}}", "did you mean 'kv_release'?"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str | None, says: str
) -> None:
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_text(content)
    assert main(["explain", "--platform", "cpu", "--config", str(file)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"ascend-safe: --config {file}")
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_configuration_without_an_end_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--platform", "cpu", "--config", "/dev/zero"]) == 2
    assert "cannot be read: it has more than 32 MiB, and no configuration has" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "-1", "two"])
def test_a_size_that_is_none_is_refused(capsys: pytest.CaptureFixture[str], size: str) -> None:
    assert main(["explain", "--platform", "cpu", "--expert-parallel-size", size]) == 2
    assert f"{size!r} is no whole number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "[]", "{", "\xff", "[" * 100_000])
def test_a_model_that_cannot_be_read_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    assert main(["explain", "--platform", "cpu", "--model", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    wrong = "has no config.json" if content is None else "cannot be read as a model's configuration"
    assert wrong in captured.err
    assert captured.err.count("\n") == 1


def test_works_where_torch_verl_and_vllm_cannot_be_imported() -> None:
    """A broken installation: the three raise as soon as they are imported, and have no metadata."""
    script = (
        "import importlib.metadata, sys\n"
        "class Broken:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'verl', 'vllm', 'vllm_ascend', 'ray'):\n"
        "            raise ImportError(name + ' is broken')\n"
        "sys.meta_path.insert(0, Broken())\n"
        "def missing(name):\n"
        "    raise importlib.metadata.PackageNotFoundError(name)\n"
        "importlib.metadata.version = missing\n"
        "from verl_ascend_rollout.tools.cli import main\n"
        "sys.exit(main(['explain']))\n"
    )
    environ = {**os.environ, "VERL_PLATFORM": "npu"}
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environ)
    assert answer.returncode == 0, answer.stderr
    assert "torch-npu is not installed" in answer.stdout
    assert "enforce_eager" in answer.stdout
