"""Tests of how long a micro-batch is held to become full, on a clock that only the test moves."""

import pytest

from deployments.engine.choice import HOLD_SHARE, MAX_HOLD_S, MIN_WAIT_S
from deployments.engine.seat import Seat
from deployments.engine.step_queue import StepQueue


class Pair:
    """Two requests whose forwards merge, in a queue that has measured how long they take."""

    def __init__(self, takes_s: float, wait_s: float | None) -> None:
        self.now = 0.0
        self.queue = StepQueue(
            num_shards=1, max_batch_size=8, batch_wait_s=wait_s, max_batch_tokens=None, clock=lambda: self.now
        )
        self.seats = [self.queue.join() for _ in range(2)]
        for _ in range(4 if takes_s else 0):
            self.run(self.seats, takes_s)

    def run(self, seats: list[Seat], takes_s: float) -> None:
        for seat in seats:
            self.queue.submit(seat, seat, signature="x", tokens=1)
        batch = self.queue.take()
        assert list(batch.payloads) == seats
        self.now += takes_s
        self.queue.finish(batch.id, batch.payloads)

    def held_s(self) -> float:
        """Returns how long the forward of one request is held for the other, which is in its scheduler step."""
        self.queue.submit(self.seats[0], self.seats[0], signature="x", tokens=1)
        batch = self.queue._next_batch()
        if batch.forwards:
            return 0.0
        assert batch.wait_s is not None
        self.now += 0.99 * batch.wait_s
        assert not self.queue._next_batch().forwards
        self.now += 0.02 * batch.wait_s
        assert [forward.seat for forward in self.queue._next_batch().forwards] == self.seats[:1]
        return batch.wait_s


@pytest.mark.parametrize(("takes_s", "held_s"), [(0.001, MIN_WAIT_S), (0.2, HOLD_SHARE * 0.2), (60.0, MAX_HOLD_S)])
def test_by_default_a_batch_is_held_for_a_share_of_its_time(takes_s: float, held_s: float) -> None:
    assert Pair(takes_s, wait_s=None).held_s() == pytest.approx(held_s)


@pytest.mark.parametrize("wait_s", [0.0, 0.5])
def test_a_configured_wait_is_kept_whatever_a_batch_takes(wait_s: float) -> None:
    assert Pair(0.2, wait_s).held_s() == pytest.approx(wait_s)


def test_a_batch_is_held_briefly_while_its_time_is_unknown() -> None:
    pair = Pair(0.0, wait_s=None)
    pair.run(pair.seats[1:], 0.0)  # in no time
    assert pair.held_s() == pytest.approx(MIN_WAIT_S)


def test_whoever_ends_is_not_waited_for() -> None:
    pair = Pair(0.2, wait_s=None)
    pair.queue.leave(pair.seats[1])
    assert pair.held_s() == 0.0
