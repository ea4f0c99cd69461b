"""The cause of an engine that does not start, out of what its processes print (root causes: `test_smoke`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import subprocess, sys
from verl_ascend_rollout.engine import causes
print("ValueError: of something before", flush=True)
printed = causes.Printed()
child = "import sys; print('(EngineCore pid=9) ERROR 11-22 04:00:00 [core.py:1] {}', file=sys.{})"
for stream, said in (("stderr", "RuntimeError: told late"), ("stdout", "ValueError: the cause")):
    subprocess.run([sys.executable, "-c", child.format(said, stream)], check=True)
with open(sys.argv[1], "w") as answer:
    answer.write(causes.root_error(printed.lines()))
"""


def test_what_child_processes_print_from_now_on_is_read_from_the_files_behind_the_streams(tmp_path: Path) -> None:
    answer, out, err = tmp_path / "answer", tmp_path / "out", tmp_path / "err"
    with out.open("w") as stdout, err.open("w") as stderr:
        subprocess.run([sys.executable, "-c", PROGRAM, answer], stdout=stdout, stderr=stderr, check=True, timeout=60)
    assert answer.read_text() == "ValueError: the cause"
    assert "RuntimeError: told late" in err.read_text()


def test_nothing_is_read_where_the_streams_are_pipes(tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    subprocess.run([sys.executable, "-c", PROGRAM, answer], capture_output=True, check=True, timeout=60)
    assert answer.read_text() == ""
