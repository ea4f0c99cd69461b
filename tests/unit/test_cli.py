"""`ascend-safe` as a person types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from verl_ascend_rollout import __version__
from verl_ascend_rollout.cli import main


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
    row = next(line for line in out.splitlines() if line.startswith("kv_rung"))
    assert row.split()[1] == "direct"


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
        (["--platform", "cpu", "--enforce-eager", "false"], "kv_rung", "keep"),
        (["--platform", "cuda"], "enforce_eager", False),
        (["--platform", "cuda", "--enforce-eager", "true"], "enforce_eager", True),
        (["--platform", "cuda", "--lora"], "sleep_level", 1),
        (["--platform", "cuda", "--mtp"], "sleep_level", 1),
        (["--platform", "cuda", "--enable-sleep-mode", "false"], "kv_rung", "keep"),
        (["--platform", "cuda", "--enable-sleep-mode", "false", "--kv-rung", "direct"], "enforce_eager", True),
        (["--platform", "cuda", "--free-cache-engine", "false"], "kv_rung", "keep"),
        (["--platform", "npu", "--soc", "a2", "--vllm-ascend", "0.23.0"], "enforce_eager", False),
        (["--platform", "npu", "--soc", "910B3", "--vllm-ascend", "0.23.0"], "enforce_eager", False),
        (["--platform", "npu", "--soc", "310P", "--vllm-ascend", "0.23.0"], "enforce_eager", True),
        (["--platform", "npu", "--vllm", "0.11.0"], "environment.VLLM_USE_V1", "1"),
    ],
)
def test_explain_json(capsys: pytest.CaptureFixture[str], options: list[str], name: str, value: object) -> None:
    assert explained(capsys, *options)[name] == value


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
        (["explain", "--platform", "cpu", "--kv-rung", "sleep"], {}, "kv_rung=sleep cannot work"),
        (["explain", "--platform", "cpu", "--kv-rung", "keep", "--on-unsafe", "error"], {}, "contradict each other"),
        (["explain", "--platform", "npu", "--soc", "310P", "--expert-parallel-size", "2"], {}, "expert parallelism"),
        (["explain"], {"VERL_PLATFORM": "tpu"}, "VERL_PLATFORM=tpu names no platform"),
        (["explain"], {"VERL_PLATFORM": "npu", "VLLM_ASCEND_ENABLE_NZ": "1"}, "VLLM_ASCEND_ENABLE_NZ=1 cannot work"),
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
        "from verl_ascend_rollout.cli import main\n"
        "sys.exit(main(['explain']))\n"
    )
    environ = {**os.environ, "VERL_PLATFORM": "npu"}
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environ)
    assert answer.returncode == 0, answer.stderr
    assert "torch-npu is not installed" in answer.stdout
    assert "enforce_eager" in answer.stdout
