"""recipes/ci: the script for real with a stand-in for `ascend-safe`, and the workflows as far as they can be read."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from verl_ascend_rollout.tools.cli import main

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "ci"
SCRIPT = RECIPE / "check.sh"

STUB = """#!/bin/bash
printf '%s\\n' "$*" >> "$CALLS"
case "$1" in
    doctor) exit "${DOCTOR_ENDS:-0}" ;;
    smoke) exit "${SMOKE_ENDS:-0}" ;;
esac
"""


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """A folder with an `ascend-safe` that writes down how it was called, and ends as it is told."""
    program = tmp_path / "bin" / "ascend-safe"
    program.parent.mkdir()
    program.write_text(STUB)
    program.chmod(0o755)
    return tmp_path


def check(stub: Path, *arguments: str, **environ: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run the script; what came out, and how the stub was called."""
    calls = stub / "calls"
    calls.unlink(missing_ok=True)
    path = f"{stub / 'bin'}:/usr/bin:/bin"
    done = subprocess.run(
        [str(SCRIPT), *arguments],
        cwd=stub,
        env={"PATH": path, "CALLS": str(calls), "HOME": str(stub), **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, calls.read_text().splitlines() if calls.exists() else []


DOCTOR = "doctor --json {0}/doctor.json --markdown {0}/doctor.md --junit {0}/doctor.junit.xml"


@pytest.mark.parametrize(
    ("arguments", "out", "smoke"),
    [
        ([], "outputs/check", "smoke --tiny --out outputs/check"),
        (["--out", "kept here"], "kept here", "smoke --tiny --out kept here"),
        (["a/model", "--tp", "2"], "outputs/check", "smoke a/model --out outputs/check --tp 2"),
        (
            ["--tp", "4", "--", "--ep", "--graph"],
            "outputs/check",
            "smoke --tiny --out outputs/check --tp 4 --ep --graph",
        ),
    ],
)
def test_both_are_run_and_keep_their_files(arguments: list[str], out: str, smoke: str, stub: Path) -> None:
    done, calls = check(stub, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert calls == [DOCTOR.format(out), smoke]
    assert (stub / out).is_dir()


@pytest.mark.parametrize(
    ("doctor", "smoke", "status"), [(0, 0, 0), (1, 0, 1), (0, 1, 1), (1, 2, 2), (2, 1, 2), (0, 124, 124), (139, 1, 139)]
)
def test_the_exit_status_is_the_worse_of_the_two_and_both_are_run(
    doctor: int, smoke: int, status: int, stub: Path
) -> None:
    done, calls = check(stub, DOCTOR_ENDS=str(doctor), SMOKE_ENDS=str(smoke))
    assert done.returncode == status
    assert [call.split()[0] for call in calls] == ["doctor", "smoke"]
    assert done.stdout.splitlines()[-1] == f"== doctor {doctor}, smoke {smoke}; files in outputs/check"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tp"], "--tp needs a value"),
        (["--tp", "two"], "--tp needs a number of devices, not 'two'"),
        (["--tp", "0"], "not '0'"),
        (["--out", ""], "--out needs a value"),
        (["--ep"], "--ep is not understood: what is meant for smoke follows --"),
        (["one", "two"], "one model at a time, not both 'one' and 'two'"),
    ],
)
def test_what_is_not_understood_is_one_sentence_and_starts_nothing(arguments: list[str], says: str, stub: Path) -> None:
    done, calls = check(stub, *arguments)
    assert (done.returncode, calls) == (2, [])
    assert says in done.stderr and done.stderr.count("\n") == 1


def test_a_program_that_is_not_there_is_named(stub: Path) -> None:
    done, calls = check(stub, ASCEND_SAFE="/nowhere/ascend-safe")
    assert (done.returncode, calls) == (2, [])
    assert done.stderr == (
        "check.sh: /nowhere/ascend-safe is not on the path: install verl-ascend-rollout, or set ASCEND_SAFE\n"
    )
    elsewhere = stub / "elsewhere"
    (stub / "bin" / "ascend-safe").rename(elsewhere)
    assert check(stub, ASCEND_SAFE=str(elsewhere))[0].returncode == 0


def test_help_says_how_it_is_called(stub: Path) -> None:
    done, calls = check(stub, "--help")
    assert (done.returncode, calls) == (0, [])
    assert "check.sh [MODEL] [--tp N] [--out DIR] [-- OPTION...]" in done.stdout
    assert "set -euo" not in done.stdout and done.stdout.count("\n") == 7


def test_the_script_is_bash_and_may_be_run() -> None:
    done = subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.access(SCRIPT, os.X_OK)
    # What shellcheck would say first: an expansion outside quotes.
    code = [line.split(" #")[0] for line in SCRIPT.read_text().splitlines() if not line.lstrip().startswith("#")]
    bare = [line for line in code if re.search(r'(?<!["\w{(])\$[A-Za-z_{]', re.sub(r'"[^"]*"|\[\[.*?\]\]', "", line))]
    assert [line for line in bare if "SMOKE[@]+" not in line and "=$?" not in line] == []


def test_doctor_takes_the_options_that_the_script_gives_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(DOCTOR.format(tmp_path))) in (0, 1)
    assert capsys.readouterr().err == ""
    assert {path.name for path in tmp_path.iterdir()} == {"doctor.json", "doctor.md", "doctor.junit.xml"}


