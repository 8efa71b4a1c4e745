"""Takes queued jobs and runs one ingress replica's share of them; if it dies, other replicas take its jobs.

A job belongs to a runner while that runner's beats are the last ones in its row. A runner that sees no new beat
for as long as a lease lasts takes the job by one UPDATE, whose condition holds only for the first of several
runners. Every attempt writes files under names of its own, and the row that ends the job says which of them are
its outputs: however often a job is run, it ends once. Attempts share only the finished steps, from which the next
one continues.
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
from serve_app.jobs.leases import LeaseMonitor
from serve_app.models.served_models import Models

log = logging.getLogger("ray.serve")

LOOK_EVERY_S = 1.0
EXPIRE_EVERY_S = 60.0
AGAIN_AFTER_S = 1.0
"""Seconds before a retry, if the database does not answer."""
MOST_TAKEN = 5
"""A job that was interrupted this often fails, because it may be what kills the process."""
TIMEOUT_S = 5.0
"""Longest wait at shutdown for finished jobs whose end is still being written to the database."""


@dataclass(eq=False)
class Running:
    """A job that this runner runs. Other processes change its row to cancel it, or once its lease has lapsed."""

    job: Job
    beat: int
    progress: int
    told: int
    """Progress as last written to the row."""
    told_at: float = field(default_factory=time.monotonic)
    has_lost_beat: bool = False
    """Whether the database may have stored the last beat although its answer did not arrive."""
    is_ending: bool = False
    """Whether the job's end is being written; it must not be dropped then."""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the job's row is changed, so that changes are made one after another."""
    task: "asyncio.Task[None] | None" = None

    def note(self, percent: int) -> None:
        """Notes the progress. It never goes back, although a job that is taken again starts at 0."""
        self.progress = max(self.progress, percent)

    def drop(self) -> None:
        if self.task is not None and not self.is_ending:
            self.task.cancel()


class Runner:
    """Runs jobs in one ingress replica, for as long as its `lifespan` lasts."""

    def __init__(self, jobs: Jobs, models: Models) -> None:
        self._jobs, self._models = jobs, models
        self._name = secrets.token_hex(8)
        self._leases = LeaseMonitor(jobs.config.lease_s)
        self._running: dict[str, Running] = {}

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Any) -> AsyncIterator[None]:
        """Runs jobs while the HTTP application lives, and then gives unfinished ones back."""
        working = [asyncio.create_task(work) for work in (self._look_on(), self._expire_on())]
        try:
            yield
        finally:
            for task in working:
                task.cancel()
            await self._give_back()

    async def _look_on(self) -> None:
        """Looks for jobs every LOOK_EVERY_S seconds, or at once when `changed` is set. Never returns."""
        while True:
            self._jobs.changed.clear()
            await self._try(self._look)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._jobs.changed.wait()

    async def _expire_on(self) -> None:
        """Deletes expired jobs periodically. Runs beside `_look_on`, so that slow deletions cost no lease."""
        while True:
            await self._try(lambda: self._jobs.expire(self._models.names))
            await asyncio.sleep(EXPIRE_EVERY_S)

    async def _try(self, work: Callable[[], Awaitable[None]]) -> None:
        """Does the work if jobs may exist. Does not raise if it fails, because it is tried again later."""
        if not self._jobs.may_exist:
            return
        try:
            await work()
        except Unavailable:  # Jobs has logged it
            pass
        except Exception:
            log.exception("jobs could not be checked; trying again")

    async def _look(self) -> None:
        known = list(self._running.values())
        seen = await self._jobs.unfinished(self._models.names)
        self._jobs.metrics.note_open(self._models.names, seen)
        own = {job.id for job in seen if job.runner == self._name}
        for running in known:
            if running.job.id in own:
                await self._renew(running)
            else:  # cancelled, or taken by another runner
                running.drop()
        # This includes jobs that this runner took without knowing, because the database's answer was lost.
        of_others = [job for job in seen if job.status == "in_progress" and job.id not in self._running]
        lapsed = self._leases.lapsed(of_others)
        for job in (*lapsed, *(job for job in seen if job.status == "queued")):
            if len(self._running) >= self._jobs.config.max_running:
                break
            await self._take(job)

    async def _renew(self, running: Running) -> None:
        """Writes a beat if the progress has changed, or if the last one is a quarter of a lease old."""
        is_silent = time.monotonic() - running.told_at > self._jobs.config.lease_s / 4
        if running.progress == running.told and not is_silent:
            return
        async with running.turn:
            progress = running.progress
            if running.is_ending:
                return
            if not await self._beat(running, progress):
                running.drop()
                return
            running.told, running.told_at = progress, time.monotonic()

    async def _beat(self, running: Running, progress: int) -> bool:
        """Writes a beat; returns whether the job still belongs to this runner."""
        running.has_lost_beat = True
        is_own = await self._jobs.renew(running.job.id, self._name, running.beat, progress)
        running.has_lost_beat = False
        running.beat += is_own
        return is_own

    async def _take(self, seen: Open) -> None:
        job = await self._jobs.take(seen, self._name)
        if job is None:
            return
        if seen.status == "in_progress":
            log.warning("job %s is continued, because its ingress was lost", job.id)
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
                kept = [file for output in ending.outputs for file in output.files]
                await self._discard(job, [name for names in job.asked.inputs.values() for name in names])
                with contextlib.suppress(Unavailable):
                    await self._jobs.discard_steps(job.id)
            await self._discard(job, [name for name in attempt.files if name not in kept])
        finally:
            del self._running[job.id]
            self._jobs.changed.set()

    async def _end(self, running: Running, ending: Ending) -> bool:
        """Writes the job's end, retrying until the database answers; returns whether the job has ended so."""
        running.is_ending = True
        async with running.turn:
            while True:
                try:
                    if running.has_lost_beat:
                        await self._beat(running, running.progress)
                    return await self._jobs.end(running.job, self._name, running.beat, ending)
                except Unavailable:
                    await asyncio.sleep(AGAIN_AFTER_S)

    async def _discard(self, job: Job, names: Sequence[str]) -> None:
        """Deletes files. Any that cannot be deleted remain until the job expires."""
        with contextlib.suppress(Unavailable):
            await self._jobs.discard(job.id, names)

    async def _give_back(self) -> None:
        """Puts unfinished jobs back into the queue, so that they need not wait until their leases lapse."""
        ending = [each.task for each in self._running.values() if each.is_ending and each.task is not None]
        for running in [each for each in self._running.values() if not each.is_ending]:
            running.drop()
            with contextlib.suppress(RelayError):
                async with running.turn:
                    await self._jobs.give_back(running.job.id, self._name, running.beat)
        if ending:
            await asyncio.wait(ending, timeout=TIMEOUT_S)


async def _ending(job: Job, attempt: Attempt) -> Ending:
    try:
        if job.num_taken > MOST_TAKEN:
            raise StageFailed(
                f"the process that drew the job was lost {MOST_TAKEN} times: this job may be the cause"
            )
        return Ending("completed", await attempt.draw())
    except Exception as raised:
        error = as_relay_error(raised)
        return Ending("failed", failure=Failure(error.code or error.kind, error.message, error.param))
