"""Tests of the config of jobs."""

import pytest
from pydantic import ValidationError

from serve_app.jobs.config import JobsConfig


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"database": "mysql://host/jobs", "files": "/jobs"}, "one of sqlite, postgresql, got 'mysql'"),
        ({"database": "/var/jobs.db"}, "got 'none'"),
        ({"database": "postgresql://host/jobs"}, "files is required if database is not a file"),
        ({"database": "sqlite:///:memory:"}, "does not survive a restart"),
        ({"database": "sqlite://"}, "does not survive a restart"),
        ({"max_queued": -1}, "greater than or equal to 0"),
        ({"lease_s": 0}, "greater than or equal to 1"),
    ],
)
def test_what_could_not_keep_jobs_is_refused(fields: dict[str, object], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        JobsConfig.model_validate(fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"database": "sqlite:////var/lib/relay/jobs.db"},
        {"database": "postgresql://relay@db/jobs", "files": "/mnt/jobs"},
        {"files": "memory://jobs"},
    ],
)
def test_what_can_keep_jobs_is_taken(fields: dict[str, object]) -> None:
    JobsConfig.model_validate(fields)
