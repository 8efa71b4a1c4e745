"""Handling of SIGTERM in Serve's HTTP proxy: it ends as soon as it has no request, and Serve starts another.

Serve starts a node's next proxy only when the previous one is dead, so for some seconds nothing listens there.
"""

import os
import time

from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.termination import on_sigterm

GRACE_S = 600.0
"""For a proxy that always has a request: no other could replace it, so it stays as long as a request may take."""
FLUSH_S = 0.2
"""An answer leaves the application a little before it leaves the process."""
PERIOD_S = 0.02


class ExitOnSigterm:
    """ASGI middleware: counts the requests in the process, and after SIGTERM ends it when there are none."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._num_open = 0
        on_sigterm(self._exit_when_idle)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        self._num_open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._num_open -= 1

    def _exit_when_idle(self) -> None:
        """Runs in a separate thread."""
        deadline = time.monotonic() + GRACE_S
        idle_since = time.monotonic()
        while (now := time.monotonic()) < deadline and now - idle_since < FLUSH_S:
            if self._num_open:
                idle_since = now
            time.sleep(PERIOD_S)
        os._exit(0)
