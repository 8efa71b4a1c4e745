"""What a config may say of jobs. Imports neither database nor object store."""

from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from cluster.config import Config

DRIVERS = {"sqlite": None, "postgresql": "psycopg"}
"""By a database's URL: the module it needs."""
INSTALL = {"psycopg": "postgresql", "s3fs": "s3"}
"""By module: the extra of ours that brings it."""


class JobsConfig(Config):
    """Videos and pictures that are made in the background, and outlive a restart: `POST /v1/videos`."""

    database: str | None = Field(
        None,
        description="sqlite:////folder/jobs.db, for ingresses of one machine, or postgresql://user@host/name, "
        "for several; left out: SQLite under ~/.local/state/latent-relay, made with the first job",
    )
    files: str | None = Field(
        None,
        description="URL of the folder that pictures and videos are kept in, such as s3://bucket/jobs, or a path "
        "that all nodes see; left out: beside the database",
    )
    expire_after_s: float = Field(
        86_400.0, gt=0, description="of a job, from its end; then it is deleted with its files"
    )
    max_queued: int = Field(100, ge=0, description="jobs that wait; one more gets a 429; 0: no jobs are taken")
    max_running: int = Field(4, ge=1, description="jobs that an ingress replica draws at once; the others wait")
    timeout_s: float = Field(3600.0, gt=0, description="for drawing one, once it is taken up; then it has failed")
    lease_s: float = Field(
        30.0, ge=1, description="an ingress that says nothing of a job for so long has lost it to another"
    )

    @model_validator(mode="after")
    def _check(self) -> "JobsConfig":
        scheme = urlsplit(self.database or "sqlite:").scheme
        if scheme not in DRIVERS:
            raise ValueError(f"database must be the URL of one of {', '.join(DRIVERS)}, got {scheme or 'none'!r}")
        if scheme != "sqlite" and self.files is None:
            raise ValueError("files must be named beside a database that is not a file")
        if ":memory:" in (self.database or "") or self.database in ("sqlite:", "sqlite://"):
            raise ValueError("database: one in memory outlives nothing; name a file: sqlite:////folder/jobs.db")
        _check_installed("database", DRIVERS[scheme])
        _check_installed("files", "s3fs" if urlsplit(self.files or "").scheme in ("s3", "s3a") else None)
        return self


def _check_installed(key: str, module: str | None) -> None:
    if module is not None and find_spec(module) is None:
        raise ValueError(f"{key} needs {module}: pip install 'latent-relay[{INSTALL[module]}]'")


def default_folder(application: str) -> Path:
    """Of an application whose config names no database."""
    return Path.home() / ".local" / "state" / "latent-relay" / "jobs" / (application or "default")


def database_file(url: str) -> Path | None:
    """Of SQLite, None for a server."""
    return Path(urlsplit(url).path[1:]) if url.startswith("sqlite:") else None


DEFAULT_JOBS = JobsConfig()
"""Where a config says nothing of them."""
