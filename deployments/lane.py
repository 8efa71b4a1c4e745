"""The one thread in which a stage works, and how long its work waited for it. Torch-free."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

Args = ParamSpec("Args")
Answer = TypeVar("Answer")


class Lane:
    """Calls run one after another, in the order they came."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self.queue_wait_s = 0.0
        """What all calls together waited."""

    def run(
        self, call: Callable[Args, Answer], *args: Args.args, **kwargs: Args.kwargs
    ) -> "asyncio.Future[Answer]":
        """For an event loop. A caller that leaves does not stop a call that has begun."""
        came = time.perf_counter()

        def timed() -> Answer:
            self.queue_wait_s += time.perf_counter() - came
            return call(*args, **kwargs)

        return asyncio.get_running_loop().run_in_executor(self._thread, timed)

    def run_first(self, call: Callable[Args, Answer], *args: Args.args, **kwargs: Args.kwargs) -> Answer:
        """Before there is an event loop; blocks, and is not counted."""
        return self._thread.submit(call, *args, **kwargs).result()
