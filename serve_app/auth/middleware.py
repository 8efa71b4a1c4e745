"""The middleware that every request passes first: it checks the API key.

Without `auth`, all requests are accepted. With it, a request needs a valid key, except on a few paths that reveal
nothing about what is generated: `/health` for load balancers, and the pages, which ask for a key themselves.
"""

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.request import GenerationRequest
from serve_app.auth.config import AuthConfig, CorsConfig
from serve_app.auth.counter import Admission, SharedLimits
from serve_app.auth.key_file import KeyFile
from serve_app.auth.keys import ApiKey
from serve_app.auth.metrics import KeyMetrics
from serve_app.errors import ClientLeft, RelayError, StageFailed, Unauthorized
from serve_app.page.routes import FILES
from serve_app.proxy_middleware import REQUEST_ID_HEADER

log = logging.getLogger("ray.serve")

T = TypeVar("T")

OPEN_PATHS = frozenset(("", "/", "/docs", "/openapi.json", "/health"))
"""Paths that need no key, like the pages' own files. All other paths do, including those that are added later."""
TOLD_HEADERS = (
    "Content-Disposition",
    "Content-Range",
    "ETag",
    "openai-poll-after-ms",
    "Retry-After",
    "Server-Timing",
    "X-Forwards",
    "X-Request-ID",
    "X-Seed",
    "X-Should-Retry",
    "X-Warnings",
)
"""Response headers that scripts of another origin may read."""
_NO_KEY = "this server requires a key, and the request has none: send the header Authorization: Bearer KEY"
_WRONG_KEY = "this server does not know the key, or it was revoked: ask the server's operator for another"


def add_access(api: FastAPI, cors: CorsConfig | None, keys: "Keys | None") -> None:
    """Adds the middleware for keys and CORS.

    Call it after all other middleware is added: the last one added runs first. CORS runs before the key check,
    because preflight requests have no key.
    """
    api.add_middleware(KeyMiddleware, keys=keys)
    if keys is not None:
        _describe(api)
    if cors is not None:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=cors.origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=TOLD_HEADERS,
        )


def _describe(api: FastAPI) -> None:
    """Adds the key to the OpenAPI description."""
    described = api.openapi()
    described.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    described["security"] = [{"key": []}]
    for path in OPEN_PATHS & described["paths"].keys():
        for operation in described["paths"][path].values():
            operation["security"] = []


async def charge(request: HTTPConnection, requests: Sequence[GenerationRequest]) -> None:
    """Charges the requests to the key's budget, before they are run. Raises OverBudget or BadRequest."""
    admission = _admission(request)
    if admission is not None:
        await admission.charge(requests)


async def charged(request: HTTPConnection, events: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """Yields the same events. If they end with an error, which the HTTP status can no longer show, the charge is
    given back."""
    admission = _admission(request)
    async with aclosing(events):
        try:
            async for event in events:
                yield event
        except Exception:
            if admission is not None:
                await admission.give_back()
            raise


async def give_back(request: HTTPConnection) -> None:
    """Gives back what this request was charged, because another request has paid for the same job."""
    admission = _admission(request)
    if admission is not None:
        await admission.give_back()


def _admission(request: HTTPConnection) -> Admission | None:
    found: Admission | None = getattr(request.state, "admission", None)
    return found


class Keys:
    """The keys of one ingress, their limits and their metrics."""

    def __init__(self, auth: AuthConfig, counter: Any) -> None:
        """Raises KeyFault or FileNotFoundError."""
        self._file, self.limits, self.metrics = KeyFile(auth.keys_path), SharedLimits(counter), KeyMetrics()
        self._file.follow()

    def identify(self, authorization: str | None) -> ApiKey:
        """Returns the key in an Authorization header. Raises Unauthorized, without quoting what was sent."""
        scheme, _, secret = (authorization or "").strip().partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise Unauthorized(_NO_KEY)
        key = self._file.keys.find(secret.strip().encode("latin-1"))
        if key is None:
            raise Unauthorized(_WRONG_KEY)
        return key

    def give_back(self, name: str, megapixel_steps: float, charged_at: float) -> None:
        """Gives back what the key `name` was charged at `charged_at`, for a job that produced nothing."""
        key = self._file.keys.named(name)
        if key is not None:
            self.limits.give_back_later(key, megapixel_steps, charged_at)
            self.metrics.note_returned(name, megapixel_steps)


class KeyMiddleware:
    """ASGI middleware that sets `request.state.key_name`, None where no key is needed."""

    def __init__(self, app: ASGIApp, keys: Keys | None) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif self._keys is None or (scope["type"] == "http" and _is_open(get_route_path(scope))):
            await self._app(_with_state(scope, key_name=None), receive, send)
        elif scope["type"] == "http":
            await self._admit(self._keys, scope, receive, send)
        else:
            # There is no websocket route, and one that is added later must not be open without a key.
            await send({"type": "websocket.close", "code": 1008})

    async def _admit(self, keys: Keys, scope: Scope, receive: Receive, send: Send) -> None:
        answer = Answer(send)
        name, admission = "", None
        try:
            key = keys.identify(Headers(scope=scope).get("authorization"))
            name = key.name
            log.info("key %s", name)
            async with keys.limits.admission(
                key, Headers(scope=scope).get(REQUEST_ID_HEADER.decode())
            ) as admission:
                answer.admission = admission
                await self._app(_with_state(scope, key_name=name, admission=admission), receive, answer.send)
        except RelayError as error:
            if answer.has_started:
                raise
            response = JSONResponse(error.body(), error.status, error.headers())
            await response(scope, receive, answer.send)
        except Exception:
            answer.status = StageFailed.status  # which an outer handler will send
            raise
        finally:
            if admission is not None and answer.is_error:
                await admission.give_back()
            keys.metrics.note(name, answer.status, admission.megapixel_steps if admission else 0.0)


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(f"{FILES}/")


class Answer:
    """Sends the response and records its status: 499 until there is one.

    The charge is given back before an error is sent, because the client may repeat the request at once.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.admission: Admission | None = None
        self.status, self.has_started = ClientLeft.status, False

    @property
    def is_error(self) -> bool:
        """Whether the client gets nothing. One that left early (499) does not count: its work was done."""
        return self.status >= 400 and self.status != ClientLeft.status

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.has_started = message["status"], True
            if self.is_error and self.admission is not None:
                await self.admission.give_back()
        await self._send(message)


def _with_state(scope: Scope, **facts: Any) -> Scope:
    """Returns a scope whose state belongs to this request only."""
    return {**scope, "state": {**scope.get("state", {}), **facts}}
