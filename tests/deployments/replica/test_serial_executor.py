"""The single thread of a stage."""

import asyncio
import threading
import time
from collections.abc import Sequence

import pytest

from deployments.options.qos import Qos
from deployments.replica.serial_executor import BatchingExecutor, SerialExecutor


def test_calls_run_in_one_thread_in_their_order() -> None:
    executor, order = SerialExecutor("test"), []

    async def all_at_once() -> list[int]:
        return await asyncio.gather(*(executor.run(note, i) for i in range(5)))

    def note(i: int) -> int:
        order.append(i)
        return threading.get_ident()

    assert len(set(asyncio.run(all_at_once()))) == 1
    assert order == list(range(5))


def test_the_wait_is_that_of_all_calls_behind_the_first() -> None:
    executor = SerialExecutor("test")
    asked, began, ended = [], [], []

    def work() -> None:
        began.append(time.perf_counter())
        time.sleep(0.05)
        ended.append(time.perf_counter())

    async def three_at_once() -> None:
        running = []
        for _ in range(3):
            before = time.perf_counter()
            running.append(executor.run(work))
            asked.append((before, time.perf_counter()))
        await asyncio.gather(*running)

    asyncio.run(three_at_once())
    at_least = sum(end - after for end, (_, after) in zip(ended[:-1], asked[1:], strict=True))
    at_most = sum(begin - before for begin, (before, _) in zip(began, asked, strict=True))
    assert 0 < at_least <= executor.queue_wait_s <= at_most


def test_what_runs_first_is_not_counted() -> None:
    executor = SerialExecutor("test")
    assert executor.run_blocking(lambda: "done") == "done"
    assert executor.queue_wait_s == 0


class Doubling:
    """Doubles numbers except 13; the first batch waits for `go_on`."""

    def __init__(self, max_batch_size: int) -> None:
        self.batches: list[list[int]] = []
        self.go_on = threading.Event()
        self.executor = BatchingExecutor[int, int]("test", self._double, max_batch_size)

    def _double(self, numbers: Sequence[int]) -> list[int | Exception]:
        self.batches.append(list(numbers))
        self.go_on.wait(10)
        return [ValueError("unlucky") if number == 13 else 2 * number for number in numbers]

    async def ask(self, *numbers: int) -> list["asyncio.Future[int]"]:
        """Submits numbers; the first has begun before the others are submitted."""
        asked = [self.executor.submit(numbers[0])]
        while not self.batches:
            await asyncio.sleep(0.001)
        return asked + [self.executor.submit(number) for number in numbers[1:]]


def test_a_batch_is_of_those_whose_turn_it_is() -> None:
    doubling = Doubling(4)

    async def run() -> None:
        asked = await doubling.ask(*range(20, 40))
        asked += [doubling.executor.submit(40, Qos(share="another")), doubling.executor.submit(41, Qos("high"))]
        doubling.go_on.set()
        await asyncio.gather(*asked)

    asyncio.run(run())
    _, second, *_ = doubling.batches
    assert {40, 41} < set(second)
    assert sorted(number for batch in doubling.batches for number in batch) == list(range(20, 42))


def test_what_waits_is_answered_together_up_to_the_batch_size() -> None:
    doubling = Doubling(3)

    async def run() -> list[int]:
        asked = await doubling.ask(1, 2, 3, 4, 5)
        doubling.go_on.set()
        return await asyncio.gather(*asked)

    assert asyncio.run(run()) == [2, 4, 6, 8, 10]
    assert doubling.batches == [[1], [2, 3, 4], [5]]
    assert doubling.executor.queue_wait_s > 0


def test_one_of_a_batch_that_fails_fails_alone() -> None:
    doubling = Doubling(8)

    async def run() -> list[int | BaseException]:
        asked = await doubling.ask(1, 12, 13, 14)
        doubling.go_on.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    *_, before, failed, after = asyncio.run(run())
    assert (before, str(failed), after) == (24, "unlucky", 28)


def test_who_leaves_before_its_batch_begins_is_not_computed() -> None:
    doubling = Doubling(8)

    async def run() -> int:
        _, leaving, staying = await doubling.ask(1, 2, 3)
        leaving.cancel()
        await asyncio.sleep(0)
        doubling.go_on.set()
        return await staying

    assert asyncio.run(run()) == 6
    assert doubling.batches == [[1], [3]]


def test_a_batch_that_fails_as_a_whole_fails_for_each() -> None:
    def fail(_: Sequence[int]) -> list[int | Exception]:
        raise RuntimeError("lost")

    async def run() -> None:
        executor = BatchingExecutor[int, int]("test", fail, 2)
        for asked in [executor.submit(1), executor.submit(2)]:
            with pytest.raises(RuntimeError, match="lost"):
                await asked

    asyncio.run(run())
