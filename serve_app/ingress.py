"""The deployment that clients meet, over HTTP or by a Python handle. Imports no torch and reads no tensor."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI

from deployments.request import Progress
from serve_app.generation import Picture
from serve_app.relay import Relay
from serve_app.routes import build_api


class Ingress(Relay):
    """A Relay as Serve sees it."""

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve asks for the HTTP application once this replica is made."""
        return build_api(self)

    async def generate(self, **fields: Any) -> list[Picture]:
        """For Python handles: the fields of the HTTP body in, pictures (or one video) out.

        `serve.get_app_handle("relay").generate.remote(prompt="a red circle", seed=7).result()`
        """
        return await self.run(self.validator.requests(fields))

    async def stream(self, **fields: Any) -> AsyncIterator[tuple[int, Progress] | list[Picture]]:
        """Like `generate`, with (index of the picture, Progress) items before the result."""
        news: asyncio.Queue[tuple[int, Progress] | None] = asyncio.Queue()
        requests = self.validator.requests(fields)
        running = asyncio.create_task(self.run(requests, lambda i, p: news.put_nowait((i, p))))
        running.add_done_callback(lambda _: news.put_nowait(None))
        try:
            while (item := await news.get()) is not None:
                yield item
            yield await running
        finally:
            running.cancel()
