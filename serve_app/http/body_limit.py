"""Refuses bodies that are too long, or too many at once, while they arrive.

FastAPI's `max_body_size` is not used, because it answers in plain text.
"""

from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import Overloaded

MAX_BYTES_AT_ONCE = 2**30
"""Limit for the bodies of all requests in progress in this process. Texts never reach it; images may."""


class BodyLimit:
    """ASGI middleware: reading more of a body than the limit raises a 413."""

    def __init__(self, app: ASGIApp, max_bytes: int, max_bytes_of: Mapping[str, int]) -> None:
        """max_bytes_of: limits of paths with these endings, in place of max_bytes."""
        self._app, self._max_bytes, self._max_bytes_of = app, max_bytes, max_bytes_of
        self._num_at_once = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        max_bytes = next((n for end, n in self._max_bytes_of.items() if path.endswith(end)), self._max_bytes)
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            more = len(message.get("body", b""))
            num_bytes += more
            self._num_at_once += more
            if num_bytes > max_bytes:
                raise HTTPException(413, f"the body is too long; the limit is {max_bytes} bytes")
            if self._num_at_once > MAX_BYTES_AT_ONCE:
                raise Overloaded(
                    f"the bodies of all requests together exceed {MAX_BYTES_AT_ONCE} bytes; try again"
                )
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            self._num_at_once -= num_bytes
