"""Our gate for requests, where verl has none: verl 0.7.1, 0.8.0, 0.9.0 and main.

verl 0.9.1 lets requests wait while a server is aborted (`_park_until_admitted`), and our server stands behind that
gate.  Without it a request would reach an engine that is asleep.
"""

from __future__ import annotations

from typing import Any

from verl.workers.rollout.replica import RolloutMode

from verl_ascend_rollout.integration.server import AscendSafeHttpServer


class AscendSafeGatedHttpServer(AscendSafeHttpServer):
    """Our server with a gate of its own."""

    async def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate, once memory is there and no abort is on.

        Raises:
            EngineNotReadyError: with the step that failed.
        """
        self._refuse_stale()
        while self._waits() or self._life.aborted:
            await self._changed.wait()
            self._refuse_stale()
        return await super().generate(*args, **kwargs)

    async def resume_generation(self) -> None:
        """End an abort: verl's server would resume the engine, and the next step of ours would pause it again."""
        await self.resume_engine_generation()

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """Take memory back, which ends an abort.

        verl 0.9.0 relies on vLLM for that: a wake-up of the whole engine resumes the scheduler, and verl does not
        always call `resume_generation` besides.
        """
        await super().wake_up(tags)
        if self._life.aborted and self._life.state == "awake" and self.rollout_mode != RolloutMode.STANDALONE:
            await self.resume_engine_generation()

    async def abort_all_requests(self, *args: Any, **kwargs: Any) -> Any:
        """Abort, and fail where verl 0.9.0 only reports that it could not: weights must not change under requests.

        Raises:
            RuntimeError: with the engine's own words.
        """
        report = await super().abort_all_requests(*args, **kwargs)
        if self._has_engine() and "error" in report:
            raise RuntimeError(f"The requests in flight could not be aborted: {report['error']}")
        # Before vLLM 0.12 verl only aborts: who comes past our gate, by vLLM's own server, would run during a sync.
        async with self._step:
            await self._run_or_pause()
        return report
