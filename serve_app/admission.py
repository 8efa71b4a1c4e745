"""How many requests one ingress takes up at once, whichever model they ask for."""

from collections.abc import Iterator
from contextlib import contextmanager

from serve_app.errors import Overloaded


class Admission:
    """Counts requests in progress. For one event loop."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.num_in_progress = 0

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around one request. Raises Overloaded where there are as many as the limit."""
        if self.num_in_progress >= self._limit:
            raise Overloaded(f"{self.num_in_progress} requests are in progress; the limit is {self._limit}")
        self.num_in_progress += 1
        try:
            yield
        finally:
            self.num_in_progress -= 1
