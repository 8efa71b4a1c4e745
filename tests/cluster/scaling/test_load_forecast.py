"""Tests of the load forecast from the remaining work and the arrival rate."""

import pytest

from cluster.scaling.load_forecast import WINDOW_S, Backlog, LoadForecast, forecast_load

REQUEST_S = 10.0
COLD_START_S = 60.0


def queue_of(num_requests: int) -> Backlog:
    """Returns the backlog of requests of which a replica handles one at a time, none of them started."""
    return Backlog(num_requests, num_requests * REQUEST_S, REQUEST_S)


def test_a_queue_that_drains_before_a_new_replica_could_serve_asks_for_none() -> None:
    assert forecast_load(queue_of(5), coming=0, num_ready=1, cold_start_s=COLD_START_S) == 0.0


def test_a_longer_queue_asks_for_what_will_be_left_of_it() -> None:
    """One of 101 requests is in progress; after a minute six more are done."""
    assert forecast_load(queue_of(101), coming=0, num_ready=1, cold_start_s=COLD_START_S) == pytest.approx(94)


def test_the_same_queue_asks_for_more_the_sooner_a_replica_serves() -> None:
    loads = [
        forecast_load(queue_of(20), coming=0, num_ready=1, cold_start_s=seconds) for seconds in (0, 30, 100, 300)
    ]
    assert loads == sorted(loads, reverse=True)
    assert (loads[0], loads[-1]) == (20.0, 0.0)


def test_what_comes_faster_than_it_is_worked_on_is_forecast_while_the_queue_is_short() -> None:
    """Two seconds of work arrive per second and one is done: after a minute six requests wait and one is in
    progress."""
    assert forecast_load(queue_of(1), coming=2, num_ready=1, cold_start_s=COLD_START_S) == pytest.approx(7)


def test_a_stage_that_keeps_up_needs_what_it_keeps_busy() -> None:
    assert forecast_load(queue_of(3), coming=2.5, num_ready=4, cold_start_s=COLD_START_S) == 2.5


def test_large_requests_ask_for_more_than_as_many_that_are_nearly_done() -> None:
    fresh, done = Backlog(20, 20 * 10.0, 10.0), Backlog(20, 20 * 1.0, 10.0)
    one, other = (forecast_load(each, coming=0, num_ready=1, cold_start_s=30) for each in (fresh, done))
    assert one > other == 0.0


def test_how_much_comes_is_seen_from_what_is_left_and_what_was_done_meanwhile() -> None:
    """Every ten seconds one request arrives for each of two replicas, which finish it in time."""
    forecast, load = LoadForecast(), 0.0
    for second in range(300):
        load = forecast.load(float(second), Backlog(2, 2 * (REQUEST_S - second % 10), REQUEST_S), 2, COLD_START_S)
    assert load == pytest.approx(2, rel=0.1)


def test_a_burst_is_forgotten_after_a_while() -> None:
    forecast = LoadForecast()
    forecast.load(0.0, queue_of(0), 1, COLD_START_S)
    assert forecast.load(1.0, queue_of(40), 1, COLD_START_S) > 1
    forecast.load(2.0, queue_of(0), 1, COLD_START_S)
    forecast.load(1.5 * WINDOW_S, queue_of(0), 1, COLD_START_S)
    assert forecast.load(3 * WINDOW_S, queue_of(0), 1, COLD_START_S) == 0.0
