"""Holds a stage's thread, so that calls wait for it."""

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from typing import Any

from deployments.replica.serial_executor import BatchingExecutor


async def ended_in(
    executor: BatchingExecutor[Any, Any], calls: Sequence[tuple[str, Coroutine[Any, Any, Any]]]
) -> list[str]:
    """Returns the names of the calls in the order in which they end; all of them wait before the first begins."""
    go_on, order = threading.Event(), list[str]()

    async def note(name: str, call: Coroutine[Any, Any, Any]) -> None:
        await call
        order.append(name)

    holding = asyncio.create_task(asyncio.to_thread(executor.run_blocking, go_on.wait))
    running = []
    for name, call in calls:
        num_before = executor.num_calls
        running.append(asyncio.create_task(note(name, call)))
        while executor.num_calls == num_before:
            await asyncio.sleep(0.001)
    go_on.set()
    await asyncio.gather(holding, *running)
    return order
