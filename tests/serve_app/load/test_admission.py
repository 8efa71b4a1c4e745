"""Tests of the limit on the requests that one ingress works on at a time."""

from contextlib import ExitStack

import pytest

from serve_app.errors import Overloaded
from serve_app.load.admission import Admission


def nobody_knows() -> float | None:
    return None


def take(stack: ExitStack, admission: Admission, number: int, share: str = "") -> None:
    for _ in range(number):
        stack.enter_context(admission.request(nobody_knows, share))


def test_the_last_places_are_for_who_has_none() -> None:
    admission = Admission(16)
    with ExitStack() as stack:
        take(stack, admission, 14, "crowd")
        with pytest.raises(
            Overloaded, match=r"the last 2 are reserved for users without a request, and 'crowd' has 14"
        ):
            take(stack, admission, 1, "crowd")
        take(stack, admission, 1, "one")
        take(stack, admission, 1, "other")
        with pytest.raises(Overloaded, match="the limit is 16"):
            take(stack, admission, 1, "third")
    assert admission.num_in_progress == 0


def test_who_has_no_name_may_have_all_places() -> None:
    admission = Admission(16)
    with ExitStack() as stack:
        take(stack, admission, 16)
        with pytest.raises(Overloaded, match="the limit is 16"):
            admission.check(nobody_knows)


def test_where_there_are_few_places_none_is_kept() -> None:
    with ExitStack() as stack:
        take(stack, Admission(2), 2, "crowd")
