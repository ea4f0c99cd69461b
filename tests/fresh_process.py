"""Functions called in fresh processes that have not imported verl, at a fraction of a second each.

Importing verl takes about ten seconds, of which less than one is verl: the rest is torch, Ray, tensordict and
transformers.  Run as a script, this file imports those, and then forks a child for each request.  The child sets its
environment, imports the test module, calls the function, and sends back what it returned, printed and exited with.

A request is a line of JSON on standard input, an answer one on the file descriptor that standard output was.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEAVY = ("torch", "ray", "tensordict", "transformers", "omegaconf", "hydra")
"""What verl imports, and what takes the time.  None of these reads VERL_* or ASCEND_SAFE_* variables."""

SECONDS = 120
"""How long a call may take; then its process is killed, which shows as the status -14."""


_ENVIRON = dict(os.environ)
"""Noted when the tests are collected: an engine or a Ray that ran in this process before leaves variables behind."""


@dataclass(frozen=True)
class Answer:
    """What a call did: the value that it returned (as JSON), what it printed, and the exit status of its process."""

    value: Any
    stdout: str
    stderr: str
    status: int


class FreshProcesses:
    """A server of fresh processes, made at the first call; see the module."""

    def __init__(self) -> None:
        self._environ = dict(_ENVIRON)
        self._server: subprocess.Popen[str] | None = None

    def __call__(
        self, function: Callable[..., Any], *arguments: Any, path: str | None = None, **environ: str | None
    ) -> Answer:
        """Call a top-level function of a test module in a fresh process.

        Args:
            function: takes and returns JSON values.
            arguments: its arguments.
            path: a folder to put in front of `sys.path`.
            environ: environment variables; `None` unsets one.
        """
        request = {
            "file": function.__code__.co_filename,
            "function": function.__name__,
            "arguments": arguments,
            "path": path,
            "environ": environ,
        }
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environ
            )
        assert self._server.stdin is not None and self._server.stdout is not None
        try:
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
            answer = self._server.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            status = self._server.wait(timeout=30)
            self._server = None
            raise RuntimeError(f"the server of fresh processes ended with {status}; standard error says why")
        return Answer(**json.loads(answer))

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            assert self._server.stdin is not None
            self._server.stdin.close()
            self._server.wait(timeout=30)


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in HEAVY:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            child = os.fork()
            if child == 0:
                try:
                    signal.alarm(SECONDS)
                    _run(request, Path(folder))
                finally:
                    os._exit(70)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            value = Path(folder, "value")
            answer = {
                "value": json.loads(value.read_text()) if value.exists() else None,
                "stdout": Path(folder, "stdout").read_text(),
                "stderr": Path(folder, "stderr").read_text(),
                "status": status,
            }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _run(request: dict[str, Any], folder: Path) -> None:
    """Do what is asked; never returns."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    for name, value in request["environ"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    # As pytest has it: the test module may import what lies beside it.
    sys.path.insert(0, str(Path(request["file"]).parent))
    if request["path"] is not None:
        sys.path.insert(0, request["path"])
    status: int | str | None = 0
    try:
        spec = importlib.util.spec_from_file_location(Path(request["file"]).stem, request["file"])
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        value = getattr(module, request["function"])(*request["arguments"])
        (folder / "value").write_text(json.dumps(value))
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else int(status is not None))


if __name__ == "__main__":
    _serve()
