"""Is the door open? A new request after another knocks, each over a connection of its own."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from serve_app.bench.answers import Body, open_client, post

NUM_STEPS = 4
PERIOD_S = 0.3
ATTEMPT_S = 100.0
"""A new request that is not answered for so long hangs; it is sent again."""


class Door:
    """How the new requests fared."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.sent: list[Body] = []
        """Each time that one was sent."""
        self.answered: list[tuple[Body, bytes]] = []
        self.shut_s = 0.0
        """The longest that one had to wait for its picture, refused, reset and sent again meanwhile."""

    @asynccontextmanager
    async def knocked_at(self) -> AsyncIterator[None]:
        """During the block, and until the last new request is answered."""
        is_over = asyncio.Event()
        knocking = asyncio.create_task(self._knock(is_over))
        yield
        is_over.set()
        await knocking

    async def answers_anew(self) -> None:
        """Until a request that is sent from now on is answered."""
        enough = len(self.answered) + 2  # the next one may have been sent already
        while len(self.answered) < enough:
            await asyncio.sleep(0.02)

    async def _knock(self, is_over: asyncio.Event) -> None:
        while True:
            began = time.perf_counter()
            self.answered.append(await self._insist())
            self.shut_s = max(self.shut_s, time.perf_counter() - began)
            if is_over.is_set():
                return
            await asyncio.sleep(PERIOD_S)

    async def _insist(self) -> tuple[Body, bytes]:
        seed = 1000 + len(self.answered) % 4
        body = {"prompt": f"prompt {seed}", "seed": seed, "num_inference_steps": NUM_STEPS}
        while True:
            self.sent.append(body)
            try:
                async with open_client(self._url) as client, asyncio.timeout(ATTEMPT_S):
                    return body, await post(client, body)
            except (httpx.HTTPError, TimeoutError):
                await asyncio.sleep(0.1)
