"""The rows of jobs, in SQLite or PostgreSQL. Every change is one statement that names the state it expects."""

import sqlite3
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import Any, Self

from sqlalchemy import (
    Connection,
    CursorResult,
    bindparam,
    delete,
    func,
    insert,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.schema import CreateIndex, CreateTable

from serve_app.errors import Unavailable
from serve_app.jobs.database import INDEXES, JOBS, connect
from serve_app.jobs.job import (
    UNFINISHED,
    WAITING,
    Asked,
    Ending,
    Failure,
    Found,
    Job,
    Kind,
    Open,
    Output,
    Page,
    Status,
)


class JobStore:
    """The jobs table. The methods block, may be called from any thread, and raise Unavailable if the database
    cannot be reached."""

    def __init__(self, url: str) -> None:
        self._engine = connect(url)
        for attempt in (1, 2):  # if two processes create the tables at once, PostgreSQL fails one
            try:
                with self._transaction() as connection:
                    connection.execute(CreateTable(JOBS, if_not_exists=True))
                    for index in INDEXES:
                        connection.execute(CreateIndex(index, if_not_exists=True))
                break
            except (DBAPIError, Unavailable):
                if attempt == 2:
                    self.close()
                    raise

    def add(self, job: Job, max_queued: int) -> bool:
        """Adds the job if fewer than max_queued jobs wait. Returns whether it is stored, now or from before."""
        row = asdict(job)
        num_waiting = select(func.count()).where(JOBS.c.status.in_(WAITING)).scalar_subquery()
        values = [bindparam(f"new_{name}", value, JOBS.c[name].type) for name, value in row.items()]
        added = insert(JOBS).from_select(list(row), select(*values).where(num_waiting < max_queued))
        try:
            return self._changes(added) == 1
        except IntegrityError:
            return True

    def put_in_queue(self, job_id: str) -> None:
        """Queues a job whose input files are all stored."""
        self._changes(_job(job_id, "receiving").values(status="queued", expires_at=None))

    def get(self, job_id: str, kind: Kind, owner: str | None) -> Job | None:
        """Returns the job, or None if that owner has no such job."""
        found = self._jobs(_told(kind, owner).where(JOBS.c.id == job_id))
        return found[0] if found else None

    def page(self, kind: Kind, owner: str | None, page: Page) -> Found:
        """Returns a page of jobs by creation time; an empty one if the job `page.after` does not exist."""
        told, place = _told(kind, owner), tuple_(JOBS.c.created_at, JOBS.c.id)
        if page.after is not None:
            last = self.get(page.after, kind, owner)
            if last is None:
                return Found()
            mark = tuple_(bindparam("at", last.created_at, JOBS.c.created_at.type), bindparam("id_at", last.id))
            told = told.where(place > mark if page.order == "asc" else place < mark)
        by = (JOBS.c.created_at, JOBS.c.id)
        told = told.order_by(*(by if page.order == "asc" else (column.desc() for column in by)))
        jobs = self._jobs(told.limit(page.limit + 1))
        return Found(jobs[: page.limit], len(jobs) > page.limit)

    def unfinished(self, models: Collection[str]) -> list[Open]:
        """Returns the queued and running jobs of these models, oldest first."""
        columns = (JOBS.c.id, JOBS.c.model, JOBS.c.status, JOBS.c.runner, JOBS.c.beat)
        wanted = select(*columns).where(JOBS.c.status.in_(UNFINISHED), JOBS.c.model.in_(models))
        with self._transaction() as connection:
            rows = connection.execute(wanted.order_by(JOBS.c.created_at, JOBS.c.id))
            return [Open(*row) for row in rows]

    def take(self, seen: Open, runner: str) -> Job | None:
        """Assigns the job to the runner and returns it, or None if its row has changed since it was seen."""
        taken = (
            _job(seen.id, seen.status)
            .where(JOBS.c.beat == seen.beat)
            .values(status="in_progress", runner=runner, beat=seen.beat + 1, num_taken=JOBS.c.num_taken + 1)
        )
        if self._changes(taken) != 1:
            return None
        found = self._jobs(select(JOBS).where(JOBS.c.id == seen.id, _is_of(runner, seen.beat + 1)))
        return found[0] if found else None

    def renew(self, job_id: str, runner: str, beat: int, progress: int) -> bool:
        """Writes a beat; returns whether the job still belongs to that runner.

        Also succeeds when it repeats a renewal whose answer was lost.
        """
        own = _own(job_id, runner, beat, beat + 1)
        return self._changes(own.values(beat=beat + 1, progress=progress)) == 1

    def give_back(self, job_id: str, runner: str, beat: int) -> bool:
        """Puts the job of a runner that shuts down back into the queue."""
        back = _own(job_id, runner, beat).values(
            status="queued", runner=None, beat=beat + 1, num_taken=JOBS.c.num_taken - 1
        )
        return self._changes(back) == 1

    def end(self, job_id: str, runner: str, beat: int, ending: Ending, now: float, expires_at: float) -> bool:
        """Ends the job; returns whether it still belonged to that runner.

        Also succeeds when it repeats a call whose answer was lost.
        """
        told = asdict(ending) | ({"progress": 100} if ending.status == "completed" else {})
        ended = _own(job_id, runner, beat).values(
            **told, runner=None, beat=beat + 1, completed_at=now, expires_at=expires_at
        )
        return self._changes(ended) == 1 or self._has_ended(job_id, ending)

    def _has_ended(self, job_id: str, ending: Ending) -> bool:
        """Whether the job has this very ending. Two attempts cannot have the same: their file names differ."""
        found = self._jobs(select(JOBS).where(JOBS.c.id == job_id, JOBS.c.status == ending.status))
        return [(job.outputs, job.failure) for job in found] == [(ending.outputs, ending.failure)]

    def cancel(self, job_id: str, now: float, expires_at: float) -> Status | None:
        """Cancels the job. Returns its status before; None if it had ended or does not exist."""
        while found := self._jobs(select(JOBS).where(JOBS.c.id == job_id, JOBS.c.status.in_(UNFINISHED))):
            [job] = found
            cancelled = (
                _job(job_id, job.status)
                .where(JOBS.c.beat == job.beat)
                .values(
                    status="cancelled", runner=None, beat=job.beat + 1, completed_at=now, expires_at=expires_at
                )
            )
            if self._changes(cancelled) == 1:
                return job.status
        return None

    def give_up(
        self, came_before: float, served: Collection[str], failure: Failure, now: float, expires_at: float
    ) -> list[Job]:
        """Fails the old jobs of models that are not served here, and apparently nowhere else."""
        told = {"failure": asdict(failure), "completed_at": now, "expires_at": expires_at}
        lost = (
            update(JOBS)
            .where(JOBS.c.status.in_(UNFINISHED), JOBS.c.created_at < came_before, JOBS.c.model.not_in(served))
            .values(status="failed", runner=None, beat=JOBS.c.beat + 1, **told)
        )
        return self._jobs(lost.returning(JOBS))

    def expired(self, now: float) -> list[str]:
        with self._transaction() as connection:
            return list(connection.execute(select(JOBS.c.id).where(JOBS.c.expires_at < now)).scalars())

    def remove(self, job_id: str) -> None:
        self._changes(delete(JOBS).where(JOBS.c.id == job_id))

    def clear(self) -> None:
        """Deletes all rows."""
        self._changes(delete(JOBS))

    def withdraw(self, job_id: str) -> None:
        """Deletes a job whose input files could not be stored."""
        self._changes(delete(JOBS).where(JOBS.c.id == job_id, JOBS.c.status == "receiving"))

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _jobs(self, wanted: Any) -> list[Job]:
        with self._transaction() as connection:
            return [_read(dict(row)) for row in connection.execute(wanted).mappings()]

    def _changes(self, statement: Any) -> int:
        with self._transaction() as connection:
            counting = {"preserve_rowcount": True}  # otherwise an INSERT has none
            result: CursorResult[Any] = connection.execute(statement, execution_options=counting)
            return result.rowcount

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except (IntegrityError, DataError):  # the fault of the statement or its values
            raise
        except (DBAPIError, sqlite3.Error, PoolTimeout) as error:  # a PRAGMA's error is not wrapped
            raise Unavailable("the jobs' database does not answer; try again") from error


def _told(kind: Kind, owner: str | None) -> Any:
    """Selects the jobs of that kind that the owner may see."""
    is_owners = JOBS.c.owner.is_(None) if owner is None else JOBS.c.owner == owner
    return select(JOBS).where(JOBS.c.kind == kind, is_owners, JOBS.c.status != "receiving")


def _job(job_id: str, *statuses: str) -> Any:
    return update(JOBS).where(JOBS.c.id == job_id, or_(*(JOBS.c.status == status for status in statuses)))


def _is_of(runner: str, *beats: int) -> Any:
    return (JOBS.c.runner == runner) & JOBS.c.beat.in_(beats) & (JOBS.c.status == "in_progress")


def _own(job_id: str, runner: str, *beats: int) -> Any:
    return update(JOBS).where(JOBS.c.id == job_id, _is_of(runner, *beats))


def _read(row: dict[str, Any]) -> Job:
    known = {each.name for each in fields(Asked)}
    asked = {name: value for name, value in row.pop("asked").items() if name in known}
    outputs, failure = row.pop("outputs"), row.pop("failure")
    return Job(
        **row,
        asked=Asked(**asked | {"takes_several": tuple(asked["takes_several"])}),
        outputs=tuple(Output(**output) for output in outputs),
        failure=None if failure is None else Failure(**failure),
    )
