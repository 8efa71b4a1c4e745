"""Tests of a request's deadline."""

import time

import pytest

from deployments.options.qos import DEFAULT_QOS, Qos
from serve_app.flow.deadline import RequestDeadline


def test_whichever_is_sooner_counts_the_clients_deadline_or_the_servers_limit() -> None:
    assert RequestDeadline(DEFAULT_QOS, 600).limit_s == 600
    assert RequestDeadline(Qos(deadline_s=5), 600).limit_s == 5
    assert RequestDeadline(Qos(deadline_s=5), 2).limit_s == 2


def test_the_error_names_the_limit_that_was_met() -> None:
    asked = RequestDeadline(Qos(deadline_s=5), 600).exceeded()
    assert (asked.message, asked.param) == ("not done within deadline_s (5 s)", "deadline_s")
    own = RequestDeadline(Qos(deadline_s=5), 2).exceeded()
    assert (own.message, own.param) == ("not done within request_timeout_s (2 s)", None)


def test_a_deadline_counts_from_when_the_request_was_accepted() -> None:
    left = Qos(deadline_s=10).after(4)
    assert (left.left_s, left.waited_s) == (6, 4)
    assert RequestDeadline(left, 600).exceeded().message == "not done within deadline_s (10 s)"
    assert Qos(deadline_s=10).after(11).left_s == 0
    assert DEFAULT_QOS.left_s is None


def test_what_is_handed_on_is_what_is_left() -> None:
    deadline = RequestDeadline(Qos("high", "ann", 5), 600)
    time.sleep(0.01)
    now = deadline.qos()
    assert (now.priority, now.share) == ("high", "ann")
    assert now.left_s is not None
    assert 0 < now.left_s < 5
    assert now.left_s + now.waited_s == pytest.approx(5)
