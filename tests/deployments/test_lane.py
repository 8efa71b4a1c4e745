"""The one thread of a stage."""

import asyncio
import threading
import time

from deployments.lane import Lane


def test_calls_run_in_one_thread_in_their_order() -> None:
    lane, order = Lane("test"), []

    async def all_at_once() -> list[int]:
        return await asyncio.gather(*(lane.run(note, i) for i in range(5)))

    def note(i: int) -> int:
        order.append(i)
        return threading.get_ident()

    assert len(set(asyncio.run(all_at_once()))) == 1
    assert order == list(range(5))


def test_the_wait_is_that_of_all_calls_behind_the_first() -> None:
    lane = Lane("test")
    asked, began, ended = [], [], []

    def work() -> None:
        began.append(time.perf_counter())
        time.sleep(0.05)
        ended.append(time.perf_counter())

    async def three_at_once() -> None:
        running = []
        for _ in range(3):
            before = time.perf_counter()
            running.append(lane.run(work))
            asked.append((before, time.perf_counter()))
        await asyncio.gather(*running)

    asyncio.run(three_at_once())
    at_least = sum(end - after for end, (_, after) in zip(ended[:-1], asked[1:], strict=True))
    at_most = sum(begin - before for begin, (before, _) in zip(began, asked, strict=True))
    assert 0 < at_least <= lane.queue_wait_s <= at_most


def test_what_runs_first_is_not_counted() -> None:
    lane = Lane("test")
    assert lane.run_first(lambda: "done") == "done"
    assert lane.queue_wait_s == 0
