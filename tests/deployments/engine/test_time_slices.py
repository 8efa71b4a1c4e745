"""Models that take turns on the device: whose forwards go next."""

from typing import Any

import pytest

from deployments.engine.seat import Forward, ForwardSpec, Seat, SeatState
from deployments.engine.time_slices import STEP_WAIT_S, TimeSlices

TIME_SLICE_S = 10.0
FIRST, SECOND = "transformer", "transformer_2"


def groups(*models: str) -> dict[Any, list[Forward]]:
    """Returns groups in which one forward waits for each of these models."""
    specs = [ForwardSpec(model, tokens=1, model=model) for model in models]
    return {spec.model: [Forward(Seat(SeatState.WAITING, latest=spec), None, spec)] for spec in specs}


@pytest.fixture
def slices() -> TimeSlices:
    """Time slices in which the first model has been on the device since time 0."""
    slices = TimeSlices(TIME_SLICE_S)
    slices.start(FIRST, now=0.0)
    return slices


def test_forwards_of_another_model_wait_for_the_end_of_the_slice(slices: TimeSlices) -> None:
    waiting = groups(SECOND, FIRST)
    slices.start(FIRST, now=4.0)
    assert slices.of(waiting, [], now=5.0) == ({FIRST: waiting[FIRST]}, TIME_SLICE_S)
    assert slices.of(waiting, [], now=TIME_SLICE_S) == (waiting, None)


def test_they_go_at_once_where_the_model_has_no_more_work(slices: TimeSlices) -> None:
    waiting = groups(SECOND)
    assert slices.of(waiting, [Seat(SeatState.WAITING, latest=ForwardSpec(model=SECOND))], now=1.0) == (
        waiting,
        None,
    )
    slices.start(SECOND, now=1.0)
    assert slices.of(groups(FIRST, SECOND), [], now=2.0)[1] == 1.0 + TIME_SLICE_S


@pytest.mark.parametrize(
    ("state", "since", "waits"),
    [
        (SeatState.STEPPING, 1.0 - STEP_WAIT_S / 2, True),
        (SeatState.STEPPING, 1.0 - 2 * STEP_WAIT_S, False),
        (SeatState.RUNNING, 0.0, True),
        (SeatState.ENDED, 1.0, False),
    ],
)
def test_a_request_that_is_in_its_scheduler_is_waited_for_a_moment(
    slices: TimeSlices, state: SeatState, since: float, waits: bool
) -> None:
    """The same holds for a running request, over ranks that have room for another one."""
    waiting = groups(SECOND)
    seat = Seat(state, since, ForwardSpec(model=FIRST))
    assert slices.of(waiting, [seat], now=1.0) == (({}, 1.0 + STEP_WAIT_S) if waits else (waiting, None))


def test_models_that_are_all_there_take_no_turns() -> None:
    slices, waiting = TimeSlices(0.0), groups(SECOND, FIRST)
    slices.start(FIRST, now=0.0)
    assert slices.of(waiting, [], now=0.0) == (waiting, None)
