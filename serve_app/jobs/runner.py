"""Takes jobs up and has them drawn, one ingress replica's share; whatever dies, another takes them up again.

A job is its runner's while the runner's beats of it are the last. Whoever sees none for as long as a lease lasts
takes it by one UPDATE, in which only the first of several finds what it expects. Every attempt writes files of its
own names, and which are the job's is said by the row that ends it: however often it is drawn, it ends once.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve_app.errors import RelayError, StageFailed, Unavailable, as_relay_error
from serve_app.jobs.drawing import Attempt
from serve_app.jobs.job import Ending, Failure, Job, Open
from serve_app.jobs.jobs import Jobs
from serve_app.jobs.leases import Leases
from serve_app.models import Models

log = logging.getLogger("ray.serve")

LOOK_EVERY_S = 1.0
EXPIRE_EVERY_S = 60.0
AGAIN_AFTER_S = 1.0
"""Where the database does not answer."""
MOST_TAKEN = 5
"""A job that was cut off so often may be what kills."""
PATIENCE_S = 5.0
"""At the end, for jobs that are done and only told of."""


@dataclass(eq=False)
class Running:
    """A job that this runner draws. Others change its row to cancel it, or once its lease has lapsed."""

    job: Job
    beat: int
    progress: int
    told: int
    """Progress, as others see it."""
    told_at: float = field(default_factory=time.monotonic)
    is_ending: bool = False
    """What came of it is being told: it is not to be dropped."""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """For what is said of it, one after another."""
    task: "asyncio.Task[None] | None" = None

    def note(self, percent: int) -> None:
        """Progress. It never goes back, though a job that is taken up again begins anew."""
        self.progress = max(self.progress, percent)

    def drop(self) -> None:
        if self.task is not None and not self.is_ending:
            self.task.cancel()


class Runner:
    """Of one ingress replica. It works while its `lifespan` lasts."""

    def __init__(self, jobs: Jobs, models: Models) -> None:
        self._jobs, self._models = jobs, models
        self._name = secrets.token_hex(8)
        self._leases = Leases(jobs.config.lease_s)
        self._running: dict[str, Running] = {}

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Any) -> AsyncIterator[None]:
        """Of the HTTP application."""
        working = [asyncio.create_task(work) for work in (self._look_on(), self._expire_on())]
        try:
            yield
        finally:
            for task in working:
                task.cancel()
            await self._give_back()

    async def _look_on(self) -> None:
        """For ever."""
        while True:
            self._jobs.changed.clear()
            await self._try(self._look)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._jobs.changed.wait()

    async def _expire_on(self) -> None:
        """For ever; beside the other, for files that are deleted slowly are no reason to lose a lease."""
        while True:
            await self._try(self._jobs.expire)
            await asyncio.sleep(EXPIRE_EVERY_S)

    async def _try(self, work: Callable[[], Awaitable[None]]) -> None:
        """Where it fails, the next time may be better."""
        if not self._jobs.may_exist:
            return
        try:
            await work()
        except Unavailable:  # logged where it was asked
            pass
        except Exception:
            log.exception("jobs could not be looked after; the next try follows")

    async def _look(self) -> None:
        known = list(self._running.values())
        seen = await self._jobs.unfinished(self._models.names)
        own = {job.id for job in seen if job.runner == self._name}
        for running in known:
            if running.job.id in own:
                await self._renew(running)
            else:  # cancelled, or another's
                running.drop()
        # Also what is in this runner's name, if the answer to taking it was lost.
        of_others = [job for job in seen if job.status == "in_progress" and job.id not in self._running]
        lapsed = self._leases.lapsed(of_others)
        for job in (*lapsed, *(job for job in seen if job.status == "queued")):
            if len(self._running) >= self._jobs.config.max_running:
                break
            await self._take(job)

    async def _renew(self, running: Running) -> None:
        """Where there is news, or nothing was said for a while."""
        is_silent = time.monotonic() - running.told_at > self._jobs.config.lease_s / 4
        if running.progress == running.told and not is_silent:
            return
        async with running.turn:
            progress = running.progress
            if running.is_ending:
                return
            if not await self._jobs.renew(running.job.id, self._name, running.beat, progress):
                running.drop()
                return
            running.beat += 1
            running.told, running.told_at = progress, time.monotonic()

    async def _take(self, seen: Open) -> None:
        job = await self._jobs.take(seen, self._name)
        if job is None:
            return
        if seen.status == "in_progress":
            log.warning("job %s: its ingress was lost, and it is taken up again", job.id)
        running = self._running[job.id] = Running(job, job.beat, job.progress, job.progress)
        running.task = asyncio.create_task(self._run(running))

    async def _run(self, running: Running) -> None:
        job = running.job
        attempt = Attempt(self._jobs, job, self._models.find, running.note)
        try:
            try:
                ending = await _ending(job, attempt)
            except asyncio.CancelledError:
                await asyncio.shield(self._discard(job, attempt.files))
                raise
            kept: list[str] = []
            if await self._end(running, ending):
                kept = [output.file for output in ending.outputs]
                await self._discard(job, [name for names in job.asked.inputs.values() for name in names])
            await self._discard(job, [name for name in attempt.files if name not in kept])
        finally:
            del self._running[job.id]
            self._jobs.changed.set()

    async def _end(self, running: Running, ending: Ending) -> bool:
        """Whether it has ended so; however long the database does not answer."""
        running.is_ending = True
        async with running.turn:
            while True:
                try:
                    return await self._jobs.end(running.job.id, self._name, running.beat, ending)
                except Unavailable:
                    await asyncio.sleep(AGAIN_AFTER_S)

    async def _discard(self, job: Job, names: Sequence[str]) -> None:
        """What stays, stays until the job expires."""
        with contextlib.suppress(Unavailable):
            await self._jobs.discard(job.id, names)

    async def _give_back(self) -> None:
        """So that nobody has to wait until leases lapse."""
        ending = [each.task for each in self._running.values() if each.is_ending and each.task is not None]
        for running in [each for each in self._running.values() if not each.is_ending]:
            running.drop()
            with contextlib.suppress(RelayError):
                async with running.turn:
                    await self._jobs.give_back(running.job.id, self._name, running.beat)
        if ending:
            await asyncio.wait(ending, timeout=PATIENCE_S)


async def _ending(job: Job, attempt: Attempt) -> Ending:
    try:
        if job.num_taken > MOST_TAKEN:
            raise StageFailed(f"whatever drew it was lost, {MOST_TAKEN} times: it may be what kills")
        return Ending("completed", await attempt.draw())
    except Exception as raised:
        error = as_relay_error(raised)
        return Ending("failed", failure=Failure(error.code or error.kind, error.message, error.param))
