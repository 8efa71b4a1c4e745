"""The jobs of one application, for callers on an event loop. The database is opened once jobs may exist."""

import asyncio
import contextlib
import importlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from serve_app.errors import BadRequest, Overloaded, StageFailed, Unavailable, UnknownJob, quoted
from serve_app.jobs.config import JobsConfig, database_file, default_folder
from serve_app.jobs.job import ID, UNFINISHED, Ending, Failure, Found, Job, Kind, Open, Page, Status
from serve_app.jobs.metrics import JobMetrics

log = logging.getLogger("ray.serve")

if TYPE_CHECKING:
    from serve_app.jobs.files import JobFiles
    from serve_app.jobs.store import JobStore

STORE, FILES = "serve_app.jobs.store", "serve_app.jobs.files"
"""Modules that import SQLAlchemy and fsspec, which an ingress without jobs does not load."""
RECEIVED_WITHIN_S = 3600.0
"""Longest time for a live ingress to store a job's input files; after that, the row expires."""
THREADS = 4
"""Threads for rows, and as many others for files, which may take long but must not let a lease lapse."""
TIMEOUT_S = 30.0
"""Time limit for row operations, in case the database accepts a query and does not answer it."""
SAME_KEY = "Idempotency-Key: an earlier request had the same key and another body: give each request its own key"

Answer = TypeVar("Answer")
GiveBack = Callable[[str, float, float], None]
"""Returns a charge to a key: called with the key's name, the megapixel-steps, and the time of the charge."""