# The workflows.


def github() -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load((RECIPE / "github.yml").read_text())
    return parsed


def gitlab() -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load((RECIPE / "gitlab.yml").read_text())
    return parsed


def commands() -> Iterator[str]:
    """Every shell command of both workflows."""
    for job in github()["jobs"].values():
        yield from (step["run"] for step in job["steps"] if "run" in step)
    for name, job in gitlab().items():
        if name.startswith("ascend-safe"):
            yield from job["script"]


def test_every_command_of_the_workflows_is_bash_and_calls_what_is_there() -> None:
    called: set[str] = set()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands():
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, ""), command
        for path in re.findall(r"recipes/[\w./-]+", command):
            assert (ROOT / path).is_file(), command
            called.add(path)
        for target in re.findall(r"\bmake ([a-z-]+)", command):
            assert target in targets
            called.add(f"make {target}")
    assert called == {"recipes/ci/check.sh", "make setup"}


def test_compare_takes_the_options_that_the_workflows_give_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Called for real, where the reports are missing: the sentence is about them and not about an option."""
    monkeypatch.chdir(tmp_path)
    compares = [command for command in commands() if command.startswith("ascend-safe compare")]
    assert len(compares) == 2
    for command in compares:
        assert main(shlex.split(command)[1:]) == 2
        assert "smoke.json cannot be read: No such file" in capsys.readouterr().err


def test_each_job_keeps_its_reports_whatever_comes_out() -> None:
    for name, job in github()["jobs"].items():
        (keeps,) = [step for step in job["steps"] if step.get("uses", "").startswith("actions/upload-artifact@")]
        assert keeps["if"] == "always()", name
        assert job["timeout-minutes"] <= 60
    jobs = gitlab()
    for name, job in jobs.items():
        if name.startswith("ascend-safe"):
            artifacts = (jobs[job["extends"]] if "extends" in job else job)["artifacts"]
            assert artifacts["when"] == "always" and artifacts["reports"]["junit"].endswith(".junit.xml"), name


def test_nobody_elses_code_runs_on_a_machine_of_ones_own() -> None:
    for job in github()["jobs"].values():
        if "self-hosted" in job["runs-on"]:
            assert job["if"] == "github.event_name != 'pull_request'"
    for job in gitlab().values():
        if isinstance(job, dict) and "tags" in job:
            assert job["rules"] == [{"if": '$CI_PIPELINE_SOURCE != "merge_request_event"'}]


def test_the_files_that_the_workflows_compare_are_those_that_the_script_leaves() -> None:
    folders = {"outputs/cpu", "outputs/npu", "outputs/ascend-safe-cpu", "outputs/ascend-safe-npu"}
    compared = {path for command in commands() for path in re.findall(r"\S+/smoke\.json", command)}
    assert {str(Path(path).parent) for path in compared} == folders
    outs = {path for command in commands() for path in re.findall(r"check\.sh --out (\S+?)'?$", command)}
    assert outs == {"outputs/check", "outputs/cpu", "outputs/npu"}
    kept = {
        step["with"]["name"]: step["with"]["path"]
        for job in github()["jobs"].values()
        for step in job["steps"]
        if step.get("uses", "").startswith("actions/upload-artifact@")
    }
    # An artifact of one folder has that folder's files at its top, and comes down into a folder of its name.
    assert kept["ascend-safe-cpu"] == kept["ascend-safe-npu"] == "outputs/check/"
