"""Models that are on the device one at a time: whose forwards go next."""

from typing import Any

import pytest

from deployments.engine.model_turns import BETWEEN_S, ModelTurns
from deployments.engine.seat import Forward, Seat, SeatState

TURN_S = 10.0
FIRST, SECOND = "transformer", "transformer_2"


def groups(*models: str) -> dict[Any, list[Forward]]:
    """A forward waits for each."""
    return {
        model: [Forward(Seat(SeatState.WAITING, model=model), None, model, tokens=1, at_most=None, model=model)]
        for model in models
    }


@pytest.fixture
def turns() -> ModelTurns:
    """The first has been there since 0."""
    turns = ModelTurns(TURN_S)
    turns.take_off(FIRST, now=0.0)
    return turns


def test_forwards_of_another_model_wait_for_the_end_of_the_turn(turns: ModelTurns) -> None:
    waiting = groups(SECOND, FIRST)
    turns.take_off(FIRST, now=4.0)
    assert turns.of(waiting, [], now=5.0) == ({FIRST: waiting[FIRST]}, TURN_S)
    assert turns.of(waiting, [], now=TURN_S) == (waiting, None)


def test_they_go_at_once_where_the_model_has_no_more_work(turns: ModelTurns) -> None:
    waiting = groups(SECOND)
    assert turns.of(waiting, [Seat(SeatState.WAITING, model=SECOND)], now=1.0) == (waiting, None)
    turns.take_off(SECOND, now=1.0)
    assert turns.of(groups(FIRST, SECOND), [], now=2.0)[1] == 1.0 + TURN_S


@pytest.mark.parametrize(
    ("state", "since", "waits"),
    [
        (SeatState.BETWEEN, 1.0 - BETWEEN_S / 2, True),
        (SeatState.BETWEEN, 1.0 - 2 * BETWEEN_S, False),
        (SeatState.FLYING, 0.0, True),
        (SeatState.ENDED, 1.0, False),
    ],
)
def test_a_request_that_is_in_its_scheduler_is_waited_for_a_moment(
    turns: ModelTurns, state: SeatState, since: float, waits: bool
) -> None:
    """And one that flies, over ranks that have room for another."""
    waiting = groups(SECOND)
    seat = Seat(state, since=since, model=FIRST)
    assert turns.of(waiting, [seat], now=1.0) == (({}, 1.0 + BETWEEN_S) if waits else (waiting, None))


def test_models_that_are_all_there_take_no_turns() -> None:
    turns, waiting = ModelTurns(0.0), groups(SECOND, FIRST)
    turns.take_off(FIRST, now=0.0)
    assert turns.of(waiting, [], now=0.0) == (waiting, None)
