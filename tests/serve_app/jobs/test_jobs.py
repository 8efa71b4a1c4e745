"""Tests of where jobs are stored, by default and by config."""

import asyncio
from pathlib import Path

import pytest

from serve_app.http.openai_requests import ImageBody
from serve_app.jobs.body import keep_body
from serve_app.jobs.config import DEFAULT_JOBS, JobsConfig
from serve_app.jobs.job import Job
from serve_app.jobs.jobs import Jobs
from tests.serve_app.jobs import jobs_ingress

BODY = ImageBody(prompt="a cat")
ASKED, _ = keep_body(BODY, jobs_ingress.relay("flux").validator.validate(BODY).requests)


def test_by_default_each_application_has_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    jobs, others = Jobs(DEFAULT_JOBS, "pictures"), Jobs(DEFAULT_JOBS, "videos")
    asyncio.run(jobs.accept(Job("image_1", "image", "m", None, 0.0, ASKED), {"in-0": b"data"}))
    folder = tmp_path / ".local" / "state" / "latent-relay" / "jobs" / "pictures"
    assert (folder / "files" / "image_1" / "in-0").read_bytes() == b"data"
    assert (jobs.may_exist, others.may_exist) == (True, False)
    assert folder.stat().st_mode & 0o077 == 0


def test_files_may_lie_elsewhere(tmp_path: Path) -> None:
    config = JobsConfig(database=f"sqlite:///{tmp_path}/jobs.db", files=f"file://{tmp_path}/elsewhere")
    asyncio.run(Jobs(config, "").accept(Job("image_1", "image", "m", None, 0.0, ASKED), {"in-0": b"data"}))
    assert (tmp_path / "elsewhere" / "image_1" / "in-0").read_bytes() == b"data"
