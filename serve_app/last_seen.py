"""What costs something to find out is found out once for everybody who asks meanwhile, and kept for a second."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Answer = TypeVar("Answer")
log = logging.getLogger("ray.serve")

FRESH_S = 1.0
"""Younger than this, an answer is given again."""
PATIENCE_S = 2.0
"""After so long an older one is given, and its age says so. Longer than a ping of a replica takes to fail."""
FIRST_PATIENCE_S = 10.0
"""For the first, which nothing stands in for."""


@dataclass(frozen=True)
class Sight(Generic[Answer]):
    """What was seen, and how many seconds ago."""

    answer: Answer
    age_s: float


class LastSeen(Generic[Answer]):
    """Asks `look` at most once a second, however many want to know, and never twice at once."""

    def __init__(self, look: Callable[[], Awaitable[Answer]]) -> None:
        self._look = look
        self._seen: tuple[float, Answer] | None = None
        self._looking: asyncio.Task[None] | None = None

    async def get(self) -> Sight[Answer] | None:
        """None if nothing was ever seen, and is not now within FIRST_PATIENCE_S."""
        if self._seen is None or time.monotonic() - self._seen[0] > FRESH_S:
            if self._looking is None or self._looking.done():
                self._looking = asyncio.create_task(self._refresh())
            patience_s = FIRST_PATIENCE_S if self._seen is None else PATIENCE_S
            await asyncio.wait([self._looking], timeout=patience_s)
        if self._seen is None:
            return None
        return Sight(self._seen[1], time.monotonic() - self._seen[0])

    async def _refresh(self) -> None:
        began = time.monotonic()
        try:
            self._seen = began, await self._look()
        except Exception:  # whatever it is, what was seen before is still worth telling, with its age
            log.exception("what there is to see could not be seen")
