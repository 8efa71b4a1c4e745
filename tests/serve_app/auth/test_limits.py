"""Tests of a key's limits: requests per minute, concurrent requests and budget. Times are arguments."""

import json
import pickle
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import pytest

from serve_app.auth.keys import KeyLimits, Period
from serve_app.auth.limits import COUNTED_S, LEASE_S, Ledger, Spent, bounds
from serve_app.auth.usage_file import UsageFile
from serve_app.errors import OverBudget, OverLimit

NOON = datetime(2026, 11, 30, 12, 0, 30, tzinfo=UTC).timestamp()
NOTHING = KeyLimits()


def admitted(ledger: Ledger, limits: KeyLimits, *times: float) -> list[bool]:
    """Returns for each time, in seconds after NOON, whether a request at that time is admitted."""
    return [ledger.admit("shop", limits, f"{i} at {at}", NOON + at) is None for i, at in enumerate(times)]


def charge(ledger: Ledger, cost: float, at: float = NOON, request_id: str | None = None) -> OverBudget | float:
    return ledger.charge("shop", BUDGET, request_id or uuid4().hex, cost, at)


def test_in_any_minute_no_more_than_the_rate() -> None:
    limits = KeyLimits(requests_per_minute=3)
    times = (0, 30, 59, 59.9, 60, 89, 90, 119, 119.1)
    assert admitted(Ledger(), limits, *times) == [True, True, True, False, True, False, True, True, False]


def test_over_the_rate_the_wait_is_until_the_oldest_is_a_minute_old() -> None:
    ledger, limits = Ledger(), KeyLimits(requests_per_minute=2)
    assert admitted(ledger, limits, 0, 20) == [True, True]
    rejection = ledger.admit("shop", limits, "x", NOON + 21.5)
    assert rejection is not None
    assert (rejection.status, rejection.code, rejection.wait_s) == (429, "rate_limit_exceeded", 39)
    assert rejection.headers() == {"Retry-After": "39"}
    assert admitted(ledger, limits, 21.5 + rejection.wait_s) == [True]


def test_a_rate_that_was_lowered_is_waited_for() -> None:
    ledger = Ledger()
    assert all(admitted(ledger, KeyLimits(requests_per_minute=5), 0, 1, 2, 3, 4))
    rejection = ledger.admit("shop", KeyLimits(requests_per_minute=2), "x", NOON + 5)
    assert rejection is not None
    assert rejection.wait_s == 58  # in 58 s only the request of second 4 is younger than a minute
    assert admitted(ledger, KeyLimits(requests_per_minute=2), 62, 63) == [False, True]


def test_what_is_refused_does_not_count() -> None:
    ledger, limits = Ledger(), KeyLimits(requests_per_minute=1)
    assert admitted(ledger, limits, 0, 10, 20, 30, 60) == [True, False, False, False, True]


def test_each_key_has_its_own() -> None:
    ledger, limits = Ledger(), KeyLimits(requests_per_minute=1, max_concurrent_requests=1)
    assert ledger.admit("shop", limits, "a", NOON) is None
    assert ledger.admit("friend", limits, "b", NOON) is None
    assert ledger.admit("shop", limits, "c", NOON) is not None


def test_no_more_at_once_than_may_be_and_one_that_has_ended_makes_room() -> None:
    ledger, limits = Ledger(), KeyLimits(max_concurrent_requests=2)
    assert [ledger.admit("shop", limits, name, NOON) is None for name in "abc"] == [True, True, False]
    ledger.release("shop", "a", NOON + 1)
    assert [ledger.admit("shop", limits, name, NOON + 1) is None for name in "de"] == [True, False]


def test_over_the_number_at_once_the_wait_is_guessed_by_how_long_requests_take() -> None:
    ledger, limits = Ledger(), KeyLimits(max_concurrent_requests=1)
    for i in range(50):
        ledger.admit("shop", limits, str(i), NOON + 20 * i)
        ledger.renew([("shop", str(i))], NOON + 20 * i + 10)
        ledger.release("shop", str(i), NOON + 20 * i + 20)
    ledger.admit("shop", limits, "last", NOON + 1000)
    rejection = ledger.admit("shop", limits, "x", NOON + 1005)
    assert rejection is not None
    assert rejection.wait_s == 15


def test_a_request_that_nobody_speaks_of_is_none_any_more() -> None:
    """The ingress that would have renewed the request has died."""
    ledger, limits = Ledger(), KeyLimits(max_concurrent_requests=1)
    assert admitted(ledger, limits, 0, LEASE_S - 1, LEASE_S) == [True, False, True]


def test_one_that_is_spoken_of_stays_for_as_long_as_it_takes() -> None:
    ledger, limits = Ledger(), KeyLimits(max_concurrent_requests=1)
    ledger.admit("shop", limits, "long", NOON)
    for at in range(5, 600, 5):
        ledger.renew([("shop", "long")], NOON + at)
    assert admitted(ledger, limits, 600) == [False]


def test_a_counter_that_has_lost_its_memory_learns_what_is_in_progress() -> None:
    ledger, limits = Ledger(), KeyLimits(max_concurrent_requests=1)
    ledger.renew([("shop", "from before")], NOON)
    assert admitted(ledger, limits, 1) == [False]


BUDGET = KeyLimits(budget_megapixel_steps=100, budget_period="day")


def test_a_budget_is_used_up_to_the_last_step_and_no_further() -> None:
    ledger = Ledger()
    assert [not isinstance(charge(ledger, cost), OverBudget) for cost in (60, 50, 40, 0.1)] == [
        True,
        False,
        True,
        False,
    ]


