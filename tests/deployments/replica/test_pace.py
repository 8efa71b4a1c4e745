"""What a replica of the denoise stage reports about its work."""

import asyncio

import pytest

from cluster.scaling.autoscaling import LEFT_S, LOAD, REQUEST_S
from deployments.replica.pace import ReplicaPace
from deployments.replica.request_events import RequestEvents
from deployments.replica.serial_executor import SerialExecutor
from deployments.request import NO_EVENTS


async def events_of(num_steps: int) -> RequestEvents:
    """Returns the events of a request that begins here."""
    events = RequestEvents(num_steps, NO_EVENTS, lambda _seconds: None)
    events.on_resumed(0)
    return events


def test_steps_that_are_left_take_what_steps_have_taken() -> None:
    async def told() -> dict[str, float]:
        now_s = 0.0
        pace = ReplicaPace(lambda: now_s)
        short, long = await events_of(10), await events_of(30)
        for events in (short, long):
            pace.join(events)
        pace.tell(2.0, cold_start_s=9.0)
        now_s = 10.0  # five steps of each request: one second of the replica for each step
        for events in (short, long):
            events.on_step(5)
        return pace.tell(2.0, cold_start_s=9.0)

    found = asyncio.run(told())
    assert (found[LOAD], found[LEFT_S]) == (2.0, 30.0)
    assert found[REQUEST_S] == pytest.approx(12.0)  # the second request is one of ten that count


def test_a_replica_that_is_half_idle_takes_half_the_time() -> None:
    async def told() -> dict[str, float]:
        now_s = 0.0
        pace = ReplicaPace(lambda: now_s)
        pace.join(events := await events_of(10))
        pace.tell(0.5, cold_start_s=9.0)
        now_s = 4.0
        events.on_step(4)
        pace.leave(events)
        return pace.tell(0.5, cold_start_s=9.0)

    found = asyncio.run(told())
    assert (found[LEFT_S], found[REQUEST_S]) == (0.0, 5.0)


def test_steps_that_another_replica_did_cost_this_one_nothing() -> None:
    async def told() -> dict[str, float]:
        now_s = 0.0
        pace = ReplicaPace(lambda: now_s)
        events = RequestEvents(10, NO_EVENTS, lambda _seconds: None)
        events.on_resumed(6)
        pace.join(events)
        pace.tell(1.0, cold_start_s=9.0)
        now_s = 4.0
        events.on_step(7)
        events.on_step(8)
        return pace.tell(1.0, cold_start_s=9.0)

    assert asyncio.run(told())[LEFT_S] == 4.0  # two steps of two seconds


def test_before_a_step_is_done_nothing_is_said_of_times() -> None:
    assert ReplicaPace().tell(0.0, cold_start_s=1.0).keys().isdisjoint({LEFT_S, REQUEST_S})


def test_a_lane_knows_how_long_it_was_busy() -> None:
    async def busy_s() -> float:
        executor = SerialExecutor("executor")
        await asyncio.gather(*(executor.run(sum, range(100_000)) for _ in range(3)))
        return executor.busy_s

    assert 0 < asyncio.run(busy_s()) < 60
