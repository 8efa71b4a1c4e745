"""The jobs of one application, as an event loop sees them. Their database is opened once there may be any."""

import asyncio
import importlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from serve_app.errors import Overloaded, StageFailed, Unavailable, UnknownJob, quoted
from serve_app.jobs.config import JobsConfig, database_file, default_folder
from serve_app.jobs.job import UNFINISHED, Ending, Failure, Found, Job, Kind, Open, Page

log = logging.getLogger("ray.serve")

if TYPE_CHECKING:
    from serve_app.jobs.files import JobFiles
    from serve_app.jobs.store import JobStore

STORE, FILES = "serve_app.jobs.store", "serve_app.jobs.files"
"""They import SQLAlchemy and fsspec, which an ingress without jobs does without."""
RECEIVED_WITHIN_S = 3600.0
"""What goes in, by an ingress that lives."""
THREADS = 4
"""For rows, and as many for files, which may take long: no lease lapses for them."""

Answer = TypeVar("Answer")


class Jobs:
    """Accepts, tells of and ends jobs. All raise Unavailable where database or files cannot be reached."""

    def __init__(self, config: JobsConfig, application: str) -> None:
        self.config = config
        folder = default_folder(application)
        self._url = config.database or f"sqlite:///{folder / 'jobs.db'}"
        file = self._file = database_file(self._url)
        self._files_url = config.files or str((folder if file is None else file.parent) / "files")
        self._rows = ThreadPoolExecutor(THREADS, "jobs")
        self._moves = ThreadPoolExecutor(THREADS, "files of jobs")
        self._opening = asyncio.Lock()
        self._is_reached = True
        self._opened: tuple[JobStore, JobFiles] | None = None
        self.changed = asyncio.Event()
        """Set when a runner may have something to do."""

    @property
    def may_exist(self) -> bool:
        """Whether there may be any job, here or from before."""
        return self._opened is not None or self._file is None or self._file.exists()

    async def accept(self, job: Job, inputs: Mapping[str, bytes]) -> Job:
        """Queued, once it is stored with what goes in; as it is, if it was accepted before. Raises Overloaded."""
        limit, now = self.config.max_queued, time.time()
        receiving = replace(job, expires_at=now + RECEIVED_WITHIN_S)

        def keep(store: "JobStore", files: "JobFiles") -> Job | None:
            if (known := store.get(job.id, job.kind, job.owner)) is not None:
                return known
            if not store.add(receiving, limit):
                raise Overloaded(f"{limit} jobs are queued, the limit (jobs.max_queued)")
            try:
                files.make_folder(job.id)
                for name, data in inputs.items():
                    files.write(job.id, name, data)
            except OSError:
                store.withdraw(job.id)
                raise
            store.put_in_queue(job.id)
            return store.get(job.id, job.kind, job.owner)

        accepted = await self._call(keep, in_=self._moves)
        self.changed.set()
        return accepted or replace(job, status="queued")

    async def get(self, job_id: str, kind: Kind, owner: str | None) -> Job:
        """Raises UnknownJob, also of one that has expired."""
        job = None
        if self.may_exist:
            job = await self._call(lambda store, _: store.get(job_id, kind, owner))
        if job is None or (job.expires_at is not None and job.expires_at < time.time()):
            raise UnknownJob(f"there is no {kind} {quoted(job_id)}: it was deleted, has expired, or never was")
        return job

    async def page(self, kind: Kind, owner: str | None, page: Page) -> Found:
        return await self._call(lambda store, _: store.page(kind, owner, page)) if self.may_exist else Found()

    async def delete(self, job_id: str, kind: Kind, owner: str | None) -> None:
        """Cancels one that has not ended, which is kept until it expires; removes others. Raises UnknownJob."""
        job = await self.get(job_id, kind, owner)
        now = time.time()
        expires_at = now + self.config.expire_after_s

        def end(store: "JobStore", files: "JobFiles") -> None:
            is_cancelled = job.status in UNFINISHED and store.cancel(job_id, now, expires_at)
            try:
                files.remove(job_id)
            except OSError:  # a stage may be writing into it: what is left goes when the job expires
                if not is_cancelled:
                    raise
            if not is_cancelled:
                store.remove(job_id)

        await self._call(end, in_=self._moves)
        self.changed.set()

    async def read(self, job_id: str, names: Sequence[str]) -> list[bytes]:
        return await self._call(lambda _, files: [files.read(job_id, name) for name in names], in_=self._moves)

    async def check_file(self, job_id: str, name: str) -> None:
        """Raises StageFailed where it is gone."""
        await self._call(lambda _, files: files.check(job_id, name), in_=self._moves)

    async def open_files(self) -> "JobFiles":
        """For what is read or written piece by piece."""
        return await self._call(lambda _, files: files)

    async def unfinished(self, models: Sequence[str]) -> list[Open]:
        return await self._call(lambda store, _: store.unfinished(models))

    async def take(self, seen: Open, runner: str) -> Job | None:
        return await self._call(lambda store, _: store.take(seen, runner))

    async def renew(self, job_id: str, runner: str, beat: int, progress: int) -> bool:
        return await self._call(lambda store, _: store.renew(job_id, runner, beat, progress))

    async def give_back(self, job_id: str, runner: str, beat: int) -> bool:
        return await self._call(lambda store, _: store.give_back(job_id, runner, beat))

    async def end(self, job_id: str, runner: str, beat: int, ending: Ending) -> bool:
        """Whether it was still that runner's."""
        now = time.time()
        expires_at = now + self.config.expire_after_s
        return await self._call(lambda store, _: store.end(job_id, runner, beat, ending, now, expires_at))

    async def discard(self, job_id: str, names: Sequence[str]) -> None:
        """Files that nobody will ask for."""

        def remove(_: "JobStore", files: "JobFiles") -> None:
            for name in names:
                files.remove(job_id, name)

        await self._call(remove, in_=self._moves)

    async def write(self, job_id: str, name: str, data: bytes) -> None:
        await self._call(lambda _, files: files.write(job_id, name, data), in_=self._moves)

    async def expire(self) -> None:
        """Files first: what is cut off is done again."""
        now, config = time.time(), self.config
        patience_s = config.expire_after_s + config.timeout_s
        failure = Failure("not_served", f"nobody has finished it within {patience_s:g} s")

        def sweep(store: "JobStore", files: "JobFiles") -> None:
            store.give_up(now - patience_s, failure, now, now + config.expire_after_s)
            for job_id in store.expired(now):
                files.remove(job_id)
                store.remove(job_id)

        await self._call(sweep, in_=self._moves)

    async def _call(
        self, work: Callable[["JobStore", "JobFiles"], Answer], *, in_: ThreadPoolExecutor | None = None
    ) -> Answer:
        """In one of those threads; left out: of those for rows."""
        loop = asyncio.get_running_loop()
        try:
            async with self._opening:
                if self._opened is None:
                    self._opened = await loop.run_in_executor(self._rows, self._open)
            answer = await loop.run_in_executor(in_ or self._rows, work, *self._opened)
        except FileNotFoundError as error:
            raise StageFailed(f"a file of the job is not there any more: {error}") from error
        except Unavailable as error:
            self._note(error, error.__cause__)
            raise
        except OSError as error:
            unavailable = Unavailable("the jobs' files cannot be reached; ask again")
            self._note(unavailable, error)
            raise unavailable from error
        self._is_reached = True
        return answer

    def _note(self, error: Unavailable, cause: BaseException | None) -> None:
        """Where they are and why, for the log alone; once, until they are reached again."""
        if self._is_reached:
            log.warning("%s: %s", error, cause)
        self._is_reached = False

    def _open(self) -> tuple["JobStore", "JobFiles"]:
        store: Any = importlib.import_module(STORE)
        files: Any = importlib.import_module(FILES)
        return store.JobStore(self._url), files.JobFiles(self._files_url)
