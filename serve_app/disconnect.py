"""A request is drawn only for as long as its client is there.

Serve cancels the request of a client that has left, by a call to this process that can come to nothing if it meets
the start of the request; the proxy's own word of it, which every application may wait for, comes another way.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

from serve_app.errors import ClientLeft

Answer = TypeVar("Answer")


async def while_connected(request: Request, work: Coroutine[Any, Any, Answer]) -> Answer:
    """What the work answers; its body must have been read. Raises ClientLeft, and cancels the work."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(_leave(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeft("the client has left")
    finally:
        leaving.cancel()
        working.cancel()


async def _leave(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
