"""The doctor in forked processes, each of which takes itself for a Python of the environment that it is asked about.

A run of its own takes most of a second for what is the same each time: to import the command line, and to parse verl
and vLLM.  Run as a script (`python -I -S doctor_process.py`), this imports the one and keeps the trees of the other,
and forks a child for each request, which starts as Python does there: prefix, path, *.pth files, sitecustomize.

A request is a line of JSON on standard input: `packages` first, where to import from; then what `run` takes.  The
answer is the status and the CPU time, on a line of the file descriptor that standard output was.
"""

from __future__ import annotations

import ast
import functools
import gc
import importlib
import json
import os
import resource
import site
import subprocess
import sys
from pathlib import Path
from typing import Any


class DoctorProcesses:
    """The server, seen from a test; it ends with the process that started it."""

    def __init__(self, packages: list[str]) -> None:
        command = [sys.executable, "-I", "-S", __file__]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._send(packages)

    def _send(self, what: Any) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(what) + "\n")
        self._server.stdin.flush()

    def __call__(self, **request: Any) -> tuple[int, float]:
        """Run the doctor, and return its exit status and the seconds of CPU time that it took."""
        self._send(request)
        assert self._server.stdout is not None
        status, seconds = self._server.stdout.readline().split()
        return int(status), float(seconds)


def serve() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    paths, finders = list(sys.path[1:]), list(sys.meta_path)  # without this script's folder
    sys.path += json.loads(sys.stdin.readline())
    from verl_ascend_rollout.tools import cli
    from verl_ascend_rollout.tools.doctor import examine

    ast.parse = functools.lru_cache(maxsize=None)(ast.parse)  # type: ignore[assignment]
    examine.examine()
    for name, module in list(sys.modules.items()):
        if name.startswith("verl_ascend_rollout"):
            for cached in vars(module).values():
                getattr(cached, "cache_clear", bool)()  # what it knows of this process
    gc.freeze()
    sys.path[:], sys.meta_path[:] = paths, finders
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 70
            try:
                status = run(cli, **json.loads(line))
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, status, used = os.wait4(child, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)} {used.ru_utime + used.ru_stime}\n")
        answers.flush()


def run(
    cli: Any, python: str, cwd: str, environ: dict[str, str], limits: list[int] | None, options: list[str], out: str
) -> int:
    """Become the Python that is named, in a folder, and run its doctor; standard output and error go into OUT.*."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{out}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    if limits is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limits[0], limits[1]))
    # As Python's own start does it: `-m` puts the working directory first, and the variable goes before the library.
    first = [] if environ.get("PYTHONSAFEPATH") else [cwd]
    named = [path or cwd for path in environ.get("PYTHONPATH", "").split(os.pathsep)] if "PYTHONPATH" in environ else []
    sys.path[:0] = [*first, *named]
    sys.executable, sys.prefix = python, str(Path(python).parents[1])
    sys.exec_prefix = sys.prefix
    sys.path_importer_cache.clear()
    importlib.invalidate_caches()
    site.main()
    sys.argv = ["ascend-safe", "doctor", *options]
    try:
        return int(cli.main(["doctor", *options]))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


if __name__ == "__main__":
    serve()
