"""HEAD is GET without its body."""

from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

IS_HEAD = "latent_relay.is_head"


class HeadIsGet:
    """ASGI middleware: routes HEAD as GET. The HTTP server, which knows that the request is HEAD, drops the
    body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_head = scope["type"] == "http" and scope["method"] == "HEAD"
        await self._app({**scope, "method": "GET", IS_HEAD: True} if has_head else scope, receive, send)


def is_head(scope: Mapping[str, Any]) -> bool:
    """Whether the answer's body will be dropped, so that a large one need not be read."""
    return bool(scope.get(IS_HEAD))
