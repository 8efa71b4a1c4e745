"""Tests that a slow reader gets the latest item of each key, and every item without a key."""

import asyncio

from serve_app.flow.latest_queue import LatestQueue


def test_of_items_with_a_key_the_latest_waits_and_the_others_in_their_order() -> None:
    queue: LatestQueue[str] = LatestQueue()
    for i in range(10_000):
        queue.put(f"step {i}", key="progress")
    queue.put("picture 0")
    queue.put("decode", key="phase")
    queue.put("picture 1")
    assert len(queue) == 4

    async def read() -> list[str]:
        return [await queue.get() for _ in range(4)]

    assert asyncio.run(read()) == ["step 9999", "picture 0", "decode", "picture 1"]


def test_a_reader_that_waits_is_woken_by_each_item() -> None:
    async def run() -> list[int]:
        queue: LatestQueue[int] = LatestQueue()
        reading = asyncio.create_task(asyncio.wait_for(_read(queue, 3), 10))
        for i in range(3):
            await asyncio.sleep(0)
            queue.put(i, key="same")
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        return await reading

    assert asyncio.run(run()) == [0, 1, 2]


async def _read(queue: LatestQueue[int], num: int) -> list[int]:
    return [await queue.get() for _ in range(num)]
