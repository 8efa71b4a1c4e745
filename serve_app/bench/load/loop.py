"""Sends many requests: from clients that each wait for their answer (closed loop), or at set times (open loop).

The clients run in separate processes, so that showing progress does not delay a request. The delay of each request
is recorded.
"""

import asyncio
import multiprocessing
import queue
import time
from collections.abc import Callable, Sequence
from typing import Any

from serve_app.bench.load.endpoint import Outcome, Server, send
from serve_app.bench.load.workload import Ask

Tell = Callable[[Outcome], None]
LOOK_S = 0.2


class ClientLost(Exception):
    """A client process has died."""


async def drive(server: Server, asks: Sequence[Ask], max_concurrency: int | None, tell: Tell) -> None:
    """Sends all requests, and passes each outcome to `tell`.

    Closed loop if the asks have no times: max_concurrency clients. Otherwise open loop, with at most
    max_concurrency requests at once; None: no limit.
    """
    began = time.monotonic()
    async with server.open_client() as client:
        if asks[0].at_s is None:
            waiting = iter(asks)

            async def one_by_one() -> None:
                for ask in waiting:
                    tell(await send(client, server, ask, began, time.monotonic() - began))

            await asyncio.gather(*(one_by_one() for _ in range(max_concurrency or 1)))
            return
        seats = asyncio.Semaphore(max_concurrency or len(asks))

        async def when_due(ask: Ask) -> None:
            due_s = ask.at_s or 0.0
            await asyncio.sleep(began + due_s - time.monotonic())
            async with seats:
                tell(await send(client, server, ask, began, due_s))

        await asyncio.gather(*map(when_due, asks))


def drive_apart(
    server: Server, asks: Sequence[Ask], max_concurrency: int | None, tell: Tell, *, num_processes: int = 1
) -> list[Outcome]:
    """Runs `drive` in num_processes processes, which share the asks and the concurrency. Raises ClientLost."""
    num_processes = min(num_processes, len(asks), max_concurrency or len(asks))
    context = multiprocessing.get_context("spawn")
    told: Any = context.Queue()
    start = context.Barrier(num_processes)
    processes = []
    for index in range(num_processes):
        share = None if max_concurrency is None else len(range(index, max_concurrency, num_processes))
        arguments = (server, asks[index::num_processes], share, start, told)
        processes.append(context.Process(target=_drive, args=arguments, daemon=True))
    try:
        for process in processes:
            process.start()
        outcomes: list[Outcome] = []
        while len(outcomes) < len(asks):
            try:
                outcomes.append(told.get(timeout=LOOK_S))
                tell(outcomes[-1])
            except queue.Empty:
                if any(process.exitcode for process in processes):
                    raise ClientLost("a client process has died; its output is above") from None
        return outcomes
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _drive(server: Server, asks: Sequence[Ask], max_concurrency: int | None, start: Any, told: Any) -> None:
    start.wait()
    asyncio.run(drive(server, asks, max_concurrency, told.put))
    told.close()
    told.join_thread()
