"""ASGI middleware that runs in Serve's HTTP proxies before every application. Imports no torch.

RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH (ray_environment.py) names `build_middlewares`, and so loads this module.

A request is passed to an ingress only when its body is complete, so that no incomplete body occupies a place
there. If the ingress dies before it answers, the request is repeated on another one. The proxy's own errors are
converted to the API's form.
"""

import asyncio
import json
import logging
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field

import uvicorn.config
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import BadCall, Overloaded, RelayError, Unavailable, named
from serve_app.http.proxy_exit import ExitOnSigterm

log = logging.getLogger("ray.serve")

MAX_HEADERS = 100
MAX_HEAD_BYTES = 32 * 1024
"""Limit for path, query and headers together."""
MAX_REQUEST_ID_CHARACTERS = 128
SERVE_HEADERS = (b"x-request-id", b"serve-multiplexed-model-id", b"x-session-id", b"x-request-timeout-seconds")
"""Headers that Serve reads, and on which it fails if they are not UTF-8; `_` may replace `-`."""
DISCONNECT_DISABLED_HEADER = b"x-request-disconnect-disabled"
"""With this header Serve would not notice a disconnected client, so it is removed from clients' requests."""
BODY_TIMEOUT_S = 30.0
MAX_BUFFERED_BYTES = 2**20
"""The rest of a longer body is passed on as it arrives; the ingress refuses bodies that are too long."""
MAX_UNFINISHED_BODIES = 128
REPEATED_POSTS = ("/v1/images/generations", "/v1/images/edits", "/v1/videos/sync", "/v1/videos")
"""Paths whose requests may be repeated if no answer has been sent yet."""
IDEMPOTENCY_KEY_HEADER = b"idempotency-key"
"""The client's, or one generated here for all repeats: it lets an ingress recognise a job that a lost ingress
created."""
REQUEST_ID_HEADER = b"x-relay-request"
"""Lets a key's counter recognise a request that it has already counted. A client's own header is removed."""
MAX_REPEATS = 2
BACKOFF_S = 0.5

_KINDS: dict[int, type[RelayError]] = {503: Unavailable}

Headers = Iterable[tuple[bytes, bytes]]


def build_middlewares() -> list[Middleware]:
    """Called by Serve in every HTTP proxy before uvicorn starts; the last middleware is the outermost."""
    # Serve leaves uvicorn's protocol at `auto`.
    uvicorn.config.HTTP_PROTOCOLS["auto"] = "serve_app.http.connection:BoundedConnection"
    return [Middleware(ProxyMiddleware), Middleware(ExitOnSigterm)]


class ProxyMiddleware:
    """ASGI middleware around the whole proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._unfinished: dict[asyncio.Timeout, None] = {}
        self._last_wait_s: float | None = None
        """Seconds until there is room, as an ingress last reported."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        rejection = validate_head(scope)
        if rejection is not None:
            await _answer(send, *rejection)
            return
        client = Client(receive)
        try:
            await self._read_body(client)
        except TimeoutError:
            late = BadCall(
                f"the body did not arrive within {BODY_TIMEOUT_S:g} s, or too many others are incomplete"
            )
            await _answer(send, 408, late)
            return
        if not client.has_left:
            await self._ask(scope, client, send)

    async def _read_body(self, client: "Client") -> None:
        """Reads a body; if too many are incomplete, the oldest one times out. Raises TimeoutError."""
        async with asyncio.timeout(BODY_TIMEOUT_S) as timeout:
            self._unfinished[timeout] = None
            try:
                if len(self._unfinished) > MAX_UNFINISHED_BODIES:
                    oldest = next(iter(self._unfinished))
                    del self._unfinished[oldest]
                    if not oldest.expired():
                        oldest.reschedule(asyncio.get_running_loop().time())
                await client.read_body()
            finally:
                self._unfinished.pop(timeout, None)

    async def _ask(self, scope: Scope, client: "Client", send: Send) -> None:
        may_repeat = client.has_whole_body and (
            scope["method"] in ("GET", "HEAD") or scope["path"].endswith(REPEATED_POSTS)
        )
        if may_repeat and all(name != IDEMPOTENCY_KEY_HEADER for name, _ in scope["headers"]):
            scope = {**scope, "headers": [*scope["headers"], (IDEMPOTENCY_KEY_HEADER, uuid.uuid4().hex.encode())]}
        others = [header for header in scope["headers"] if header[0] != REQUEST_ID_HEADER]
        scope = {**scope, "headers": [*others, (REQUEST_ID_HEADER, uuid.uuid4().hex.encode())]}
        for attempt in range(1 + MAX_REPEATS * may_repeat):
            if attempt:
                log.warning("an ingress was lost before it answered; attempt %d follows", attempt + 1)
                await asyncio.sleep(BACKOFF_S * attempt)
            answer = Answer(send, is_serve_route=scope["path"].startswith("/-/"))
            try:
                await self._app(_copy(scope), client.receiver(), answer.send)
            except Exception:
                if answer.has_started:
                    raise
                log.exception("Serve's proxy failed")
            self._last_wait_s = answer.retry_after_s or self._last_wait_s
            if answer.withheld_start is not None:
                await self._send_proxy_error(scope, answer, send)
            if answer.has_started or client.has_left:
                return
        await _answer(send, Unavailable.status, Unavailable("the ingress was lost before it answered; try again"))

    async def _send_proxy_error(self, scope: Scope, answer: "Answer", send: Send) -> None:
        """Sends the proxy's own answer in the API's form."""
        assert answer.withheld_start is not None
        status, text = answer.withheld_start["status"], b"".join(answer.text).decode(errors="replace")
        error: RelayError
        if status == 404 and not await self._serves_anything(scope):
            status, error = 503, Unavailable("nothing is served here yet")
        elif status == 404:
            path = named(scope["path"])
            error = BadCall(f"{scope['method']} {path}: no application is served there; GET /-/routes lists them")
        else:
            message = text.partition("\n")[0]
            error = (
                Overloaded(message, self._last_wait_s) if status == 429 else _KINDS.get(status, BadCall)(message)
            )
        ids = [header for header in answer.withheld_start["headers"] if header[0].lower() == b"x-request-id"]
        await _answer(send, status, error, ids, ends_connection=False)

    async def _serves_anything(self, scope: Scope) -> bool:
        """Whether the proxy's own list of routes contains an application."""
        said: list[bytes] = []

        async def receive() -> Message:
            await asyncio.Event().wait()
            raise AssertionError("unreachable")

        async def hear(message: Message) -> None:
            said.append(message.get("body", b""))

        asked = {**_copy(scope), "method": "GET", "path": "/-/routes", "root_path": ""}
        await self._app(asked, receive, hear)
        return b"".join(said).startswith(b'{"')


