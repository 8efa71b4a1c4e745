"""Admission control: limits how many requests one ingress works on at a time, for all its models together."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serve_app.errors import Overloaded, quoted

RESERVED = 1 / 8
"""Share of the limit that is kept for users who have no request in progress, so that one user cannot fill it."""


class Admission:
    """Counts requests in progress. For one event loop."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._by_share: Counter[str] = Counter()

    @property
    def num_in_progress(self) -> int:
        return self._by_share.total()

    def check(self, place_free_s: Callable[[], float | None]) -> None:
        """Raises Overloaded if the limit is reached. place_free_s: returns the seconds until a request likely
        ends."""
        if self.num_in_progress >= self._limit:
            raise Overloaded(
                f"{self.num_in_progress} requests are in progress; the limit is {self._limit}", place_free_s()
            )

    @contextmanager
    def request(self, place_free_s: Callable[[], float | None], share: str = "") -> Iterator[None]:
        """Context around one request. Raises Overloaded. share: the user, as in `Qos`."""
        self.check(place_free_s)
        num_reserved = int(self._limit * RESERVED)
        if share and self._by_share[share] and self.num_in_progress >= self._limit - num_reserved:
            raise Overloaded(
                f"{self.num_in_progress} requests are in progress; the limit is {self._limit}, of which the last "
                f"{num_reserved} are reserved for users without a request, and {quoted(share)} has "
                f"{self._by_share[share]}",
                place_free_s(),
            )
        self._by_share[share] += 1
        try:
            yield
        finally:
            self._by_share[share] -= 1
            self._by_share += Counter()  # drops users without requests
