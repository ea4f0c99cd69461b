"""Why an engine did not start, or died, out of what its processes print.

What vLLM raises says only that another process failed ("Engine core initialization failed. See root cause above",
"EngineCore encountered an issue"); in a job the cause is then a hundred lines up, or in the log of an actor.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import stat
from collections.abc import Iterable, Iterator


class EngineStartError(RuntimeError):
    """vLLM does not start the engine.  One sentence: of which replica, why, and which log has the rest."""


MOST_TEXT = 400
"""Characters of a line that are kept."""

MOST_BYTES = 16 * 2**20
"""Of a log that are looked at, its last: an engine that dies after days must not be waited for while it is read."""

# (EngineCore_DP0 pid=123) WARNING 11-22 04:00:00 [cpu.py:145] text
PROCESS = r"(?:\((?P<process>[\w.: -]+?)(?: pid=\d+)?\) )*"
VLLM_LINE = re.compile(
    rf"^{PROCESS}(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL)(?: +|:)"
    r"(?:\d\d-\d\d \d\d:\d\d:\d\d )?(?:\[[^\]]*\] )?(?P<text>.*)$"
)

_ERROR = re.compile(
    r"^(?P<type>[A-Za-z_][\w.]*(?:Error|Exception|Exit|NotFound|OutOfMemory\w*|Refused)): (?P<text>.+)$"
)
_FOLLOWS = (
    "Engine core initialization failed",
    "WorkerProc initialization failed",
    "Engine process failed to start",
    "EngineCore encountered an issue",
    "EngineCore died",
    "Executor failed",
    "cancelled",
)
"""What vLLM raises in one process because another has failed: its own words point elsewhere (0.11 to 0.28)."""

_DIES = "EngineCore encountered a fatal error"
"""What an EngineCore logs in front of the exception that ends it (v1/engine/core.py, 0.11 to 0.28)."""
_DOES_NOT_START = "EngineCore failed to start"
"""The same of one that is not up yet."""
_OF_WORKER = re.compile(r"Worker failed with error '(.+)', please check the stack trace above .*")
"""What an EngineCore makes of a worker's exception (v1/executor/multiproc_executor.py, the same releases)."""


def plain(line: str) -> str:
    """Return the line without colours."""
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line).rstrip()


def root_error(lines: Iterable[str]) -> str:
    """Return the sentence of the error that the others followed from; empty where no error was printed.

    The first that is printed: a worker prints its own before the engine core prints that a worker failed, and Python
    prints a chain of exceptions from the first on.
    """
    return next((text for text in _errors(lines) if not is_followed(text)), "")


def fatal_error(lines: Iterable[str]) -> str:
    """Return the error that ended an EngineCore which had started; empty where it printed none.

    What was printed before is no cause: an exception that vLLM survived is there as well.
    """
    return root_error(itertools.dropwhile(lambda line: _DIES not in line, lines))


def is_given_up(lines: Iterable[str]) -> bool:
    """Return whether an EngineCore printed that it ends: a signal that ends it afterwards is no cause.

    vLLM sends SIGTERM, and SIGKILL to what takes longer than 5 s to end (v1/utils.py, `shutdown`).
    """
    return any(_DIES in line or _DOES_NOT_START in line for line in lines)


def is_followed(text: str) -> bool:
    """Return whether an error says no more than that another process failed."""
    return any(word in text for word in _FOLLOWS)


def _errors(lines: Iterable[str]) -> Iterator[str]:
    inside_validation, ignored = "", False
    for line in lines:
        line = plain(line)
        match = VLLM_LINE.match(line)
        text = (match["text"] if match else re.sub(rf"^{PROCESS}", "", line)).strip()
        if inside_validation:
            # pydantic's: "1 validation error for ModelConfig", then "  Value error, what is wrong [type=...]".
            if text.startswith("Value error, ") or "[type=" in text:
                yield f"{inside_validation}: {text.removeprefix('Value error, ').partition(' [type=')[0]}"
                inside_validation = ""
            continue
        ignored = ignored or text.startswith("Exception ignored in")
        found = _ERROR.match(text)
        if found is None:
            continue
        if ignored:  # of a `__del__`, while something else ends the process
            ignored = False
            continue
        if found["type"].endswith("ValidationError"):
            inside_validation = found["type"].rpartition(".")[2]
            continue
        name = found["type"].rpartition(".")[2]
        text = _OF_WORKER.sub(r"\1", found["text"])
        yield f"{name}: {text}"[:MOST_TEXT]


def one_sentence(error: BaseException) -> str:
    """Return an exception as one sentence, without what pydantic adds."""
    text = "\n".join(
        f"{type(error).__name__}: {line}" if not number else line for number, line in enumerate(str(error).splitlines())
    )
    return next(_errors(text.splitlines()), "") or f"{type(error).__name__}: {' '.join(str(error).split())}"[:MOST_TEXT]


def why_not_started(error: BaseException, printed: Printed) -> str:
    """Return why an engine did not start: what vLLM raised, or where that only points elsewhere, what was printed."""
    cause = one_sentence(error)
    return (root_error(printed.lines()) or cause) if is_followed(cause) else cause


class Printed:
    """What this process, and those that it starts, print from now on, where that goes into files, as in a Ray actor."""

    def __init__(self) -> None:
        self._starts: dict[str, int] = {}
        for number in (1, 2):  # vLLM logs to the first
            with contextlib.suppress(OSError):
                status = os.fstat(number)
                if stat.S_ISREG(status.st_mode):
                    self._starts.setdefault(os.readlink(f"/proc/self/fd/{number}"), status.st_size)

    def lines(self) -> Iterator[str]:
        """Yield them, of standard output first; nothing where they go into no file."""
        for path, start in self._starts.items():
            with contextlib.suppress(OSError), open(path, "rb") as stream:
                stream.seek(max(start, stream.seek(0, os.SEEK_END) - MOST_BYTES))
                yield from (line.decode(errors="replace") for line in stream)
