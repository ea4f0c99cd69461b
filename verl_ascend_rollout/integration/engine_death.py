"""The end of a job whose rollout engine, or what stands between engine and trainer, is dead: one sentence, and soon.

A trainer need not notice by itself.  verl's V1 trainer polls for finished prompts and refills those that failed,
without end (verl 0.9.1, trainer/ppo/v1/replay_buffer.py); so the process that has the replicas asks their servers,
which answer when the engine has died (`AscendSafeHttpServer.engine_death`), and interrupts its own `fit`.  The same
with the workers that run the prompts and score the answers: of one that is gone (Ray kills some of them when a node's
memory runs out) no prompt comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import re
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from verl_ascend_rollout.engine.death import EngineDiedError

logger = logging.getLogger("verl_ascend_rollout.server")

Result = TypeVar("Result")

POLL_SECONDS = 0.5

PATIENCE = 5.0
"""Seconds for which a loop that failed waits for a server to say that its engine is dead: the call that the death made
fail is sooner than the server's answer, which on a busy machine took longer than one."""

INTERRUPTIONS = 6
"""Of a `fit` that goes on all the same, a second apart; then its process ends."""

INTERRUPT = signal.SIGRTMIN
"""Not SIGINT, which Ray blocks in its workers; nor one that a user's code may have a use for."""

_replicas: weakref.WeakSet[Any] = weakref.WeakSet()


def follow(replica: Any) -> None:
    """End this process's training when one of `replica.servers` has lost its engine."""
    _replicas.add(replica)


class WorkerDiedError(RuntimeError):
    """A worker of verl's is dead that the trainer would wait for.  One sentence: which, and what Ray says of it."""


@contextlib.contextmanager
def ends_the_job(workers: Sequence[Any] = ()) -> Iterator[None]:
    """Run a trainer's loop, and end it when a rollout engine has died.

    Args:
        workers: actors without which the loop waits for ever.

    Raises:
        EngineDiedError: with which engine, why, and which log; in place of whatever else the death made fail.
        WorkerDiedError: one of the workers died.
    """
    interrupt = None
    if threading.current_thread() is threading.main_thread():  # no other takes signals
        signal.signal(INTERRUPT, lambda *_: watcher.on_signal())
        main = threading.main_thread().ident or 0
        interrupt = functools.partial(signal.pthread_kill, main, INTERRUPT)
    watcher = _Watcher(workers, interrupt)
    watcher.start()
    try:
        yield
    except BaseException:
        watcher.left = True
        if watcher.finish(patience=PATIENCE):
            raise watcher.found from None
        raise
    finally:
        watcher.left = True
        watcher.finish()


async def end_with_the_engines(training: Coroutine[Any, Any, Result]) -> Result:
    """Run an asynchronous trainer's loop, and cancel it when a rollout engine has died.

    A loop that has ended by itself is asked about too, for `PATIENCE` seconds: verl's keeps to itself what its parts
    raise (verl 0.9.1, experimental/fully_async_policy/fully_async_rollouter.py:1099).

    Raises:
        EngineDiedError: with which engine, why, and which log.
        Exception: whatever the loop raises while the engines live.
    """
    task, loop = asyncio.ensure_future(training), asyncio.get_running_loop()
    watcher = _Watcher((), lambda: loop.call_soon_threadsafe(task.cancel))
    watcher.start()
    try:
        await asyncio.wait((task,))
        if await asyncio.to_thread(watcher.finish, PATIENCE):
            raise watcher.found
    finally:
        task.cancel()
        watcher.finish()
    return task.result()


class _Watcher(threading.Thread):
    def __init__(self, workers: Sequence[Any], interrupt: Callable[[], object] | None) -> None:
        """See `ends_the_job`.

        Args:
            workers: actors without which the loop waits for ever.
            interrupt: ends the loop's wait, if it can be ended.
        """
        super().__init__(name="ascend-safe-engine-death", daemon=True)
        self.found: EngineDiedError | WorkerDiedError = EngineDiedError()
        # The loop has ended: it is interrupted no more.
        self.left = False
        self._workers = frozenset(workers)
        self._interrupt_once = interrupt
        self._ended = threading.Event()
        self._died = threading.Event()

    def on_signal(self) -> None:
        """End the wait of the main thread."""
        # A wait of Ray's heeds no other exception of a signal's handler (ray 2.60, _raylet.pyx, check_signals).
        if not self.left:
            raise KeyboardInterrupt

    def finish(self, patience: float = 0.0) -> bool:
        """Stop watching; whether something has died."""
        died = self._died.wait(patience)
        self._ended.set()
        return died

    def run(self) -> None:
        import ray

        asked: dict[Any, Any] = {}
        while not self._ended.is_set():
            # Servers first, whose answer is a death: `ray.wait` takes what is ready in this order.
            servers = {server for replica in _replicas for server in getattr(replica, "servers", None) or ()}
            for server in servers.difference(asked.values()):
                asked = {server.engine_death.remote(): server, **asked}
            for worker in self._workers.difference(asked.values()):
                asked[worker.__ray_ready__.remote()] = worker
            answered = ray.wait(list(asked), timeout=POLL_SECONDS)[0] if asked else []
            if answered:
                actor = asked.pop(answered[0])
                found = _death_of_server(answered[0]) if actor in servers else _death_of_worker(answered[0])
                if found is not None:
                    self.found = found
                    self._died.set()
                    self._interrupt()
                    return
            self._ended.wait(POLL_SECONDS)

    def _interrupt(self) -> None:
        """Interrupt the loop; if that does not end it, end this process."""
        for _ in range(INTERRUPTIONS):
            if self._ended.is_set():
                return
            if self._interrupt_once is not None:
                self._interrupt_once()
            self._ended.wait(1.0)
        print(f"ascend_safe: {self.found}", file=sys.stderr, flush=True)
        os._exit(1)


def _death_of_server(answer: Any) -> EngineDiedError | None:
    """Return what a server says of its engine's death, or what to say of one that is dead itself; `None` of one that
    cannot be reached just now."""
    said, who, why = _ask(answer)
    if why:
        return EngineDiedError(f"A rollout server{who and f', {who},'} died, and its engine with it: {why}")
    return EngineDiedError(said) if said else None


def _death_of_worker(answer: Any) -> WorkerDiedError | None:
    """Return what to say of a worker that is dead; `None` of one that answers, or cannot be reached just now."""
    _, who, why = _ask(answer)
    if not why:
        return None
    return WorkerDiedError(f"{who or 'A worker'} of this job died, and the trainer would wait for it for ever: {why}")


def _ask(answer: Any) -> tuple[str, str, str]:
    """Return what an actor answered; or, as Ray says it, which is dead, and why; all empty where it cannot be reached
    just now."""
    import ray

    try:
        return str(ray.get(answer)), "", ""
    except ray.exceptions.ActorUnavailableError:
        return "", "", ""
    except Exception as error:
        said = str(error)
        facts = dict(re.findall(r"^\s*(class_name|pid|ip): (\S+)", said, re.MULTILINE))
        who = facts.get("class_name", "")
        if "pid" in facts:
            who = f"{who} (process {facts['pid']} on {facts.get('ip')})"
        why = re.search(r"Worker exit type: [^.]*", said)
        return "", who, why[0].strip() if why else _first_line(error)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
