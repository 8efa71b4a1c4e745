"""Tests of streams of real actors whose readers leave.

The first cancel is lost, as it can be in Ray (flow/streams.py).
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import ray

from serve_app.flow import streams
from serve_app.flow.streams import reference_stream


@ray.remote(num_cpus=0)
class Replica:
    """Streams far more numbers than a test reads."""

    def __init__(self) -> None:
        self._num_seats_taken = 0

    async def count(self) -> AsyncIterator[int]:
        self._num_seats_taken += 1
        try:
            for i in range(100_000):
                yield i
                await asyncio.sleep(0.01)
        finally:
            self._num_seats_taken -= 1

    async def num_seats_taken(self) -> int:
        return self._num_seats_taken


class Response:
    """Stands for Serve's response to a request that a replica takes after `assigned_after_s`."""

    def __init__(self, references: Any, assigned_after_s: float = 0.0) -> None:
        self._references, self._assigned_after_s = references, assigned_after_s
        self.withdrawn = asyncio.Event()

    def cancel(self) -> None:
        self.withdrawn.set()

    async def _to_object_ref_gen(self) -> Any:
        await asyncio.sleep(self._assigned_after_s)
        return self._references


@pytest.fixture(scope="module")
def replica(ray_cluster: None) -> Iterator[Any]:
    actor = Replica.remote()
    yield actor
    ray.kill(actor)


@pytest.fixture(autouse=True)
def first_cancel_is_lost(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    cancels: list[Any] = []
    really_cancel = ray.cancel

    def cancel(references: Any) -> None:
        cancels.append(references)
        if len(cancels) > 1:
            really_cancel(references)

    monkeypatch.setattr(ray, "cancel", cancel)
    monkeypatch.setattr(streams, "AGAIN_AFTER_S", 0.1)
    return cancels


async def wait_until_free(replica: Any) -> None:
    async with asyncio.timeout(20):
        while await replica.num_seats_taken.remote():
            await asyncio.sleep(0.05)


async def read(response: Response, *, num_items: int | None = None) -> None:
    async with reference_stream(lambda: response) as references:
        async for reference in references:
            if await reference == num_items:
                raise ValueError("no more")


def test_a_reader_that_leaves_ends_the_call_though_the_first_cancel_is_lost(
    replica: Any, first_cancel_is_lost: list[Any]
) -> None:
    async def leave() -> None:
        with pytest.raises(ValueError, match="no more"):
            await read(Response(replica.count.remote()), num_items=3)
        await wait_until_free(replica)

    asyncio.run(leave())
    assert len(first_cancel_is_lost) > 1


def test_a_reader_that_leaves_while_a_replica_takes_the_call_ends_it(replica: Any) -> None:
    async def leave() -> None:
        reading = asyncio.create_task(read(Response(replica.count.remote(), assigned_after_s=0.05)))
        await asyncio.sleep(0.01)
        reading.cancel()
        while not await replica.num_seats_taken.remote():
            await asyncio.sleep(0.01)
        await wait_until_free(replica)

    asyncio.run(leave())


def test_a_call_that_nobody_takes_is_withdrawn(first_cancel_is_lost: list[Any]) -> None:
    async def leave() -> None:
        response = Response(None, assigned_after_s=3600)
        reading = asyncio.create_task(read(response))
        await asyncio.sleep(0.01)
        reading.cancel()
        async with asyncio.timeout(20):
            await response.withdrawn.wait()

    asyncio.run(leave())
    assert not first_cancel_is_lost
