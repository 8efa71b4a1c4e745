"""What every request meets first: its key.

Without `auth` all requests are taken. With it those that have a key that opens, but for a few paths that tell
nothing of what is drawn: `/health` for load balancers, and the pages, which ask for a key themselves.
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

log = logging.getLogger("ray.serve")

T = TypeVar("T")

OPEN_PATHS = frozenset(("", "/", "/docs", "/openapi.json", "/health"))
"""They need no key, nor do the pages' own files. All others do, those that are added later included."""
TOLD_HEADERS = ("Retry-After", "Server-Timing", "X-Forwards", "X-Request-ID", "X-Seed", "X-Warnings")
"""Which scripts of another origin may read."""
_NO_KEY = "this server asks for a key, and the request has none: send the header Authorization: Bearer KEY"
_WRONG_KEY = "the key is none of this server's, or was revoked: ask who runs it for another"


def add_access(api: FastAPI, cors: CorsConfig | None, keys: "Keys | None") -> None:
    """After all other middleware: the last that is added is met first. A preflight of CORS has no key."""
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
    """In OpenAPI's terms."""
    described = api.openapi()
    described.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    described["security"] = [{"key": []}]
    for path in OPEN_PATHS & described["paths"].keys():
        for operation in described["paths"][path].values():
            operation["security"] = []


async def charge(request: HTTPConnection, requests: Sequence[GenerationRequest]) -> None:
    """Takes off the key's budget what is asked for, before it is drawn. Raises OverBudget."""
    admission = _admission(request)
    if admission is not None:
        await admission.charge(sum(each.megapixel_steps for each in requests))


async def charged(request: HTTPConnection, events: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The same events. If they end by an error, which HTTP's status does not tell any more, what was charged is
    given back."""
    admission = _admission(request)
    async with aclosing(events):
        try:
            async for event in events:
                yield event
        except Exception:
            if admission is not None:
                admission.give_back()
            raise


def _admission(request: HTTPConnection) -> Admission | None:
    found: Admission | None = getattr(request.state, "admission", None)
    return found


class Keys:
    """The keys of one ingress, and what they use."""

    def __init__(self, auth: AuthConfig, counter: Any) -> None:
        """Raises KeyFault, or FileNotFoundError."""
        self._file, self.limits, self.metrics = KeyFile(auth.keys_path), SharedLimits(counter), KeyMetrics()
        self._file.follow()

    def identify(self, authorization: str | None) -> ApiKey:
        """Whose key it is. What was sent is told to nobody. Raises Unauthorized."""
        scheme, _, secret = (authorization or "").strip().partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise Unauthorized(_NO_KEY)
        key = self._file.keys.find(secret.strip().encode("latin-1"))
        if key is None:
            raise Unauthorized(_WRONG_KEY)
        return key


class KeyMiddleware:
    """ASGI middleware: `request.state.key_name`, None where no key was asked for."""

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
            await send({"type": "websocket.close", "code": 1008})  # there is none, and none without a key

    async def _admit(self, keys: Keys, scope: Scope, receive: Receive, send: Send) -> None:
        answer = Answer(send)
        name, admission = "", None
        try:
            key = keys.identify(Headers(scope=scope).get("authorization"))
            name = key.name
            log.info("key %s", name)
            async with keys.limits.admission(key) as admission:
                await self._app(_with_state(scope, key_name=name, admission=admission), receive, answer.send)
        except RelayError as refusal:
            if answer.has_started:
                raise
            response = JSONResponse(refusal.body(), refusal.status, refusal.headers())
            await response(scope, receive, answer.send)
        except Exception:
            answer.status = StageFailed.status  # as which it will be told, further out
            raise
        finally:
            if admission is not None and answer.is_error:
                admission.give_back()
            keys.metrics.note(name, answer.status, admission.megapixel_steps if admission else 0.0)


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(f"{FILES}/")


class Answer:
    """What goes back, and its status: 499 until there is one."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status, self.has_started = ClientLeft.status, False

    @property
    def is_error(self) -> bool:
        """Of which the client has nothing; who left before the end has had the work done."""
        return self.status >= 400 and self.status != ClientLeft.status

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.has_started = message["status"], True
        await self._send(message)


def _with_state(scope: Scope, **facts: Any) -> Scope:
    """The state of this request alone."""
    return {**scope, "state": {**scope.get("state", {}), **facts}}
