"""Tests of the fair order by itself: what it knows of users, and which of their forwards it merges."""

from collections.abc import Callable

import pytest

from deployments.engine.demand import Demand
from deployments.engine.order import OTHERS_SHARE, BatchCandidate, FairOrder
from deployments.engine.seat import Forward, ForwardSpec, Seat
from deployments.options.qos import Qos

ALONE = 1


def seat(user: str, left_s: float = 10.0) -> Seat:
    return Seat(demand=Demand(Qos(share=user), num_steps=1, num_own_steps=1), estimated_s=left_s)


def is_critical(order: FairOrder, of: Seat) -> bool:
    return not order.key(of, ALONE)[2]


def pick(users: str, takes_s: Callable[[int], float | None], *, present: str = "") -> str:
    """Returns the users of the forwards that are merged, of one waiting forward for each letter of `users`. Users
    in `present` have a request without a waiting forward."""
    order, seats = FairOrder(), [seat(user) for user in users]
    for each in [*seats, *map(seat, present)]:
        order.add(each)
    forwards = [Forward(each, None, ForwardSpec()) for each in seats]
    picked = order.pick(forwards, BatchCandidate(max_size=8, cost_s=1.0, num_at_once=1, takes_s=takes_s))
    return "".join(forward.seat.demand.qos.share for forward in picked)


def test_the_request_with_most_of_its_users_work_is_critical() -> None:
    order, long, short = FairOrder(), seat("a", left_s=100.0), seat("a", left_s=5.0)
    order.add(long)
    assert is_critical(order, long)
    order.add(short)
    assert not is_critical(order, short)
    order.remove(long)
    assert is_critical(order, short), "the work of a request that has left is left no more"


def test_what_is_done_is_no_work_that_is_left() -> None:
    order, first, second = FairOrder(), seat("a", left_s=10.0), seat("a", left_s=10.0)
    order.add(first)
    order.add(second)
    assert not is_critical(order, first)
    order.advance(second, 10.0)
    assert is_critical(order, first)


@pytest.mark.parametrize(
    ("longer_by", "picked"), [(0.9 * OTHERS_SHARE, "ab"), (1.1 * OTHERS_SHARE, "a")], ids=["little", "much"]
)
def test_one_of_two_users_may_lengthen_the_others_forward_by_half(longer_by: float, picked: str) -> None:
    """Each has one half of the device: 1 / part - 1 is 1."""
    assert pick("ab", lambda size: 1 + longer_by * (size - 1)) == picked


def test_of_three_users_two_may_lengthen_the_firsts_forward_by_twice_as_much() -> None:
    longer_by = 1.9 * OTHERS_SHARE
    assert pick("ab", lambda size: 1 + longer_by * (size - 1), present="c") == "ab"
    assert pick("ab", lambda size: 1 + longer_by * (size - 1)) == "a"


def test_the_more_forwards_the_first_user_has_the_longer_others_may_make_it() -> None:
    """A fourth second is less than half of three. The other user has had 3 s before, and so comes last."""
    order, seats = FairOrder(), [seat(user) for user in "aaab"]
    for each in seats:
        order.add(each)
    forwards = [Forward(each, None, ForwardSpec()) for each in seats]
    order.pick(forwards[3:], BatchCandidate(max_size=8, cost_s=3.0, num_at_once=1, takes_s=float))
    picked = order.pick(forwards, BatchCandidate(max_size=8, cost_s=1.0, num_at_once=1, takes_s=float))
    assert [forward.seat for forward in picked] == seats


def test_a_batch_whose_time_is_unknown_is_merged() -> None:
    assert pick("ab", lambda size: None) == "ab"
    assert pick("ab", lambda size: None if size > 1 else 1.0) == "ab"
    assert pick("ab", lambda size: None if size == 1 else 100.0) == "ab"


def test_users_who_have_left_leave_nothing_behind() -> None:
    order = FairOrder()
    for i in range(100):
        gone = seat(f"user {i}")
        order.add(gone)
        order.remove(gone)
    order.add(seat("here"))
    assert order._part(("normal", "here")) == 1.0
    assert len(order._shares_present) == 1
