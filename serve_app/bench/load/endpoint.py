"""Sends one request to a server with OpenAI's API, and measures it up to the last byte of the answer."""

import asyncio
import mimetypes
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal

import httpx

from serve_app.bench.load.workload import Ask

Endpoint = Literal["generations", "edits", "videos"]
POLL_S = 0.1
"""Seconds between two polls of a video job."""
REJECTIONS = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
RETRY_AFTER_S = 1.0
"""Seconds before a retry, if a rejection has no Retry-After."""


@dataclass(frozen=True)
class Server:
    """The server under load, and how requests are sent to it."""

    base_url: str
    """The server's URL without `/v1`."""
    model: str | None
    api_key: str | None = None
    endpoint: Endpoint = "generations"
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of every body, which OpenAI's API may lack."""
    image: Path | None = None
    """Input file of the `edits` endpoint."""
    retries_refused: bool = False
    """Whether a rejected request is sent again after the time in Retry-After."""
    timeout_s: float = 600.0

    def open_client(self) -> httpx.AsyncClient:
        """Returns a client with any number of connections, so that no request waits for another's."""
        return httpx.AsyncClient(
            base_url=self.base_url,
            headers={} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"},
            timeout=self.timeout_s,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )


@dataclass(frozen=True)
class Outcome:
    """The result of one request. Times are in seconds since the start of the run."""

    ask: Ask
    due_s: float
    """When the request should have been sent."""
    sent_s: float
    done_s: float
    status: int
    """HTTP status; 0: no answer."""
    error: str = ""
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    """Stage times of the slowest image; empty if the server does not report them."""
    num_rejections: int = 0

    @property
    def is_answered(self) -> bool:
        return not self.error

    @property
    def is_refused(self) -> bool:
        return self.status in REJECTIONS

    @property
    def latency_s(self) -> float:
        """Seconds from when the request was due, so that a late client does not make the server look faster."""
        return self.done_s - self.due_s

    @property
    def lag_s(self) -> float:
        return self.sent_s - self.due_s

    @property
    def rest_ms(self) -> float:
        """Milliseconds that the stage times do not account for."""
        return (self.done_s - self.sent_s) * 1e3 - sum(self.timings_ms.values())


async def send(client: httpx.AsyncClient, server: Server, ask: Ask, began: float, due_s: float) -> Outcome:
    """Sends one request, with retries if server.retries_refused. began: time.monotonic() at the run's start."""
    sent_s, rejections = time.monotonic() - began, 0
    while True:
        status, error, timings, retry_after_s = await _attempt(client, server, ask)
        if not (server.retries_refused and status in REJECTIONS):
            break
        rejections += 1
        await asyncio.sleep(retry_after_s)
    done_s = time.monotonic() - began
    return Outcome(ask, due_s, sent_s, done_s, status, error, timings, rejections)


async def _attempt(
    client: httpx.AsyncClient, server: Server, ask: Ask
) -> tuple[int, str, Mapping[str, float], float]:
    """Sends the request once. Returns its status, error, stage times, and seconds to wait before a retry."""
    try:
        answer = await _ask(client, server, ask)
        if answer.is_error:
            return answer.status_code, _told(answer), {}, _retry_after_s(answer)
        if server.endpoint == "videos":
            return await _finished(client, answer.json())
        return answer.status_code, *_read_pictures(answer.json(), ask.n), 0.0
    except (httpx.HTTPError, ValueError) as error:
        return 0, repr(error), {}, 0.0


async def _ask(client: httpx.AsyncClient, server: Server, ask: Ask) -> httpx.Response:
    body: dict[str, Any] = {"prompt": ask.prompt} | dict(server.extra_body)
    given = {"model": server.model, "size": ask.size, "num_inference_steps": ask.steps}
    body |= {name: value for name, value in given.items() if value is not None}
    if server.endpoint == "videos":
        return await client.post("/v1/videos", json=body)
    if ask.n > 1:
        body["n"] = ask.n
    if server.image is None:
        return await client.post("/v1/images/generations", json=body)
    media_type = mimetypes.guess_type(server.image.name)[0] or "application/octet-stream"
    files = {"image": (server.image.name, server.image.read_bytes(), media_type)}
    return await client.post("/v1/images/edits", data=body, files=files)


async def _finished(client: httpx.AsyncClient, job: Any) -> tuple[int, str, Mapping[str, float], float]:
    """Waits for the job's end and fetches its file. Returns the same as `_attempt`."""
    path = f"/v1/videos/{job['id']}"
    while job["status"] not in ("completed", "failed"):
        await asyncio.sleep(POLL_S)
        looked = await client.get(path)
        if looked.is_error:
            return looked.status_code, _told(looked), {}, 0.0
        job = looked.json()
    if job["status"] == "failed":
        return HTTPStatus.OK, f"the job failed: {job.get('error')}", {}, 0.0
    content = await client.get(f"{path}/content", follow_redirects=True)
    return content.status_code, _told(content) if content.is_error else "", {}, 0.0


def _read_pictures(document: Any, n: int) -> tuple[str, Mapping[str, float]]:
    data = document.get("data") if isinstance(document, dict) else None
    if not isinstance(data, list) or len(data) != n:
        return f"asked for {n} images, got {len(data) if isinstance(data, list) else 'none'}", {}
    if not all(picture.get("b64_json") or picture.get("url") for picture in data):
        return "an image has neither b64_json nor url", {}
    timings: list[Mapping[str, float]] = [picture.get("timings_ms") or {} for picture in data]
    return "", max(timings, key=lambda stages: sum(stages.values()))


def _told(answer: httpx.Response) -> str:
    """Returns the status with the error's message, or with the start of the body if there is none."""
    try:
        return f"{answer.status_code}: {answer.json()['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{answer.status_code}: {answer.text[:200]}"


def _retry_after_s(answer: httpx.Response) -> float:
    """Returns the seconds in Retry-After; RETRY_AFTER_S if there is none or it is a date."""
    try:
        return max(0.0, float(answer.headers.get("Retry-After", RETRY_AFTER_S)))
    except ValueError:
        return RETRY_AFTER_S
