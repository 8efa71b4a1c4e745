"""The config section for jobs. Imports neither the database nor the object store."""

from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from cluster.config import Config

DRIVERS = {"sqlite": None, "postgresql": "psycopg"}
"""The module that a database needs, by the scheme of its URL; None: no further one."""
INSTALL = {"psycopg": "postgresql", "s3fs": "s3"}
"""The extra of latent-relay that installs a module."""


class JobsConfig(Config):
    """Videos and images that are made in the background and survive a restart: `POST /v1/videos`."""

    database: str | None = Field(
        None,
        description="sqlite:////folder/jobs.db for ingresses on one machine, or postgresql://user@host/name for "
        "several machines; default: SQLite under ~/.local/state/latent-relay, created with the first job",
    )
    files: str | None = Field(
        None,
        description="URL of the folder for images and videos, such as s3://bucket/jobs, or a path that all nodes "
        "see; default: beside the database",
    )
    expire_after_s: float = Field(
        86_400.0, gt=0, description="time from the end of a job until it is deleted with its files"
    )
    max_queued: int = Field(
        100, ge=0, description="jobs that may wait; one more gets a 429; 0: no jobs are accepted"
    )
    max_running: int = Field(4, ge=1, description="jobs that an ingress replica draws at once; the others wait")
    timeout_s: float = Field(
        3600.0, gt=0, description="longest time to draw a job, counted from its start; after that it fails"
    )
    lease_s: float = Field(
        30.0, ge=1, description="a job that its ingress does not renew for this long is taken over by another"
    )

    @model_validator(mode="after")
    def _check(self) -> "JobsConfig":
        scheme = urlsplit(self.database or "sqlite:").scheme
        if scheme not in DRIVERS:
            raise ValueError(f"database must be the URL of one of {', '.join(DRIVERS)}, got {scheme or 'none'!r}")
        if scheme != "sqlite" and self.files is None:
            raise ValueError("files is required if database is not a file")
        if ":memory:" in (self.database or "") or self.database in ("sqlite:", "sqlite://"):
            raise ValueError(
                "database: a database in memory does not survive a restart; name a file: sqlite:////folder/jobs.db"
            )
        _check_installed("database", DRIVERS[scheme])
        _check_installed("files", "s3fs" if urlsplit(self.files or "").scheme in ("s3", "s3a") else None)
        return self


def _check_installed(key: str, module: str | None) -> None:
    if module is not None and find_spec(module) is None:
        raise ValueError(f"{key} needs {module}: pip install 'latent-relay[{INSTALL[module]}]'")


def default_folder(application: str) -> Path:
    """Returns the folder of an application whose config names no database."""
    return Path.home() / ".local" / "state" / "latent-relay" / "jobs" / (application or "default")


def database_file(url: str) -> Path | None:
    """Returns the file of an SQLite database; None for a database server."""
    return Path(urlsplit(url).path[1:]) if url.startswith("sqlite:") else None


DEFAULT_JOBS = JobsConfig()
"""The settings if a config has no section for jobs."""