@dataclass
class Client:
    """One client: the body read so far, and whether the client is still connected."""

    receive: Receive
    body: bytearray = field(default_factory=bytearray)
    has_whole_body: bool = False
    has_left: bool = False

    async def read_body(self) -> None:
        """Reads until the body is complete or longer than MAX_BUFFERED_BYTES."""
        while not (self.has_whole_body or self.has_left or len(self.body) > MAX_BUFFERED_BYTES):
            message = await self._next()
            self.body += message.get("body", b"")
            self.has_whole_body = not self.has_left and not message.get("more_body", False)

    def receiver(self) -> Receive:
        """Returns the `receive` function for an application: yields the body read so far, then what follows."""
        is_given = False

        async def receive() -> Message:
            nonlocal is_given
            if not is_given:
                is_given = True
                return {"type": "http.request", "body": bytes(self.body), "more_body": not self.has_whole_body}
            if self.has_whole_body:
                return await self._next()
            try:
                async with asyncio.timeout(BODY_TIMEOUT_S):
                    return await self._next()
            except TimeoutError:
                self.has_left = True
                return {"type": "http.disconnect"}

        return receive

    async def _next(self) -> Message:
        message = await self.receive()
        self.has_left |= message["type"] == "http.disconnect"
        return message


class Answer:
    """One answer: sent on to the client, except that an answer of Serve's proxy itself is withheld_start back."""

    def __init__(self, send: Send, *, is_serve_route: bool) -> None:
        self._send, self._is_serve_route = send, is_serve_route
        self.has_started = False
        self.withheld_start: Message | None = None
        self.text: list[bytes] = []
        self.retry_after_s: float | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and not self._is_serve_route and is_from_proxy(message):
            self.withheld_start = message
        elif message["type"] == "http.response.start" and message["status"] == Overloaded.status:
            self.retry_after_s = _retry_after_s(message)
        if self.withheld_start is not None:
            self.text.append(message.get("body", b""))
        else:
            await self._send(message)
        self.has_started = True


def _retry_after_s(start: Message) -> float | None:
    value = next((value for name, value in start["headers"] if name.lower() == b"retry-after"), b"")
    return float(value) if value.isdigit() else None


def is_from_proxy(start: Message) -> bool:
    """Whether the answer is an error in Serve's own words: text without a content length."""
    headers = {name.lower(): value for name, value in start["headers"]}
    is_text = headers.get(b"content-type", b"").startswith(b"text/plain")
    return start["status"] in (404, 408, 429, 503) and is_text and b"content-length" not in headers


def validate_head(scope: Scope) -> tuple[int, RelayError] | None:
    """Returns the status and error of a request whose head is refused, else None."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    if scope.get("http_version") not in ("1.0", "1.1", "2"):
        return 505, BadCall("HTTP/1.1 is required")
    num_bytes = sum(len(name) + len(value) for name, value in headers)
    num_bytes += len(scope["raw_path"]) + len(scope["query_string"])
    if num_bytes > MAX_HEAD_BYTES or len(headers) > MAX_HEADERS:
        found = f"{len(headers)} headers and {num_bytes} bytes with the path"
        return 431, BadCall(f"{found}; the limit is {MAX_HEADERS} headers and {MAX_HEAD_BYTES} bytes")
    for name, value in headers:
        own = name.replace(b"_", b"-")
        if own not in SERVE_HEADERS:
            continue
        is_printable = value.isascii() and value.decode("ascii").isprintable()
        if not is_printable or not 1 <= len(value) <= MAX_REQUEST_ID_CHARACTERS:
            limit = f"1 to {MAX_REQUEST_ID_CHARACTERS} printable ASCII characters"
            return 400, BadCall(f"the header {own.decode()} must be {limit}")
    return None


def _copy(scope: Scope) -> Scope:
    """Returns a copy of the scope, because Serve modifies it."""
    return {**scope, "headers": [header for header in scope["headers"] if header[0] != DISCONNECT_DISABLED_HEADER]}


async def _answer(
    send: Send, status: int, error: RelayError, headers: Headers = (), *, ends_connection: bool = True
) -> None:
    body = json.dumps(error.body()).encode()
    own = {"content-type": "application/json", "content-length": str(len(body))} | error.headers()
    if ends_connection:
        own["connection"] = "close"
    all_headers = [*headers, *((name.encode(), value.encode()) for name, value in own.items())]
    await send({"type": "http.response.start", "status": status, "headers": all_headers})
    await send({"type": "http.response.body", "body": body})
