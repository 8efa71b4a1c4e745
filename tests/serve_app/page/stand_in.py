"""A server with the real page but no stages: it lists any model cards, records requests and answers with noise."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Self

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from deployments.checkpoints.geometry import with_geometry
from serve_app.config.limits import LimitsConfig
from serve_app.http.openai_answers import CompletedEvent, Forwards, ProgressEvent, TimingsMs
from serve_app.models.card import model_card
from serve_app.page.routes import add_pages
from tests.pictures import video
from tests.serve_app.pictures import data_url, file, noise
from tests.tiny_models import tiny_model

TIMINGS = TimingsMs(encode=1, queue=0, denoise=30, decode=2)


def card(name: str = "flux-dev", family: str = "flux", **more: Any) -> dict[str, Any]:
    """Returns a model card as /v1/models lists it, updated with `more`."""
    own = model_card(with_geometry(tiny_model(family)), 0, LimitsConfig(), {})
    return own.model_dump(mode="json") | {"id": name} | more


def rejection(message: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": None}}


@dataclass(frozen=True)
class Asked:
    """One request for an image or video."""

    path: str
    fields: dict[str, Any]
    files: dict[str, bytes]
    authorization: str | None


@dataclass
class StandIn:
    """The server. A test may set its attributes while it runs."""

    cards: list[dict[str, Any]] = field(default_factory=lambda: [card()])
    key: str | None = None
    refused: tuple[int, dict[str, Any]] | None = None
    """Status and body that answer every request for an image or video; None: requests are accepted."""
    warnings: list[str] = field(default_factory=list)
    takes_s: float = 0.0
    jobs: dict[str, dict[str, Any]] | None = None
    """Video jobs by id; None: the server has no jobs."""
    job_status: int = 200
    """Status of every answer about a job."""
    asked: list[Asked] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        config = uvicorn.Config(self._api(), port=0, log_level="error", lifespan="off", ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 30
        while not self._server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()

    def _api(self) -> FastAPI:
        api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        add_pages(api)
        api.get("/openapi.json")(self._description)
        api.get("/v1/models")(self._models)
        for path in ("/v1/images/generations", "/v1/images/edits"):
            api.post(path)(self._pictures)
        api.post("/v1/videos")(self._begin_job)
        api.get("/v1/videos/{job}")(self._job)
        api.delete("/v1/videos/{job}")(self._delete_job)
        api.get("/v1/videos/{job}/content")(self._content)
        return api

    def _refuse(self, request: Request) -> Response | None:
        given = request.headers.get("authorization")
        if self.key is not None and given != f"Bearer {self.key}":
            return JSONResponse(rejection("no key" if given is None else "this key is not known here"), 401)
        return None

    def _description(self) -> dict[str, Any]:
        return {"paths": {} if self.jobs is None else {"/v1/videos": {"post": {}}}}

    def _models(self, request: Request) -> Response:
        return self._refuse(request) or JSONResponse({"object": "list", "data": self.cards})

    async def _note(self, request: Request) -> Response | None:
        """Records the request. Returns an error if the request is to be refused."""
        refused = self._refuse(request)
        if refused is not None:
            return refused
        if "json" in request.headers["content-type"]:
            fields, files = await request.json(), {}
        else:
            async with request.form() as form:
                fields = {name: value for name, value in form.items() if isinstance(value, str)}
                files = {name: await value.read() for name, value in form.items() if not isinstance(value, str)}
        authorization = request.headers.get("authorization")
        self.asked.append(Asked(request.url.path, fields, files, authorization))
        return JSONResponse(self.refused[1], self.refused[0]) if self.refused else None

    async def _pictures(self, request: Request) -> Response:
        return await self._note(request) or StreamingResponse(
            self._events(self.asked[-1].fields), media_type="text/event-stream"
        )

    async def _events(self, fields: dict[str, Any]) -> AsyncIterator[str]:
        yield _event(ProgressEvent(created_at=0, index=0, phase="denoise", step=1, num_steps=4, eta_s=1.0))
        await asyncio.sleep(self.takes_s)
        for i in range(int(fields.get("n", 1))):
            yield _event(
                CompletedEvent(
                    created_at=0,
                    index=i,
                    b64_json=data_url(file(noise(i))).partition(",")[2],
                    size="64x64",
                    output_format="png",
                    seed=int(fields.get("seed", 7)) + i,
                    timings_ms=TIMINGS,
                    forwards=Forwards(computed=4, asked=4),
                    warnings=self.warnings,
                )
            )

    async def _begin_job(self, request: Request) -> Response:
        if self.jobs is None:
            return JSONResponse(rejection("Not Found"), 404)
        refused = await self._note(request)
        if refused is not None:
            return refused
        name = f"video_{len(self.jobs)}"
        self.jobs[name] = {"id": name, "object": "video", "status": "queued", "progress": 0, "error": None}
        return JSONResponse(self.jobs[name])

    def _job(self, job: str) -> Response:
        assert self.jobs is not None
        if self.job_status != 200:
            return JSONResponse(rejection("no stage can serve now"), self.job_status)
        return JSONResponse(self.jobs[job])

    def _delete_job(self, job: str) -> Response:
        self.deleted.append(job)
        return JSONResponse({"id": job, "object": "video.deleted", "deleted": True})

    def _content(self, job: str) -> Response:
        return Response(video(5, (64, 48)), media_type="video/mp4")


def _event(event: Any) -> str:
    return f"event: {event.type}\ndata: {json.dumps(event.model_dump(mode='json'))}\n\n"
