"""Joins a client's trace ID to the request ID in the logs.

Serve itself takes `x-request-id` from the client (or generates one), returns it, and writes it into every log line
of every stage. If a client sends W3C's `traceparent`, this module logs its trace ID next to that request ID.
"""

import logging
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("ray.serve")

TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
"""https://www.w3.org/TR/trace-context/#traceparent-header; the group is the trace ID."""


class TraceIds:
    """ASGI middleware: logs which trace a request belongs to, and returns its `traceparent`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        traceparent = Headers(scope=scope).get("traceparent", "") if scope["type"] == "http" else ""
        match = TRACEPARENT.fullmatch(traceparent)
        if match is None:
            await self._app(scope, receive, send)
            return
        log.info("trace %s", match[1])

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["traceparent"] = traceparent
            await send(message)

        await self._app(scope, receive, answer)
