"""Passes the events of one request while it denoises from its thread to the event loop. Torch-free."""

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from deployments.answers import DecodeArguments, ForwardCounts, PartialDenoised, Progress
from deployments.options.resume import UnsavedPart
from deployments.request import StreamOptions

if TYPE_CHECKING:
    import torch

PROGRESS_PERIOD_S = 0.2
"""Least time between two progress items: each costs the computing process 2-5 ms (measured)."""


class RequestEvents:
    """The events of one request. Created and read on the event loop; its thread calls the `on_` methods."""

    def __init__(self, num_steps: int, options: StreamOptions, observe_step_s: Callable[[float], None]) -> None:
        self._num_steps, self._options, self._observe_step_s = num_steps, options, observe_step_s
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[tuple[Any, ...] | None] = asyncio.Queue()
        self._arrived = self._started = self._stepped = time.perf_counter()
        self._reported = 0.0
        self._num_done = self._num_reported = 0
        self._begin: int | None = None
        """Number of steps that were done before this replica's first step; None until that is known."""
        self.forwards = ForwardCounts(0, 0)
        self.num_resumed = 0
        """Number of forwards that are not computed again, because another replica's journal has their results."""

    @property
    def queue_ms(self) -> float:
        """How long the request waited for a thread."""
        return (self._started - self._arrived) * 1e3

    @property
    def denoise_ms(self) -> float:
        """Time since a thread started the request."""
        return (time.perf_counter() - self._started) * 1e3

    @property
    def num_steps(self) -> int:
        """Number of steps that were asked for."""
        return self._num_steps

    @property
    def steps_left(self) -> int:
        return max(0, self._num_steps - self._num_done)

    def take_unreported_steps(self) -> int:
        """Returns the number of steps done since the last call."""
        unreported, self._num_reported = self._num_done - self._num_reported, self._num_done
        return unreported

    def on_start(self) -> None:
        """Notes that a thread has started the request."""
        self._started = self._stepped = time.perf_counter()

    def on_resumed(self, num_forwards: int) -> None:
        """Notes that num_forwards are not computed again: another replica has done so and reported their steps."""
        self.num_resumed = num_forwards
        if num_forwards == 0:
            self._begin = 0
            self.on_step(0)

    def on_step(self, step: int, _latents: "torch.Tensor | None" = None) -> None:
        """Notes that `step` steps are done; queues a Progress if the caller wants one and it is time for it."""
        now = time.perf_counter()
        if step:
            self._observe_step_s(now - self._stepped)
        self._stepped, self._num_done = now, step
        if self._begin is None and step:
            self._begin = self._num_reported = step - 1
        if self._options.wants_progress and now - self._reported >= PROGRESS_PERIOD_S:
            self._reported = now
            left = self._num_steps - step
            eta_s = None
            if self._begin is not None and step > self._begin:
                eta_s = round((now - self._started) / (step - self._begin) * left, 3)
            self._put(Progress(step, self._num_steps, eta_s))

    def on_forwards(self, counts: ForwardCounts) -> None:
        """Notes the counts, when all forwards are done."""
        self.forwards = counts

    def on_partial(self, index: int, arguments: DecodeArguments) -> None:
        self._put(PartialDenoised(index), arguments)

    def on_part(self, part: UnsavedPart) -> None:
        """Queues a new part of the journal."""
        self._put(part)

    def on_end(self, done: "asyncio.Future[Any]") -> None:
        """Callback for the end of the thread's future, on the event loop."""
        done.cancelled() or done.exception()  # marks it as retrieved: of a cancelled request nothing else reads it
        self._items.put_nowait(None)

    async def next(self) -> tuple[Progress | PartialDenoised | DecodeArguments | UnsavedPart, ...] | None:
        """Returns the next items that belong together; None once the request's thread has ended."""
        return await self._items.get()

    def _put(self, *items: Any) -> None:
        self._loop.call_soon_threadsafe(self._items.put_nowait, items)
