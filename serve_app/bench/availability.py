"""Checks whether the server accepts new requests, by sending one after another, each over a new connection."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from serve_app.bench.answers import Body, open_client, post

NUM_STEPS = 4
PERIOD_S = 0.3
ATTEMPT_S = 100.0
"""A new request that is not answered for this long counts as hung, and is sent again."""


class AvailabilityProbe:
    """Sends new requests, and records when they are answered."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.sent: list[Body] = []
        """One entry for each time that a request was sent, repetitions included."""
        self.answered: list[tuple[Body, bytes]] = []
        self.longest_wait_s = 0.0
        """The longest wait of a request for its image, including rejections, resets and repetitions."""

    @asynccontextmanager
    async def sending(self) -> AsyncIterator[None]:
        """Sends new requests during the block, and waits at its end until the last is answered."""
        is_over = asyncio.Event()
        sending = asyncio.create_task(self._send_repeatedly(is_over))
        yield
        is_over.set()
        await sending

    async def wait_for_new_answer(self) -> None:
        """Waits until a request that was sent after this call is answered."""
        enough = len(self.answered) + 2  # the next one may have been sent before this call
        while len(self.answered) < enough:
            await asyncio.sleep(0.02)

    async def _send_repeatedly(self, is_over: asyncio.Event) -> None:
        while True:
            began = time.perf_counter()
            self.answered.append(await self._send_until_answered())
            self.longest_wait_s = max(self.longest_wait_s, time.perf_counter() - began)
            if is_over.is_set():
                return
            await asyncio.sleep(PERIOD_S)

    async def _send_until_answered(self) -> tuple[Body, bytes]:
        seed = 1000 + len(self.answered) % 4
        body = {"prompt": f"prompt {seed}", "seed": seed, "num_inference_steps": NUM_STEPS}
        while True:
            self.sent.append(body)
            try:
                async with open_client(self._url) as client, asyncio.timeout(ATTEMPT_S):
                    return body, await post(client, body)
            except (httpx.HTTPError, TimeoutError):
                await asyncio.sleep(0.1)
