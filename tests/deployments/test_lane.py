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

    async def three_at_once() -> None:
        await asyncio.gather(*(lane.run(time.sleep, 0.1) for _ in range(3)))

    asyncio.run(three_at_once())
    assert 0.3 <= lane.queue_wait_s < 0.6  # the second waits for one, the third for two


def test_what_runs_first_is_not_counted() -> None:
    lane = Lane("test")
    assert lane.run_first(lambda: "done") == "done"
    assert lane.queue_wait_s == 0