def test_over_the_budget_it_is_told_when_the_period_ends() -> None:
    ledger = Ledger()
    charge(ledger, 80)
    rejection = charge(ledger, 29.4)
    assert isinstance(rejection, OverBudget)
    assert str(rejection) == (
        "this request costs 29.4 megapixel-steps, but the key 'shop' has used 80 of its 100 for this day; "
        "the next day begins at 2026-12-01T00:00Z"
    )
    assert rejection.body()["error"] | {"message": ""} == {
        "message": "",
        "type": "insufficient_quota",
        "param": None,
        "code": "insufficient_quota",
    }
    assert rejection.headers() == {"Retry-After": str(12 * 3600 - 30), "x-should-retry": "false"}


def test_what_no_budget_will_ever_hold_is_told_so() -> None:
    rejection = charge(Ledger(), 101)
    assert rejection is not None
    assert "has 100 for a whole day: ask for fewer pixels, frames, steps or images" in str(rejection)


def test_the_next_period_begins_with_the_whole_budget() -> None:
    ledger = Ledger()
    assert charge(ledger, 100) == 100
    midnight = bounds("day", NOON)[1].timestamp()
    assert isinstance(charge(ledger, 1, midnight - 1), OverBudget)
    assert charge(ledger, 100, midnight) == 100


def test_what_is_given_back_may_be_used_again_but_never_makes_more() -> None:
    ledger = Ledger()
    charge(ledger, 100)
    ledger.give_back("shop", BUDGET, 40, NOON, NOON + 1)
    assert charge(ledger, 40) == 40
    ledger.give_back("shop", BUDGET, 1000, NOON, NOON + 1)
    assert isinstance(charge(ledger, 101), OverBudget)


def test_what_was_charged_yesterday_is_not_given_back_today() -> None:
    """A job may begin before midnight and fail after it."""
    ledger, midnight = Ledger(), bounds("day", NOON)[1].timestamp()
    charge(ledger, 100, NOON)
    charge(ledger, 100, midnight)
    ledger.give_back("shop", BUDGET, 100, NOON, midnight + 1)
    assert isinstance(charge(ledger, 1, midnight + 1), OverBudget)


def test_a_request_that_comes_again_is_charged_once() -> None:
    """The proxy repeats a request whose ingress died before it answered."""
    ledger = Ledger()
    assert [charge(ledger, 60, request_id="same") for _ in range(3)] == [60, 0, 0]
    assert charge(ledger, 40) == 40
    ledger.release("shop", "same", NOON)
    assert isinstance(charge(ledger, 60, request_id="same"), OverBudget)


def test_a_request_that_comes_again_counts_once_in_rate_and_number_at_once() -> None:
    ledger, limits = Ledger(), KeyLimits(requests_per_minute=1, max_concurrent_requests=1)
    assert [ledger.admit("shop", limits, "same", NOON + i) for i in range(3)] == [None] * 3
    assert ledger.admit("shop", limits, "other", NOON + 3) is not None


def test_requests_that_nobody_answers_are_forgotten() -> None:
    ledger = Ledger()
    for i in range(100):
        charge(ledger, 0.01, NOON + i, request_id=str(i))
    charge(ledger, 0.01, NOON + COUNTED_S + 50)
    assert len(ledger._accounts["shop"].counted) == 50


def test_a_key_without_limits_has_none() -> None:
    ledger = Ledger()
    assert all(admitted(ledger, NOTHING, *([0.0] * 1000)))
    assert ledger.charge("shop", NOTHING, "a", 1e12, NOON) == 0


@pytest.mark.parametrize(
    ("period", "began", "ends"),
    [
        ("hour", "2026-11-30T12:00", "2026-11-30T13:00"),
        ("day", "2026-11-30T00:00", "2026-12-01T00:00"),
        ("week", "2026-11-30T00:00", "2026-12-07T00:00"),  # a Monday
        ("month", "2026-11-01T00:00", "2026-12-01T00:00"),
    ],
)
def test_periods_are_the_calendars_in_utc(period: Period, began: str, ends: str) -> None:
    assert [f"{at:%Y-%m-%dT%H:%M}" for at in bounds(period, NOON)] == [began, ends]


@pytest.mark.parametrize("month", range(1, 13))
def test_months_follow_each_other(month: int) -> None:
    first, following = bounds("month", datetime(2028, month, 29, 23, tzinfo=UTC).timestamp())
    assert (first.month, following.day) == (month, 1)
    assert bounds("month", following.timestamp())[0] == following


def test_a_refusal_survives_its_way_from_the_counter() -> None:
    for rejection in (OverLimit("too many", 7), OverBudget("too much", 9)):
        again = pickle.loads(pickle.dumps(rejection))
        assert (type(again), str(again), again.headers()) == (type(rejection), str(rejection), rejection.headers())


def test_what_was_used_is_known_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "new" / "usage.json"
    ledger = Ledger(UsageFile(path).read())
    charge(ledger, 80)
    UsageFile(path).write(ledger.spent)
    assert isinstance(charge(Ledger(UsageFile(path).read()), 30, NOON + 60), OverBudget)


@pytest.mark.parametrize("content", ["", "[]", '{"shop": 3}', '{"shop": {"began": "2026"}}', "\x00"])
def test_a_file_of_usage_that_makes_no_sense_stops_nobody(tmp_path: Path, content: str) -> None:
    path = tmp_path / "usage.json"
    path.write_text(content)
    file = UsageFile(path)
    assert file.read() == {}
    file.write({"shop": Spent("2026-11-30T00:00:00+00:00", 1.5)})
    assert json.loads(path.read_text())["shop"]["megapixel_steps"] == 1.5


def test_where_nothing_can_be_written_nothing_is_raised(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    UsageFile(tmp_path / "file" / "usage.json").write({"shop": Spent("2026-11-30T00:00:00+00:00", 1.5)})
