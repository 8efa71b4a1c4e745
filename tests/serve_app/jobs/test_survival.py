"""Whatever dies, every job that was accepted ends, and once."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from ray import serve

from serve_app.jobs.config import JobsConfig
from serve_app.jobs.store import JobStore
from tests.conftest import ENDLESS, App
from tests.relay_server import QUICKSTART, free_port, serving, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.thorough]
PATIENCE_S = 120.0
LEASE_S = 3.0
JOB = {"prompt": "a red circle", "background": True, "size": "64x64"}


def until_ended(client: httpx.Client, ids: list[str]) -> dict[str, Any]:
    """What is told of each."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        listed = client.get("/v1/images/jobs", params={"limit": 100}).raise_for_status().json()["data"]
        told = {job["id"]: job for job in listed if job["id"] in ids}
        assert sorted(job["id"] for job in listed if job["id"] in ids) == sorted(ids)
        if all(job["status"] not in ("queued", "in_progress") for job in told.values()):
            return told
        assert time.monotonic() < deadline, told
        time.sleep(0.2)


@contextmanager
def server(config: Path, log: Path, port: int) -> Iterator["subprocess.Popen[bytes]"]:
    with serving(config, log, "--port", str(port)) as process:
        wait_for(log, "is ready: ", process)
        yield process


def test_server_and_ray_are_killed_with_jobs_queued_and_running(tmp_path: Path) -> None:
    port, config = free_port(), tmp_path / "config.yaml"
    served = yaml.safe_load(QUICKSTART)
    served["applications"][0]["args"]["jobs"] = {
        "database": f"sqlite:///{tmp_path}/jobs.db",
        "lease_s": LEASE_S,
        "max_running": 2,
    }
    config.write_text(yaml.safe_dump(served))
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        with server(config, tmp_path / "first.log", port) as process:
            [done] = ask(client, 1, num_inference_steps=2)
            before = until_ended(client, [done])[done]
            content = client.get(f"/v1/images/jobs/{done}/content").content
            ids = ask(client, 8, num_inference_steps=150)
            wait_until_two_run(client)
            doomed = [process.pid, *(each.pid for each in psutil.Process(process.pid).children(recursive=True))]
            for pid in doomed:
                kill(pid)
        with server(config, tmp_path / "second.log", port):
            told = until_ended(client, ids)
            assert {job["status"] for job in told.values()} == {"completed"}
            assert all(client.get(f"/v1/images/jobs/{each}/content").status_code == 200 for each in ids)
            assert client.get(f"/v1/images/jobs/{done}").json() == before
            assert client.get(f"/v1/images/jobs/{done}/content").content == content


def ask(client: httpx.Client, num: int, **fields: Any) -> list[str]:
    answers = [client.post("/v1/images/generations", json=JOB | {"seed": i} | fields) for i in range(num)]
    return [answer.raise_for_status().json()["id"] for answer in answers]


def wait_until_two_run(client: httpx.Client) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while [job["status"] for job in client.get("/v1/images/jobs").json()["data"]].count("in_progress") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_two_ingresses_share_a_database_and_one_that_dies_loses_its_jobs_to_the_other(
    start_ingress: Callable[..., App], postgresql_url: str, tmp_path: Path
) -> None:
    """More is asked of the first than it may draw, so the second draws of it, too."""
    config = JobsConfig(database=postgresql_url, files=str(tmp_path), lease_s=LEASE_S, max_running=2)
    with JobStore(postgresql_url) as store:
        store.clear()
    first, second = (start_ingress(f"jobs-{i}", jobs=config, max_num_inference_steps=1000) for i in range(2))
    ids = ask(first.client, 8, num_inference_steps=200)
    runners = wait_until_two_draw(postgresql_url)
    assert second.client.get(f"/v1/images/jobs/{ids[0]}").status_code == 200
    [pid] = ingress_pids(first)
    kill(pid)
    told = until_ended(second.client, ids)
    assert {job["status"] for job in told.values()} == {"completed"}
    assert len(runners) == 2
    for each in ids:
        assert second.client.get(f"/v1/images/jobs/{each}/content").headers["content-type"] == "image/png"


def test_an_ingress_that_serve_ends_gives_its_jobs_back(start_ingress: Callable[..., App], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/jobs.db"
    app = start_ingress("leaving", jobs=JobsConfig(database=url, lease_s=600), max_num_inference_steps=ENDLESS)
    [job_id] = ask(app.client, 1, num_inference_steps=ENDLESS)
    with JobStore(url) as store:
        wait_for_status(store, job_id, "in_progress")
        serve.delete(app.name)
        wait_for_status(store, job_id, "queued")


def wait_for_status(store: JobStore, job_id: str, status: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while (job := store.get(job_id, "image", None)) is None or job.status != status:
        assert time.monotonic() < deadline, job
        time.sleep(0.05)


def wait_until_two_draw(url: str) -> set[str]:
    """Which runners do."""
    deadline = time.monotonic() + PATIENCE_S
    with JobStore(url) as store:
        while True:
            runners = {job.runner for job in store.unfinished(["tiny-flux"]) if job.runner is not None}
            if len(runners) == 2:
                return runners
            assert time.monotonic() < deadline
            time.sleep(0.05)


def ingress_pids(app: App) -> list[int]:
    """Of its replicas."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if f"{app.name}:Ingress" in " ".join(process.info["cmdline"] or ())
    ]
