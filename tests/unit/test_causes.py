"""The cause of an engine that does not start, out of what its processes print (root causes: `test_smoke`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from verl_ascend_rollout.engine import causes

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


def test_of_a_long_log_the_end_is_read(tmp_path: Path) -> None:
    answer, out = tmp_path / "answer", tmp_path / "out"
    program = PROGRAM.replace("printed = ", "causes.MOST_BYTES = 1000; printed = ").replace(
        "for stream, said in (",
        "print('KeyError: of long ago' + 999 * '\\nno error', flush=True)\nfor stream, said in (",
    )
    with out.open("w") as stdout:
        subprocess.run([sys.executable, "-c", program, answer], stdout=stdout, check=True, timeout=60)
    assert answer.read_text() == "ValueError: the cause"


def log_of(*lines: str) -> list[str]:
    return [f"(EngineCore pid=9) ERROR 11-22 04:00:00 [core.py:1] {line}\n" for line in lines]


def test_an_engine_died_of_what_it_printed_as_it_ended_and_not_of_an_error_before() -> None:
    survived = log_of("WorkerProc hit an exception.", "KeyError: a request that failed")
    assert causes.fatal_error(survived) == ""
    fatal = log_of(
        "EngineCore encountered a fatal error.",
        "Traceback (most recent call last):",
        "RuntimeError: Worker failed with error 'can't allocate memory: you tried 12 bytes', please check the stack "
        "trace above for the root cause",
    )
    assert causes.fatal_error([*survived, *fatal]) == "RuntimeError: can't allocate memory: you tried 12 bytes"


def test_what_python_ignores_while_a_process_ends_is_no_cause() -> None:
    fatal = log_of("EngineCore encountered a fatal error.")
    ignored = log_of(
        "Exception ignored in: <function ShmRingBuffer.__del__ at 0x7f22454e5760>",
        "Traceback (most recent call last):",
        "FileNotFoundError: [Errno 2] No such file or directory: '/psm_4ef67831'",
    )
    assert causes.fatal_error([*fatal, *ignored, *log_of("RuntimeError: cancelled")]) == ""
    assert causes.fatal_error([*fatal, *ignored, *log_of("ValueError: the cause")]) == "ValueError: the cause"


def test_what_only_points_at_another_process_is_not_the_reason_of_a_failed_start(tmp_path: Path) -> None:
    class Log(causes.Printed):
        def lines(self):  # type: ignore[no-untyped-def]
            return iter(log_of("ValueError: the cause"))

    pointing = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
    assert causes.why_not_started(pointing, Log()) == "ValueError: the cause"
    assert causes.why_not_started(OSError("no room"), Log()) == "OSError: no room"
