"""Executors with one thread in which a stage works; they measure how long calls wait. Torch-free."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Generic, TypeVar, TypeVarTuple

from deployments.options.qos import DEFAULT_QOS, Qos
from deployments.replica.fair_queue import FairQueue

Args = TypeVarTuple("Args")
Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


@dataclass(frozen=True, eq=False)
class _Waiting(Generic[Asked, Answer]):
    asked: Asked
    answer: Future[Answer] = field(default_factory=Future)
    came: float = field(default_factory=time.perf_counter)


class BatchingExecutor(Generic[Asked, Answer]):
    """Computes all calls that wait when the thread becomes free as one batch, in fair order. No call waits for a
    batch to fill."""

    def __init__(
        self, name: str, compute: Callable[[Sequence[Asked]], Sequence[Answer | Exception]], max_batch_size: int
    ) -> None:
        """compute: returns for each call its answer, or the exception that the call raises."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._compute, self._max_batch_size = compute, max_batch_size
        self._queue = FairQueue[_Waiting[Asked, Answer]]()
        self._open: set[Future[Answer]] = set()
        self.queue_wait_s = 0.0
        """Total time that all calls have waited."""
        self.busy_s = 0.0
        """Total time that all batches have taken."""

    @property
    def num_calls(self) -> int:
        """Number of calls that run or wait."""
        return len(self._open)

    def submit(self, asked: Asked, qos: Qos = DEFAULT_QOS, work: float = 1.0) -> "asyncio.Future[Answer]":
        """Queues a call from an event loop. A call whose caller leaves before it starts is dropped.

        work: as in `FairQueue.put`.
        """
        waiting = _Waiting[Asked, Answer](asked)
        self._open.add(waiting.answer)
        waiting.answer.add_done_callback(self._open.discard)
        self._queue.put(waiting, qos, work)
        self._thread.submit(self._next)  # as many runs as submissions, so that no call is left waiting
        return asyncio.wrap_future(waiting.answer)

    def run_blocking(self, call: Callable[[*Args], Any], *args: *Args) -> Any:
        """Runs a call before there is an event loop; blocks until it is done. The call is not counted."""
        return self._thread.submit(call, *args).result()

    def _next(self) -> None:
        batch = list(islice(self._begin(), self._max_batch_size))
        if not batch:
            return
        now = time.perf_counter()
        self.queue_wait_s += sum(now - each.came for each in batch)
        answers: Sequence[Answer | BaseException]
        try:
            answers = self._compute([each.asked for each in batch])
        except BaseException as error:
            answers = [error] * len(batch)
        self.busy_s += time.perf_counter() - now
        for each, answer in zip(batch, answers, strict=True):
            if isinstance(answer, BaseException):
                each.answer.set_exception(answer)
            else:
                each.answer.set_result(answer)

    def _begin(self) -> Iterator[_Waiting[Asked, Answer]]:
        """Yields waiting calls in fair order, except those whose callers have left."""
        while (waiting := self._queue.take()) is not None:
            if waiting.answer.set_running_or_notify_cancel():
                yield waiting


class SerialExecutor(BatchingExecutor[Callable[[], Any], Any]):
    """Runs calls one after another."""

    def __init__(self, name: str) -> None:
        super().__init__(name, lambda calls: [call() for call in calls], max_batch_size=1)

    def run(
        self, call: Callable[[*Args], Answer], *args: *Args, qos: Qos = DEFAULT_QOS, work: float = 1.0
    ) -> "asyncio.Future[Answer]":
        """Like `submit`, for a function and its arguments."""
        return self.submit(partial(call, *args), qos, work)
