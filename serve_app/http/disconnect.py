"""Cancels a request's work when its client disconnects.

Serve cancels the request of a disconnected client by a call to this process, which can be lost if it arrives as
the request starts. The disconnect message of the proxy, for which every application may wait, arrives
independently.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

from serve_app.errors import ClientLeft

Answer = TypeVar("Answer")


async def while_connected(request: Request, work: Coroutine[Any, Any, Answer]) -> Answer:
    """Returns the result of the work. The request's body must have been read. If the client disconnects, cancels
    the work and raises ClientLeft."""
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
