"""The rows of jobs, in SQLite or PostgreSQL. Every change is one statement that says what it expects to find."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Self

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Connection,
    CursorResult,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    bindparam,
    create_engine,
    delete,
    event,
    func,
    insert,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.schema import CreateIndex, CreateTable

from serve_app.errors import Unavailable
from serve_app.jobs.config import database_file
from serve_app.jobs.job import UNFINISHED, WAITING, Asked, Ending, Failure, Found, Job, Kind, Open, Output, Page

SQLITE_PATIENCE_S = 15.0
"""For another process's write."""
JOBS = Table(
    "relay_jobs",
    MetaData(),
    Column("id", String(64), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("model", String, nullable=False),
    Column("owner", String),
    Column("created_at", Float(53), nullable=False),
    Column("asked", JSON, nullable=False),
    Column("status", String(16), nullable=False),
    Column("progress", Integer, nullable=False),
    Column("completed_at", Float(53)),
    Column("expires_at", Float(53)),
    Column("outputs", JSON, nullable=False),
    Column("failure", JSON(none_as_null=True)),
    Column("runner", String(64)),
    Column("beat", BigInteger, nullable=False),
    Column("num_taken", Integer, nullable=False),
)
INDEXES = (Index("relay_jobs_by_status", JOBS.c.status), Index("relay_jobs_by_time", JOBS.c.created_at, JOBS.c.id))


class JobStore:
    """Blocking calls, from any thread. All raise Unavailable where the database cannot be reached."""

    def __init__(self, url: str) -> None:
        self._engine = _connect(url)
        for attempt in (1, 2):  # of two that make the tables at once, PostgreSQL lets one fail
            try:
                with self._transaction() as connection:
                    connection.execute(CreateTable(JOBS, if_not_exists=True))
                    for index in INDEXES:
                        connection.execute(CreateIndex(index, if_not_exists=True))
                break
            except DBAPIError:
                if attempt == 2:
                    raise

    def add(self, job: Job, max_queued: int) -> bool:
        """Whether there was room among those that wait, or it is there from before."""
        row = asdict(job)
        num_waiting = select(func.count()).where(JOBS.c.status.in_(WAITING)).scalar_subquery()
        values = [bindparam(f"new_{name}", value, JOBS.c[name].type) for name, value in row.items()]
        added = insert(JOBS).from_select(list(row), select(*values).where(num_waiting < max_queued))
        try:
            return self._changes(added) == 1
        except IntegrityError:
            return True

    def put_in_queue(self, job_id: str) -> None:
        """All that goes in is stored."""
        self._changes(_job(job_id, "receiving").values(status="queued", expires_at=None))

    def get(self, job_id: str, kind: Kind, owner: str | None) -> Job | None:
        """None: there is none such of that owner."""
        found = self._jobs(_told(kind, owner).where(JOBS.c.id == job_id))
        return found[0] if found else None

    def page(self, kind: Kind, owner: str | None, page: Page) -> Found:
        """By the time they came; nothing after a job that is not there."""
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
        """Queued and running ones of these models, the oldest first."""
        columns = (JOBS.c.id, JOBS.c.status, JOBS.c.runner, JOBS.c.beat)
        wanted = select(*columns).where(JOBS.c.status.in_(UNFINISHED), JOBS.c.model.in_(models))
        with self._transaction() as connection:
            rows = connection.execute(wanted.order_by(JOBS.c.created_at, JOBS.c.id))
            return [Open(*row) for row in rows]

    def take(self, seen: Open, runner: str) -> Job | None:
        """For that runner, if nobody else has as much as spoken of it since it was seen so."""
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
        """Whether it is still that runner's."""
        return self._changes(_own(job_id, runner, beat).values(beat=beat + 1, progress=progress)) == 1

    def give_back(self, job_id: str, runner: str, beat: int) -> bool:
        """To the queue, by a runner that ends in order."""
        back = _own(job_id, runner, beat).values(
            status="queued", runner=None, beat=beat + 1, num_taken=JOBS.c.num_taken - 1
        )
        return self._changes(back) == 1

    def end(self, job_id: str, runner: str, beat: int, ending: Ending, now: float, expires_at: float) -> bool:
        """Whether it was still that runner's, and has ended so; also if it had, and the answer was lost."""
        told = asdict(ending) | ({"progress": 100} if ending.status == "completed" else {})
        ended = _own(job_id, runner, beat).values(
            **told, runner=None, beat=beat + 1, completed_at=now, expires_at=expires_at
        )
        return self._changes(ended) == 1 or self._has_ended(job_id, ending)

    def _has_ended(self, job_id: str, ending: Ending) -> bool:
        """Files of an attempt have names of their own."""
        found = self._jobs(select(JOBS).where(JOBS.c.id == job_id, JOBS.c.status == ending.status))
        return [(job.outputs, job.failure) for job in found] == [(ending.outputs, ending.failure)]

    def cancel(self, job_id: str, now: float, expires_at: float) -> bool:
        """Whether it had not ended yet."""
        cancelled = _job(job_id, *UNFINISHED).values(
            status="cancelled", runner=None, beat=JOBS.c.beat + 1, completed_at=now, expires_at=expires_at
        )
        return self._changes(cancelled) == 1

    def give_up(self, came_before: float, failure: Failure, now: float, expires_at: float) -> int:
        """Of jobs that nobody serves any more, or whose runners keep them for ever."""
        lost = update(JOBS).where(JOBS.c.status.in_(UNFINISHED), JOBS.c.created_at < came_before)
        told = {"failure": asdict(failure), "completed_at": now, "expires_at": expires_at}
        return self._changes(lost.values(status="failed", runner=None, beat=JOBS.c.beat + 1, **told))

    def expired(self, now: float) -> list[str]:
        with self._transaction() as connection:
            return list(connection.execute(select(JOBS.c.id).where(JOBS.c.expires_at < now)).scalars())

    def remove(self, job_id: str) -> None:
        self._changes(delete(JOBS).where(JOBS.c.id == job_id))

    def clear(self) -> None:
        """Of all rows."""
        self._changes(delete(JOBS))

    def withdraw(self, job_id: str) -> None:
        """What goes in could not be stored."""
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
            counting = {"preserve_rowcount": True}  # of an INSERT, too
            result: CursorResult[Any] = connection.execute(statement, execution_options=counting)
            return result.rowcount

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except (OperationalError, InterfaceError, PoolTimeout) as error:
            raise Unavailable("the jobs' database does not answer; ask again") from error


def _told(kind: Kind, owner: str | None) -> Any:
    """Those that their owner may see."""
    is_owners = JOBS.c.owner.is_(None) if owner is None else JOBS.c.owner == owner
    return select(JOBS).where(JOBS.c.kind == kind, is_owners, JOBS.c.status != "receiving")


def _job(job_id: str, *statuses: str) -> Any:
    return update(JOBS).where(JOBS.c.id == job_id, or_(*(JOBS.c.status == status for status in statuses)))


def _is_of(runner: str, beat: int) -> Any:
    return (JOBS.c.runner == runner) & (JOBS.c.beat == beat) & (JOBS.c.status == "in_progress")


def _own(job_id: str, runner: str, beat: int) -> Any:
    return update(JOBS).where(JOBS.c.id == job_id, _is_of(runner, beat))


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


def _connect(url: str) -> Engine:
    file = database_file(url)
    if file is None:
        driven = "postgresql+psycopg:" + url.partition(":")[2]
        return create_engine(driven, pool_pre_ping=True, pool_size=4, max_overflow=0)
    _make_private(file.parent)
    engine = create_engine(url, connect_args={"timeout": SQLITE_PATIENCE_S})

    @event.listens_for(engine, "connect")
    def _share(connection: Any, _: Any) -> None:
        """Readers and a writer do not wait for each other."""
        connection.execute("PRAGMA journal_mode = WAL")

    return engine


def _make_private(folder: Path) -> None:
    """What it holds are prompts and pictures."""
    if not folder.exists():
        folder.mkdir(parents=True)
        folder.chmod(0o700)
