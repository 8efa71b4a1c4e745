"""The one thread in which a stage works, and how long its work waited for it. Torch-free."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, TypeVar

Args = ParamSpec("Args")
Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class Lane:
    """Calls run one after another, in the order they came."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self.queue_wait_s = 0.0
        """What all calls together waited."""
        self._open: set[Future[Any]] = set()

    @property
    def num_calls(self) -> int:
        """Running and waiting."""
        return len(self._open)

    def run(
        self, call: Callable[Args, Answer], *args: Args.args, **kwargs: Args.kwargs
    ) -> "asyncio.Future[Answer]":
        """For an event loop. A caller that leaves does not stop a call that has begun."""
        came = time.perf_counter()

        def timed() -> Answer:
            self.queue_wait_s += time.perf_counter() - came
            return call(*args, **kwargs)

        running = self._thread.submit(timed)
        self._open.add(running)
        running.add_done_callback(self._open.discard)
        return asyncio.wrap_future(running)

    def run_first(self, call: Callable[Args, Answer], *args: Args.args, **kwargs: Args.kwargs) -> Answer:
        """Before there is an event loop; blocks, and is not counted."""
        return self._thread.submit(call, *args, **kwargs).result()


@dataclass(frozen=True, eq=False)
class _Waiting(Generic[Asked, Answer]):
    asked: Asked
    answer: Future[Answer] = field(default_factory=Future)
    came: float = field(default_factory=time.perf_counter)


class BatchLane(Lane, Generic[Asked, Answer]):
    """Whatever waits when the thread is free is answered together, in the order it came. None waits for others."""

    def __init__(
        self, name: str, compute: Callable[[Sequence[Asked]], Sequence[Answer | Exception]], max_batch_size: int
    ) -> None:
        """compute: to each its answer, or what it is to raise."""
        super().__init__(name)
        self._compute, self._max_batch_size = compute, max_batch_size
        self._waiting: deque[_Waiting[Asked, Answer]] = deque()

    def ask(self, asked: Asked) -> "asyncio.Future[Answer]":
        """For an event loop. Who leaves before its batch begins is not computed."""
        waiting = _Waiting[Asked, Answer](asked)
        self._waiting.append(waiting)
        self._thread.submit(self._next)  # as many turns as there are questions: none is left waiting
        return asyncio.wrap_future(waiting.answer)

    def _next(self) -> None:
        batch: list[_Waiting[Asked, Answer]] = []
        while self._waiting and len(batch) < self._max_batch_size:
            first = self._waiting.popleft()
            if first.answer.set_running_or_notify_cancel():
                batch.append(first)
        if not batch:
            return
        now = time.perf_counter()
        self.queue_wait_s += sum(now - each.came for each in batch)
        answers: Sequence[Answer | BaseException]
        try:
            answers = self._compute([each.asked for each in batch])
        except BaseException as error:
            answers = [error] * len(batch)
        for each, answer in zip(batch, answers, strict=True):
            if isinstance(answer, BaseException):
                each.answer.set_exception(answer)
            else:
                each.answer.set_result(answer)
