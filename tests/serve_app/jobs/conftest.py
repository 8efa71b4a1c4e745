"""Databases for jobs."""

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from serve_app.jobs.store import JobStore
from tests.serve_app.jobs.database_server import PROGRAMS, postgresql


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """URL of a PostgreSQL server that all tests share."""
    if not PROGRAMS:
        pytest.skip("Debian's package postgresql is not installed")
    with TemporaryDirectory(prefix="relay-postgresql-") as folder:  # other users cannot enter pytest's own folders
        os.chmod(folder, 0o711)
        with postgresql(Path(folder) / "server") as url:
            yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a database without jobs."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/jobs.db"
    url: str = request.getfixturevalue("postgresql_url")
    with JobStore(url) as store:
        store.clear()
    return url
