"""Shell completion, asked of a real bash and, where it is installed, a real zsh."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from verl_ascend_rollout.tools.cli import main

ASK_BASH = """
eval "$("$1" completion bash)"
shift
COMP_WORDS=(ascend-safe "$@") COMP_CWORD=$#
registered=$(complete -p ascend-safe)
function=${registered##*-F }
${function%% *}
printf '%s\\n' "${COMPREPLY[@]}"
"""

# zsh completes in its line editor only: an interactive one is typed into, on a pseudo-terminal, and each match that the
# completion adds is written down.
ASK_ZSH = r"""
zmodload zsh/zpty
mkdir .zsh && "$1" completion zsh > .zsh/_ascend-safe || exit
shift
zpty asked zsh -f -i
zpty -w asked 'fpath=($PWD/.zsh $fpath); autoload -Uz compinit; compinit -u -D; bindkey "^I" complete-word'
zpty -w asked 'compadd () {
    [[ "${@[1,(i)(-|--)]}" == *-(O|A|D)\ * ]] && { builtin compadd "$@"; return }
    local -a matches; builtin compadd -A matches "$@"; print -rl -- $matches >> .zsh/matches; builtin compadd "$@" }
ended () { touch .zsh/ended; exit }
comppostfuncs=(ended)'
zpty -w -n asked "ascend-safe $*"$'\t'
while [[ ! -e .zsh/ended ]] && zpty -r asked; do : ; done > .zsh/screen
cat .zsh/matches
"""


def completions(shell: str, folder: Path, *words: str) -> list[str]:
    """What the shell offers for the last word of the command line, sorted."""
    ask = {"bash": ["bash", "--norc", "-c", ASK_BASH], "zsh": ["zsh", "-f", "-c", ASK_ZSH]}[shell]
    command = [*ask, shell, str(Path(sys.executable).with_name("ascend-safe")), *words]
    answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=True)
    assert not answer.stderr
    return sorted(set(answer.stdout.split()))


@pytest.mark.parametrize("shell", ["bash", "zsh"])
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("do",), ["doctor"]),
        (("doctor", "--j"), ["--json", "--junit"]),
        (("explain", "--platform", ""), ["cpu", "cuda", "npu"]),
        (("bench", ""), ["kv", "weights"]),
        (("completion", "z"), ["zsh"]),
        (("compare", "smo"), ["smoke.json"]),
        (("explain", "--model", ""), ["model"]),
    ],
)
def test_commands_options_values_files_and_folders(
    tmp_path: Path, shell: str, words: tuple[str, ...], offered: list[str]
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed here")
    (tmp_path / "smoke.json").touch()
    (tmp_path / "model").mkdir()
    assert completions(shell, tmp_path, *words) == offered


def test_beside_a_command_stands_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    offered = re.findall(r"^    (\w+):'(.*)'$", capsys.readouterr().out, re.MULTILINE)
    assert {"doctor", "smoke", "kv"} < {command for command, _ in offered}
    assert all(len(line) < 110 for _, line in offered), offered


def test_a_shell_that_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "fish"]) == 2
    assert "invalid choice: 'fish'" in capsys.readouterr().err


def test_without_shtab_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert capsys.readouterr().err.endswith("not installed here: pip install shtab\n")
