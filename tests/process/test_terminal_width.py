"""Each command in a real terminal of 60, 80 and 120 columns, and in a pipe whose reader leaves."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from smoke_reports import CPU_TINY, NPU_STAND_IN, saved

from verl_ascend_rollout import events

PLANNED = "--platform npu --soc A3 --vllm-ascend 0.18.0"
COMMANDS = (
    *("--help", "explain --help", "doctor --help", "smoke --help", "bench --help", "bench kv --help"),
    *("bench weights --help", "compare --help", "timeline --help", "completion --help"),
    *("explain", "explain --sources", f"explain {PLANNED}", f"explain {PLANNED} --sources", "doctor", "doctor --all"),
    *("timeline {folder}/events.jsonl", "compare {folder}/cpu.json {folder}/npu.json"),
)
LONGEST_WORD = 63
"""A name of Ray's, with its value beside it, is not broken: it is to be copied."""

PROGRAM = """
import json, sys
from verl_ascend_rollout.tools.cli import main
for words in json.loads(sys.argv[1]):
    print("\\0", flush=True)
    main(words)
"""
STYLE = re.compile(r"\x1b\[([0-9;]*)m")


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    folder = tmp_path_factory.mktemp("files")
    saved(folder, cpu=CPU_TINY, npu=NPU_STAND_IN)
    event = events.Event(step="free", process="worker", seconds=0.05, bytes_before=2**30, bytes_after=0)
    (folder / "events.jsonl").write_text(event.to_json() + "\n")
    return [command.format(folder=folder).split() for command in COMMANDS]


def on_a_terminal(columns: int, commands: list[list[str]], **environ: str) -> list[str]:
    """What each command shows on one of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    environ = {**inherited, "TERM": "xterm-256color", **environ}
    command = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 65536)
            except OSError:  # its end, as Linux says it for a terminal
                break
        assert process.wait() == 0, shown.decode()
    os.close(ours)
    return shown.decode().split("\0\r\n")[1:]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal(columns: int, commands: list[list[str]]) -> None:
    screens = on_a_terminal(columns, commands)
    assert len(screens) == len(commands)
    for words, screen in zip(commands, screens, strict=True):
        lines = STYLE.sub("", screen).splitlines()
        assert len(lines) > 3, words
        wide = [line for line in lines if len(line.rstrip()) > columns and not _is_one_word(line)]
        assert wide == [], (words, max(map(len, wide)))


def _is_one_word(line: str) -> bool:
    return len(line.split()) <= 2 and len(line.rstrip()) <= LONGEST_WORD


def test_no_colour_where_none_is_wanted_and_some_where_nobody_says_so(commands: list[list[str]]) -> None:
    doctor = [["doctor", "--all"]]
    # Bold is no colour: https://no-color.org
    styles = ";".join(STYLE.findall("".join(on_a_terminal(80, commands, NO_COLOR="1")))).split(";")
    assert set(styles) <= {"", "0", "1", "4"}
    assert "32" in STYLE.findall("".join(on_a_terminal(80, doctor)))


def test_a_pipe_whose_reader_leaves_is_no_error_of_ours(commands: list[list[str]]) -> None:
    ascend_safe = str(Path(sys.executable).with_name("ascend-safe"))
    for words in commands[10:]:
        script = '"$0" "$@" | head -1 > /dev/null; echo "${PIPESTATUS[0]}"'
        answer = subprocess.run(
            ["bash", "-c", script, ascend_safe, *words], capture_output=True, text=True, timeout=120
        )
        # 141 is what SIGPIPE would be; where the output fits into the pipe, the command's own status.
        assert answer.stdout.strip() in ("0", "1", "141"), words
        assert answer.stderr == "", words
