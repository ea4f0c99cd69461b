"""The death of an engine: noticed when it happens, said in one sentence, and the end of every wait for that engine.

vLLM notices as well, and tells those who ask next; whoever waits already for an answer of an EngineCore that was
killed waits for ever (vLLM 0.28, v1/engine/core_client.py: nothing fails `utility_results`), and a worker's death may
go unseen while its EngineCore waits for that worker's answer.  So the rollout server looks at the processes itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import socket
from collections.abc import Awaitable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any, Literal, TypeVar

import psutil

from verl_ascend_rollout.engine import causes

Result = TypeVar("Result")

POLL_SECONDS = 0.25
"""How often the processes are looked at."""

LAST_WORDS_SECONDS = 1.0
"""How long the other processes of an engine may take to end by themselves, and to write down why."""

PARTS = {"EngineCore": "EngineCore", "VLLM_DP_Coordinator": "DP coordinator"}
"""What the server's process starts of an engine, by how its name begins.  Without the coordinator the engines of a
model with experts wait for each other for ever, and vLLM looks at the EngineCores only (0.28, v1/engine/utils.py:222
and coordinator.py:103)."""

VLLM_REPORTED = "vLLM reported that its EngineCore failed"
"""The cause where no process had ended yet."""


class EngineDiedError(RuntimeError):
    """A process of the rollout engine has ended.  One sentence: which engine, why, and which log has its last words."""


@dataclass
class Watch:
    """Looks at the processes of one engine, from before it is made, until one has ended.

    Attributes:
        cause: why the engine is dead, as a clause, as soon as it is known to be; `watch` returns what was behind it.
        engine: vLLM's `AsyncLLM`, once it is there.
        cores: its processes that this process has started (`PARTS`), by process id.
        workers: its workers on this host, and what each is called.
        printed: what it prints.
    """

    cause: asyncio.Future[str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    engine: Any = None
    cores: dict[int, BaseProcess] = field(default_factory=dict)
    workers: dict[psutil.Process, str] = field(default_factory=dict)
    printed: causes.Printed = field(default_factory=causes.Printed)

    def follow(self, workers: list[dict[str, Any]]) -> None:
        """Look at the workers as well.

        Args:
            workers: what they said of themselves, by rank: `pid` and `host`.
        """
        for rank, worker in enumerate(workers):
            if worker["host"] == socket.gethostname():
                with contextlib.suppress(psutil.NoSuchProcess):  # then its EngineCore ends too
                    self.workers[psutil.Process(worker["pid"])] = f"worker {rank}"

    @property
    def died(self) -> bool:
        """Whether the engine is known to be dead."""
        return self.cause.done()

    def said(self) -> str:
        """Return the error that the dead engine printed; empty where a signal ended it first, so that nothing printed
        is the cause."""
        if self._signals():
            return ""
        return (causes.root_error if self.engine is None else causes.fatal_error)(self.printed.lines())

    def look(self) -> bool:
        """Look at the processes now; whether the engine is dead."""
        if self.died:
            return True
        for child in multiprocessing.active_children():
            if child.name.startswith(tuple(PARTS)) and child.pid is not None:
                self.cores.setdefault(child.pid, child)
        if gone := self._gone():
            self.cause.set_result(gone)
        elif self.engine is not None and self.engine.errored:
            self.cause.set_result(VLLM_REPORTED)
        return self.died

    async def watch(self) -> str:
        """Wait for the engine's death, then end what is left of it; return why, as a clause.  Does not raise."""
        while not self.look():
            await asyncio.sleep(POLL_SECONDS)
        await asyncio.sleep(LAST_WORDS_SECONDS)
        cause, said = self.cause.result(), self.said()
        # The kernel takes a while to clear a large process away; workers, which end with it, or vLLM may be sooner.
        killed = [pid for pid, number in self._signals().items() if number == signal.SIGKILL]
        if killed and f"(process {killed[0]})" not in cause:
            cause = f"its {self._called(killed[0])} {self._how()}"
        elif cause == VLLM_REPORTED and not said:  # a worker has ended without a word
            cause = self._gone() or cause
        self.kill()
        return f"{cause} ({said})" if said else cause

    async def while_alive(self, call: Awaitable[Result]) -> Result:
        """Return what `call` returns.

        Raises:
            EngineDiedError: the engine died before it had an answer, and `call` was cancelled; the cause alone.
            Exception: whatever `call` raises while the engine lives.
        """
        if self.died and asyncio.iscoroutine(call):
            call.close()  # nothing of it is for the engine that may be there next
            raise EngineDiedError(self.cause.result())
        task = asyncio.ensure_future(call)
        try:
            await asyncio.wait((task, self.cause), return_when=asyncio.FIRST_COMPLETED)
            if task.done() and not task.cancelled() and task.exception() is not None:
                self.look()  # vLLM may have been sooner to notice
        finally:
            if not task.done():
                task.cancel()
                # What it holds (a lock) is let go of before anyone goes on.
                await asyncio.wait((task,))
        if self.died and (task.cancelled() or task.exception() is not None):
            raise EngineDiedError(self.cause.result()) from None
        return task.result()

    def _gone(self) -> str:
        """Return which processes have ended, and how; empty where none has."""
        gone = [f"its {self._called(pid)}" for pid, core in self.cores.items() if not core.is_alive()]
        gone += [f"its {name} (process {process.pid})" for process, name in self.workers.items() if not _lives(process)]
        return f"{' and '.join(gone)} {self._how()}" if gone else ""

    def _called(self, pid: int) -> str:
        part = next(part for name, part in PARTS.items() if self.cores[pid].name.startswith(name))
        return f"{part} (process {pid})"

    def _how(self) -> str:
        """Return how it ended, as far as can be known: of a worker, which is no child of this process, it cannot."""
        for number in self._signals().values():
            hint = ", as the kernel does it when memory runs out" if number == signal.SIGKILL else ""
            return f"ended by {number.name}{hint}"
        code = next((core.exitcode for core in self.cores.values() if core.exitcode is not None), -1)
        return "ended without being asked to" if code < 0 else f"ended with exit code {code}"

    def _signals(self) -> dict[int, signal.Signals]:
        """Return which signal ended which EngineCore; none where they had printed before that they end."""
        ended = {pid: core.exitcode for pid, core in self.cores.items()}
        found = {pid: signal.Signals(-code) for pid, code in ended.items() if code is not None and code < 0}
        return {} if found and causes.is_given_up(self.printed.lines()) else found

    def kill(self) -> None:
        """Kill what is left of the engine, which could otherwise outlive the job."""
        for process in self.workers:
            with contextlib.suppress(psutil.Error):
                process.kill()
        for core in self.cores.values():
            core.kill()
            core.join(LAST_WORDS_SECONDS)


def _lives(process: psutil.Process) -> bool:
    try:
        # A process that nobody has waited for is there, as a zombie.
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def log_of_this_process(stream: Literal[1, 2] = 2) -> str:
    """Return where this process and those that it started write to: the engine's last words are there.

    Args:
        stream: 1 for what vLLM logs, 2 for what a process says that dies.
    """
    with contextlib.suppress(OSError):
        target = os.readlink(f"/proc/self/fd/{stream}")
        if target.startswith("/") and not target.startswith("/dev/"):
            return f"{target} on {socket.gethostname()}"
    return f"the log of the rollout server (process {os.getpid()} on {socket.gethostname()})"
