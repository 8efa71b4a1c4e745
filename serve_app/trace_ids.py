"""Who asked, in the logs.

Serve itself takes `x-request-id` from the client (or makes one up), answers with it, and writes it into every log
line of every stage. Here a client that sends W3C's `traceparent` has its trace joined to that.
"""

import logging
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("ray.serve")

TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
"""https://www.w3.org/TR/trace-context/#traceparent-header; the group is the trace id."""


class TraceIds:
    """ASGI middleware: logs which trace a request belongs to, and answers with its `traceparent`."""

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
