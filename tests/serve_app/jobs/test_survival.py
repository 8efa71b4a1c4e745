"""Tests that every accepted job ends exactly once, whichever processes die."""

import base64
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
from tests.app import App
from tests.keyed_app import ENDLESS
from tests.relay_server import QUICKSTART, free_port, serving, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.thorough]
PATIENCE_S = 120.0
LEASE_S = 3.0
JOB = {"prompt": "a red circle", "background": True, "size": "64x64"}


def until_ended(client: httpx.Client, ids: list[str]) -> dict[str, Any]:
    """Waits until these jobs have ended, and returns them by id."""
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


def test_a_job_goes_on_where_it_was_though_all_is_started_anew(tmp_path: Path) -> None:
    port, config, num_steps = free_port(), tmp_path / "config.yaml", 400
    served = yaml.safe_load(QUICKSTART)
    served["applications"][0]["args"] |= {
        "transformer": {"num_cpus": 1, "resume": {"every_steps": 10, "every_s": 0.0}},
        "jobs": {"database": f"sqlite:///{tmp_path}/jobs.db", "lease_s": LEASE_S},
        "limits": {"max_num_inference_steps": num_steps},
    }
    config.write_text(yaml.safe_dump(served))
    asked = {"num_inference_steps": num_steps, "true_cfg_scale": 1}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client:
        with server(config, tmp_path / "first.log", port) as process:
            [job_id] = ask(client, 1, **asked)
            num_kept = wait_for_parts(tmp_path, 5)
            for pid in [process.pid, *(each.pid for each in psutil.Process(process.pid).children(recursive=True))]:
                kill(pid)
        with server(config, tmp_path / "second.log", port):
            assert until_ended(client, [job_id])[job_id]["status"] == "completed"
            [replica] = client.get("/v1/status").json()["transformer"]["replicas"]
            sizes = replica["queue"]["batch_sizes"]
            assert sum(int(size) * number for size, number in sizes.items()) <= num_steps - 10 * num_kept
            assert not list(tmp_path.rglob("*.steps"))
            content = client.get(f"/v1/images/jobs/{job_id}/content").content
            body = JOB | {"seed": 0, "background": False} | asked
            [unbroken] = client.post("/v1/images/generations", json=body).raise_for_status().json()["data"]
            assert base64.b64decode(unbroken["b64_json"]) == content


def wait_for_parts(folder: Path, num: int) -> int:
    """Waits until at least `num` files of saved steps exist, and returns their number."""
    deadline = time.monotonic() + PATIENCE_S
    while len(parts := list(folder.rglob("*.steps"))) < num:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return len(parts)


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
    """The first ingress gets more jobs than it may run at once, so the second takes some of them."""
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
    """Waits until two runners have jobs, and returns their names."""
    deadline = time.monotonic() + PATIENCE_S
    with JobStore(url) as store:
        while True:
            runners = {job.runner for job in store.unfinished(["tiny-flux"]) if job.runner is not None}
            if len(runners) == 2:
                return runners
            assert time.monotonic() < deadline
            time.sleep(0.05)


def ingress_pids(app: App) -> list[int]:
    """Returns the process ids of the app's ingress replicas."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if f"{app.name}:Ingress" in " ".join(process.info["cmdline"] or ())
    ]
