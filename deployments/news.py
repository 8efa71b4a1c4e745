"""What the thread of one request tells the event loop while it denoises. Torch-free."""

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from deployments.request import DecodeArguments, ForwardCounts, PartialDenoised, Progress, StreamOptions

if TYPE_CHECKING:
    import torch

PROGRESS_PERIOD_S = 0.2
"""Least time between two progress items: each costs 2-5 ms of the process that computes (measured)."""


class News:
    """Made on the event loop, told by the thread, heard on the event loop."""

    def __init__(self, num_steps: int, options: StreamOptions, observe_step_s: Callable[[float], None]) -> None:
        self._num_steps, self._options, self._observe_step_s = num_steps, options, observe_step_s
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[tuple[Any, ...] | None] = asyncio.Queue()
        self._arrived = self._started = self._stepped = time.perf_counter()
        self._reported = 0.0
        self.forwards = ForwardCounts(0, 0)

    @property
    def queue_ms(self) -> float:
        """What the request waited for a thread."""
        return (self._started - self._arrived) * 1e3

    @property
    def denoise_ms(self) -> float:
        """Since a thread took it."""
        return (time.perf_counter() - self._started) * 1e3

    def on_start(self) -> None:
        """A thread has taken the request."""
        self._started = time.perf_counter()
        self.on_step(0)

    def on_step(self, step: int, _latents: "torch.Tensor | None" = None) -> None:
        """So many steps are done."""
        now = time.perf_counter()
        if step:
            self._observe_step_s(now - self._stepped)
        self._stepped = now
        if self._options.wants_progress and now - self._reported >= PROGRESS_PERIOD_S:
            self._reported = now
            left = self._num_steps - step
            eta_s = round((now - self._started) / step * left, 3) if step else None
            self._tell(Progress(step, self._num_steps, eta_s))

    def on_forwards(self, counts: ForwardCounts) -> None:
        """All are done."""
        self.forwards = counts

    def on_partial(self, index: int, arguments: DecodeArguments) -> None:
        self._tell(PartialDenoised(index), arguments)

    def on_end(self, done: "asyncio.Future[Any]") -> None:
        """A callback of the thread's future, on the event loop."""
        done.cancelled() or done.exception()  # seen: of a cancelled request nobody else asks for it
        self._items.put_nowait(None)

    async def next(self) -> tuple[Progress | PartialDenoised | DecodeArguments, ...] | None:
        """Items that belong together; None once the request's thread has ended."""
        return await self._items.get()

    def _tell(self, *items: Any) -> None:
        self._loop.call_soon_threadsafe(self._items.put_nowait, items)
