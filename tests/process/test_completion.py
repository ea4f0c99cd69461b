"""Shell completion, asked of a real bash."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from verl_ascend_rollout.tools.cli import main

ASK = """
eval "$("$1" completion bash)"
shift
COMP_WORDS=(ascend-safe "$@") COMP_CWORD=$#
registered=$(complete -p ascend-safe)
function=${registered##*-F }
${function%% *}
echo "${COMPREPLY[@]}"
"""


def completions(folder: Path, *words: str) -> list[str]:
    """What bash offers for the last word of the command line."""
    command = ["bash", "--norc", "-c", ASK, "bash", str(Path(sys.executable).with_name("ascend-safe")), *words]
    answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=True)
    assert not answer.stderr
    return answer.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("do",), ["doctor"]),
        (("doctor", "--j"), ["--json", "--junit"]),
        (("explain", "--platform", ""), ["cpu", "cuda", "npu"]),
        (("bench", ""), ["weights", "kv"]),
        (("completion", "z"), ["zsh"]),
        (("compare", "smo"), ["smoke.json"]),
        (("explain", "--model", ""), ["model"]),
    ],
)
def test_commands_options_values_files_and_folders(tmp_path: Path, words: tuple[str, ...], offered: list[str]) -> None:
    (tmp_path / "smoke.json").touch()
    (tmp_path / "model").mkdir()
    assert completions(tmp_path, *words) == offered


def test_a_shell_that_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "fish"]) == 2
    assert "invalid choice: 'fish'" in capsys.readouterr().err


def test_without_shtab_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert capsys.readouterr().err.endswith("not installed here: pip install shtab\n")
