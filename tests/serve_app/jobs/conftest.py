"""Databases that jobs are kept in."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.jobs.store import JobStore
from tests.serve_app.jobs.database_server import PROGRAMS, postgresql


@pytest.fixture(scope="session")
def postgresql_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of one server for all tests."""
    if not PROGRAMS:
        pytest.skip("Debian's package postgresql is not installed")
    base = tmp_path_factory.mktemp("postgresql")
    for folder in (base, *base.parents[:2]):  # pytest lets nobody else in
        if os.stat(folder).st_uid == os.getuid() and folder.name.startswith(("postgresql", "pytest-")):
            folder.chmod(0o711)
    with postgresql(base / "server") as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of one without jobs."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/jobs.db"
    url: str = request.getfixturevalue("postgresql_url")
    with JobStore(url) as store:
        store.clear()
    return url
