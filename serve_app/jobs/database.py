"""The jobs table, and the connection to its database: SQLite or PostgreSQL."""

import contextlib
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
)

from serve_app.jobs.config import database_file

SQLITE_TIMEOUT_S = 15.0
"""Longest wait for another process's write."""
POSTGRESQL_PATIENCE = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 2,
}
"""Connection options that detect a machine that no longer responds. In seconds, except for the count."""
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


def connect(url: str) -> Engine:
    file = database_file(url)
    if file is None:
        driven = "postgresql+psycopg:" + url.partition(":")[2]
        return create_engine(
            driven, pool_pre_ping=True, pool_size=4, max_overflow=0, connect_args=POSTGRESQL_PATIENCE
        )
    _make_private(file.parent)
    engine = create_engine(url, connect_args={"timeout": SQLITE_TIMEOUT_S})

    @event.listens_for(engine, "connect")
    def _share(connection: Any, _: Any) -> None:
        """Sets WAL mode, in which readers and a writer do not wait for each other."""
        connection.execute("PRAGMA journal_mode = WAL")

    return engine


def _make_private(folder: Path) -> None:
    """Creates the folder with mode 0700, because it holds prompts and images. An existing one is left as it is."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
