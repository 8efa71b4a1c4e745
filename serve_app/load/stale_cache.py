"""A one-second cache shared by concurrent callers."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Value = TypeVar("Value")
log = logging.getLogger("ray.serve")

FRESH_S = 1.0
"""An answer younger than this is returned again."""
TIMEOUT_S = 2.0
"""After this time an older answer is returned, with its age. Longer than a ping of a replica takes to fail."""
FIRST_TIMEOUT_S = 10.0
"""Timeout of the first answer, because there is no older one to return."""


@dataclass(frozen=True)
class CachedValue(Generic[Value]):
    """A cached answer, and its age in seconds."""

    value: Value
    age_s: float


class StaleWhileRevalidate(Generic[Value]):
    """Calls `fetch` at most once a second, for any number of callers, and never twice at once."""

    def __init__(self, fetch: Callable[[], Awaitable[Value]]) -> None:
        self._fetch = fetch
        self._cached: tuple[float, Value] | None = None
        self._refreshing: asyncio.Task[None] | None = None

    def get_now(self) -> Value | None:
        """Returns the last answer, of any age, or None; starts a refresh if it is not fresh."""
        self._refresh_if_stale()
        return None if self._cached is None else self._cached[1]

    async def get(self) -> CachedValue[Value] | None:
        """Returns a fresh answer, or the last one after a timeout; None if there has never been one."""
        refreshing = self._refresh_if_stale()
        if refreshing is not None:
            timeout_s = FIRST_TIMEOUT_S if self._cached is None else TIMEOUT_S
            await asyncio.wait([refreshing], timeout=timeout_s)
        if self._cached is None:
            return None
        return CachedValue(self._cached[1], time.monotonic() - self._cached[0])

    def _refresh_if_stale(self) -> "asyncio.Task[None] | None":
        """Returns the task that refreshes the answer, or None if the answer is fresh."""
        if self._cached is not None and time.monotonic() - self._cached[0] <= FRESH_S:
            return None
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._refresh())
        return self._refreshing

    async def _refresh(self) -> None:
        began = time.monotonic()
        try:
            self._cached = began, await self._fetch()
        except Exception:  # whatever the error, the previous answer is still useful, with its age
            log.exception("the status could not be read")
