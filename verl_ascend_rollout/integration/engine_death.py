"""The end of a job whose rollout engine is dead: the trainer ends with one sentence, and soon.

A trainer need not notice by itself.  verl's V1 trainer polls for finished prompts and refills those that failed,
without end (verl 0.9.1, trainer/ppo/v1/replay_buffer.py); so the process that has the replicas asks their servers,
which answer when the engine has died (`AscendSafeHttpServer.engine_death`), and interrupts its own `fit`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from verl_ascend_rollout.engine.death import EngineDiedError

logger = logging.getLogger("verl_ascend_rollout.server")

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


@contextlib.contextmanager
def ends_the_job() -> Iterator[None]:
    """Run a trainer's loop, and end it when a rollout engine has died.

    Raises:
        EngineDiedError: with which engine, why, and which log; in place of whatever else the death made fail.
    """
    watcher = _Watcher()
    watcher.start()
    try:
        yield
    except BaseException:
        watcher.left = True
        if watcher.finish(patience=PATIENCE):
            raise EngineDiedError(watcher.sentence) from None
        raise
    finally:
        watcher.left = True
        watcher.finish()


class _Watcher(threading.Thread):
    def __init__(self) -> None:
        super().__init__(name="ascend-safe-engine-death", daemon=True)
        self.sentence = ""
        # The loop has ended: it is interrupted no more.
        self.left = False
        self._interruptible = threading.current_thread() is threading.main_thread()
        if self._interruptible:  # no other takes signals
            signal.signal(INTERRUPT, self._on_signal)
        self._ended = threading.Event()
        self._found = threading.Event()

    def _on_signal(self, number: int, _: object) -> None:
        # A wait of Ray's heeds no other exception of a signal's handler (ray 2.60, _raylet.pyx, check_signals).
        if not self.left:
            raise KeyboardInterrupt

    def finish(self, patience: float = 0.0) -> bool:
        """Stop watching; whether an engine has died."""
        died = self._found.wait(patience)
        self._ended.set()
        return died

    def run(self) -> None:
        import ray

        asked: dict[Any, Any] = {}
        while not self._ended.is_set():
            servers = {server for replica in _replicas for server in getattr(replica, "servers", None) or ()}
            for server in servers - set(asked.values()):
                asked[server.engine_death.remote()] = server
            answered = ray.wait(list(asked), timeout=POLL_SECONDS)[0] if asked else []
            if not answered:
                self._ended.wait(POLL_SECONDS)
                continue
            try:
                self.sentence = str(ray.get(answered[0]))
            except Exception as error:
                first = str(error).strip().splitlines()[0]
                self.sentence = f"A rollout server died, and its engine with it: {type(error).__name__}: {first}"
            self._found.set()
            self._interrupt()

    def _interrupt(self) -> None:
        """Raise KeyboardInterrupt in the loop; if that does not end it, end this process."""
        for _ in range(INTERRUPTIONS):
            if self._ended.is_set():
                return
            if self._interruptible:
                signal.pthread_kill(threading.main_thread().ident or 0, INTERRUPT)
            self._ended.wait(1.0)
        print(f"ascend_safe: {self.sentence}", file=sys.stderr, flush=True)
        os._exit(1)