class Jobs:
    """Accepts, reports and ends jobs. All methods raise Unavailable if database or files cannot be reached."""

    def __init__(self, config: JobsConfig, application: str, give_back: GiveBack | None = None) -> None:
        """give_back: None if the server has no keys."""
        self.config, self.metrics = config, JobMetrics()
        self._give_back = give_back
        folder = default_folder(application)
        self._url = config.database or f"sqlite:///{folder / 'jobs.db'}"
        file = self._file = database_file(self._url)
        self._files_url = config.files or str((folder if file is None else file.parent) / "files")
        self._rows = ThreadPoolExecutor(THREADS, "jobs")
        self._moves = ThreadPoolExecutor(THREADS, "files of jobs")
        self._opening = asyncio.Lock()
        self._is_reached = True
        self._opened: tuple[JobStore, JobFiles] | None = None
        self._opened_file: tuple[int, int] | None = None
        self.changed = asyncio.Event()
        """Set when a runner may have work to do."""

    @property
    def may_exist(self) -> bool:
        """Whether there may be any jobs, including those from before a restart."""
        return self._opened is not None or self._file is None or self._file.exists()

    async def accept(self, job: Job, inputs: Mapping[str, bytes]) -> Job:
        """Stores the job with its input files, queues it and returns it; or returns the one accepted before.
        Raises Overloaded, or BadRequest if the one accepted before has another body.
        """
        limit, now = self.config.max_queued, time.time()
        receiving = replace(job, expires_at=now + RECEIVED_WITHIN_S)

        def keep(store: "JobStore", files: "JobFiles") -> Job | None:
            if (known := store.get(job.id, job.kind, job.owner)) is not None:
                return known
            if not store.add(receiving, limit):
                raise Overloaded(f"{limit} jobs are queued, which is the limit (jobs.max_queued)")
            try:
                files.make_folder(job.id)
                for name, data in inputs.items():
                    files.write(job.id, name, data)
            except OSError:
                store.withdraw(job.id)
                with contextlib.suppress(OSError):
                    files.remove(job.id)
                raise
            store.put_in_queue(job.id)
            return store.get(job.id, job.kind, job.owner)

        accepted = _same(await self._call(keep, in_=self._moves), job)
        self.changed.set()
        return accepted or replace(job, status="queued")

    async def accepted(self, job: Job) -> Job | None:
        """Returns the job as it is, if it was accepted before. Raises BadRequest if that one has another body."""
        if not self.may_exist:
            return None
        return _same(await self._call(lambda store, _: store.get(job.id, job.kind, job.owner)), job)

    async def get(self, job_id: str, kind: Kind, owner: str | None) -> Job:
        """Raises UnknownJob, also for a job that has expired."""
        job = None
        if self.may_exist and ID.fullmatch(job_id):
            job = await self._call(lambda store, _: store.get(job_id, kind, owner))
        if job is None or (job.expires_at is not None and job.expires_at < time.time()):
            raise UnknownJob(f"there is no {kind} {quoted(job_id)}: it was deleted, has expired, or never existed")
        return job

    async def page(self, kind: Kind, owner: str | None, page: Page) -> Found:
        is_after_none = page.after is not None and not ID.fullmatch(page.after)
        if is_after_none or not self.may_exist:
            return Found()
        return await self._call(lambda store, _: store.page(kind, owner, page))

    async def delete(self, job_id: str, kind: Kind, owner: str | None) -> None:
        """Cancels an unfinished job, whose row is kept until it expires; removes any other. Raises UnknownJob."""
        job = await self.get(job_id, kind, owner)
        now = time.time()
        expires_at = now + self.config.expire_after_s

        def end(store: "JobStore", files: "JobFiles") -> Status | None:
            before = store.cancel(job_id, now, expires_at) if job.status in UNFINISHED else None
            try:
                files.remove(job_id)
            except OSError:  # a stage may be writing to the folder; the rest is deleted when the job expires
                if before is None:
                    raise
            if before is None:
                store.remove(job_id)
            return before

        before = await self._call(end, in_=self._moves)
        if before is not None:
            self._note_end(job, "cancelled", is_free=before == "queued")
        self.changed.set()

    async def read(self, job_id: str, names: Sequence[str]) -> list[bytes]:
        return await self._call(lambda _, files: [files.read(job_id, name) for name in names], in_=self._moves)

    async def file_size(self, job_id: str, name: str) -> int:
        """Returns the size in bytes. Raises StageFailed if the file is gone."""
        return await self._call(lambda _, files: files.size(job_id, name), in_=self._moves)

    async def open_files(self) -> "JobFiles":
        """Returns the file store, for callers that read or write in pieces."""
        return await self._call(lambda _, files: files)

    async def unfinished(self, models: Sequence[str]) -> list[Open]:
        return await self._call(lambda store, _: store.unfinished(models))

    async def take(self, seen: Open, runner: str) -> Job | None:
        return await self._call(lambda store, _: store.take(seen, runner))

    async def renew(self, job_id: str, runner: str, beat: int, progress: int) -> bool:
        return await self._call(lambda store, _: store.renew(job_id, runner, beat, progress))

    async def give_back(self, job_id: str, runner: str, beat: int) -> bool:
        return await self._call(lambda store, _: store.give_back(job_id, runner, beat))

    async def end(self, job: Job, runner: str, beat: int, ending: Ending) -> bool:
        """Ends the job; returns whether it still belonged to that runner."""
        now = time.time()
        expires_at = now + self.config.expire_after_s
        has_ended = await self._call(lambda store, _: store.end(job.id, runner, beat, ending, now, expires_at))
        if has_ended:
            self._note_end(job, ending.status, is_free=ending.status == "failed")
        return has_ended

    def _note_end(self, job: Job, status: Status, *, is_free: bool) -> None:
        """Records the end of a job that has ended for good. is_free: its charge is given back."""
        self.metrics.note_ended(job.model, status)
        if is_free and job.owner is not None and self._give_back is not None:
            self._give_back(job.owner, job.asked.megapixel_steps, job.created_at)

    async def discard(self, job_id: str, names: Sequence[str]) -> None:
        """Deletes files that are no longer needed."""

        def remove(_: "JobStore", files: "JobFiles") -> None:
            for name in names:
                files.remove(job_id, name)

        await self._call(remove, in_=self._moves)

    async def discard_steps(self, job_id: str) -> None:
        """Deletes the finished steps of a job that needs no further attempt."""
        await self._call(lambda _, files: files.remove_steps(job_id), in_=self._moves)

    async def write(self, job_id: str, name: str, data: bytes) -> None:
        await self._call(lambda _, files: files.write(job_id, name, data), in_=self._moves)

    async def expire(self, served: Sequence[str]) -> None:
        """Deletes expired jobs, and fails old jobs of models that are not served.

        Files are deleted before rows, so that an interrupted deletion is repeated. served: models whose jobs this
        ingress still runs, however late.
        """
        now, config = time.time(), self.config
        timeout_s = config.expire_after_s + config.timeout_s
        failure = Failure("not_served", f"it was not finished within {timeout_s:g} s")

        def sweep(store: "JobStore", files: "JobFiles") -> list[Job]:
            lost = store.give_up(now - timeout_s, served, failure, now, now + config.expire_after_s)
            for job_id in store.expired(now):
                try:
                    files.remove(job_id)
                except OSError as error:  # go on; the next sweep tries this job again
                    log.warning("the files of the expired job %s cannot be deleted: %s", job_id, error)
                    continue
                store.remove(job_id)
            return lost

        for job in await self._call(sweep, in_=self._moves):
            self._note_end(job, "failed", is_free=True)

    async def _call(
        self, work: Callable[["JobStore", "JobFiles"], Answer], *, in_: ThreadPoolExecutor | None = None
    ) -> Answer:
        """Runs `work` in one of the threads `in_`; default: those for rows."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(TIMEOUT_S if in_ is None else None):
                opened = await self._open_once(loop)
                answer = await loop.run_in_executor(in_ or self._rows, work, *opened)
        except FileNotFoundError as error:
            raise StageFailed(f"a file of the job no longer exists: {error}") from error
        except Unavailable as error:
            self._note(error, error.__cause__)
            raise
        except OSError as error:
            has_hung = isinstance(error, TimeoutError) and in_ is None
            why = "the jobs' database does not answer" if has_hung else "the jobs' files cannot be reached"
            unavailable = Unavailable(f"{why}; try again")
            self._note(unavailable, error)
            raise unavailable from error
        self._is_reached = True
        return answer

    async def _open_once(self, loop: asyncio.AbstractEventLoop) -> "tuple[JobStore, JobFiles]":
        """Opens the store once, and again if its file was deleted: what is written to that one would be lost."""
        async with self._opening:
            if self._opened is None or (self._file is not None and _identity(self._file) != self._opened_file):
                if self._opened is not None:
                    self._opened[0].close()
                self._opened = await loop.run_in_executor(self._rows, self._open)
                self._opened_file = None if self._file is None else _identity(self._file)
            return self._opened

    def _note(self, error: Unavailable, cause: BaseException | None) -> None:
        """Logs an error with its cause, which clients are not told; once, until the store is reached again."""
        if self._is_reached:
            log.warning("%s: %s", error, cause)
        self._is_reached = False

    def _open(self) -> tuple["JobStore", "JobFiles"]:
        store: Any = importlib.import_module(STORE)
        files: Any = importlib.import_module(FILES)
        return store.JobStore(self._url), files.JobFiles(self._files_url)


def _identity(file: Path) -> tuple[int, int] | None:
    """Returns device and inode, which identify the file whatever its content; None: there is no file."""
    try:
        told = file.stat()
    except FileNotFoundError:
        return None
    return told.st_dev, told.st_ino


def _same(accepted: Job | None, asked: Job) -> Job | None:
    """Returns `accepted`, which has the same ID as `asked`. Raises BadRequest if their bodies differ."""
    if accepted is not None and not accepted.asked.is_like(asked.asked):
        raise BadRequest(SAME_KEY)
    return accepted
