"""What Serve's HTTP proxy does about SIGTERM: it ends as soon as no request is in it, and Serve starts another.

Serve starts a node's next proxy when the one before is dead, so between the two nobody listens, for some seconds.
"""

import os
import time

from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.termination import on_sigterm

GRACE_S = 600.0
"""For a proxy that always has a request: nobody could take its place, so it stays as long as one may take."""
FLUSH_S = 0.2
"""An answer has left the application a little before it has left the process."""
PERIOD_S = 0.02


class ExitOnSigterm:
    """ASGI middleware: counts the requests in the process, and ends it when there are none any more."""

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
        """In a thread of its own."""
        deadline = time.monotonic() + GRACE_S
        idle_since = time.monotonic()
        while (now := time.monotonic()) < deadline and now - idle_since < FLUSH_S:
            if self._num_open:
                idle_since = now
            time.sleep(PERIOD_S)
        os._exit(0)
