"""A one-second cache shared by concurrent callers."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Answer = TypeVar("Answer")
log = logging.getLogger("ray.serve")

FRESH_S = 1.0
"""An answer younger than this is returned again."""
TIMEOUT_S = 2.0
"""After this time an older answer is returned, with its age. Longer than a ping of a replica takes to fail."""
FIRST_TIMEOUT_S = 10.0
"""Timeout of the first answer, because there is no older one to return."""


@dataclass(frozen=True)
class Sight(Generic[Answer]):
    """A cached answer, and its age in seconds."""

    answer: Answer
    age_s: float


class LastSeen(Generic[Answer]):
    """Calls `look` at most once a second, for any number of callers, and never twice at once."""

    def __init__(self, look: Callable[[], Awaitable[Answer]]) -> None:
        self._look = look
        self._seen: tuple[float, Answer] | None = None
        self._looking: asyncio.Task[None] | None = None

    def peek(self) -> Answer | None:
        """Returns the last answer, of any age, or None; starts a refresh if it is not fresh."""
        self._look_again()
        return None if self._seen is None else self._seen[1]

    async def get(self) -> Sight[Answer] | None:
        """Returns a fresh answer, or the last one after a timeout; None if there has never been one."""
        looking = self._look_again()
        if looking is not None:
            timeout_s = FIRST_TIMEOUT_S if self._seen is None else TIMEOUT_S
            await asyncio.wait([looking], timeout=timeout_s)
        if self._seen is None:
            return None
        return Sight(self._seen[1], time.monotonic() - self._seen[0])

    def _look_again(self) -> "asyncio.Task[None] | None":
        """Returns the task that refreshes the answer, or None if the answer is fresh."""
        if self._seen is not None and time.monotonic() - self._seen[0] <= FRESH_S:
            return None
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._refresh())
        return self._looking

    async def _refresh(self) -> None:
        began = time.monotonic()
        try:
            self._seen = began, await self._look()
        except Exception:  # whatever the error, the previous answer is still useful, with its age
            log.exception("the status could not be read")
