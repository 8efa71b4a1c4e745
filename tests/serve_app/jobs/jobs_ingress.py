"""An ingress's HTTP application without stages, and its job store. Tests act as the runner."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI, Request, Response

from deployments.checkpoints.geometry import with_geometry
from deployments.config.model import DefaultsConfig, ModelConfig
from serve_app.config.limits import LimitsConfig
from serve_app.jobs.config import JobsConfig
from serve_app.jobs.files import JobFiles
from serve_app.jobs.job import Ending, Job, Output
from serve_app.jobs.store import JobStore
from serve_app.models.served_models import Models
from serve_app.relay import Relay
from serve_app.routes import build_api

KEY_NAME = "x-key-name"
"""Header with the key name that the check of API keys would find."""
FACTS = {
    "seed": 7,
    "timings_ms": dict.fromkeys(("encode", "prepare", "queue", "denoise", "decode"), 1.0),
    "forwards": {"computed": 2, "asked": 2},
    "warnings": [],
}


def relay(family: str) -> Relay:
    """Returns a relay without stages."""
    defaults = DefaultsConfig(width=64, height=64, num_inference_steps=4)
    model = ModelConfig(name=f"tiny-{family}", checkpoint=f"tiny://{family}", family=family, defaults=defaults)
    return Relay(with_geometry(model), LimitsConfig(), None, None, None)


class JobsIngress:
    """One ingress, and the store of its jobs."""

    def __init__(self, folder: Path, family: str = "wan", **config: Any) -> None:
        self.folder = folder
        self.config = JobsConfig(**{"database": f"sqlite:///{folder}/jobs.db"} | config)
        self.relay = relay(family)
        self.api: FastAPI = build_api(Models([self.relay]), self.config)

        @self.api.middleware("http")
        async def name_key(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
            if KEY_NAME in request.headers:
                request.state.key_name = request.headers[KEY_NAME]
            return await call(request)

    @property
    def store(self) -> JobStore:
        assert self.config.database is not None
        return JobStore(self.config.database)

    @property
    def files(self) -> JobFiles:
        return JobFiles(str(self.folder / "files"))

    def ask(self, method: str, path: str, *, owner: str | None = None, **request: Any) -> httpx.Response:
        headers = {**request.pop("headers", {}), **({} if owner is None else {KEY_NAME: owner})}

        async def answer() -> httpx.Response:
            transport = httpx.ASGITransport(self.api)
            async with httpx.AsyncClient(transport=transport, base_url="http://relay") as client:
                return await client.request(method, path, headers=headers, **request)

        return asyncio.run(answer())

    def create(self, *, owner: str | None = None, **fields: Any) -> Any:
        answer = self.ask("POST", "/v1/videos", json={"prompt": "waves", "num_frames": 5} | fields, owner=owner)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def taken(self, job_id: str, runner: str = "runner") -> Job:
        """Takes the job in the name of this runner."""
        with self.store as store:
            [seen] = [each for each in store.unfinished(["tiny-wan", "tiny-flux"]) if each.id == job_id]
            job = store.take(seen, runner)
        assert job is not None
        return job

    def complete(self, job_id: str, *files: bytes, media_type: str = "video/mp4") -> None:
        """Completes the job with these files."""
        job, now = self.taken(job_id), 2e9
        names = [f"{i}.{media_type.rpartition('/')[2]}" for i in range(len(files))]
        for name, data in zip(names, files, strict=True):
            self.files.write(job_id, name, data)
        outputs = [Output(name, media_type, len(data), FACTS) for name, data in zip(names, files, strict=True)]
        with self.store as store:
            assert store.end(job_id, "runner", job.beat, Ending("completed", tuple(outputs)), now, now + 1e9)
