"""HEAD is GET without its body."""

from starlette.types import ASGIApp, Receive, Scope, Send


class HeadIsGet:
    """ASGI middleware: routes HEAD as GET. The server in front, which was asked for HEAD, leaves the body out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_head = scope["type"] == "http" and scope["method"] == "HEAD"
        await self._app({**scope, "method": "GET"} if is_head else scope, receive, send)
