"""The admission queue: requests that wait to begin hold a seat, but no thread and no latents."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from deployments.engine.order import Order
from deployments.engine.seat import Seat


class AdmissionQueue:
    """Lets num_at_once requests run, and up to half as many more (at least 1) start if they outrank a running one.

    The outranked request pauses between two of its steps and keeps its latents. Not thread-safe.
    """

    def __init__(self, num_at_once: int, order: Order) -> None:
        self._num_at_once, self._order = num_at_once, order
        self._waiting: dict[Seat, Future[None]] = {}
        self._at_work: set[Seat] = set()

    @property
    def waiting(self) -> list[Seat]:
        return list(self._waiting)

    def enter(self, seat: Seat) -> Future[None]:
        """Returns a future that is done when the request may start."""
        entered: Future[None] = Future()
        entered.set_running_or_notify_cancel()  # its waiter cannot cancel it: `leave` removes it
        self._waiting[seat] = entered
        return entered

    def admit(self) -> None:
        """Starts requests while there is room."""
        while self._waiting and len(self._at_work) < num_threads(self._num_at_once):
            first = min(self._waiting, key=self._key)
            if not self._has_room(first):
                return
            self._at_work.add(first)
            self._waiting.pop(first).set_result(None)

    def refuse(self, seat: Seat, error: BaseException) -> None:
        """Ends a waiting request with an error."""
        self._waiting.pop(seat).set_exception(error)

    def refuse_late(self, late: Callable[[Seat], BaseException | None]) -> None:
        """Ends waiting requests that are too late.

        late: returns the error for a request that cannot be done in time, else None.
        """
        for seat in self.waiting:
            if error := late(seat):
                self.refuse(seat, error)

    def leave(self, seat: Seat) -> None:
        """Removes a request, however it ended."""
        self._waiting.pop(seat, None)
        self._at_work.discard(seat)

    def _has_room(self, first: Seat) -> bool:
        if len(self._at_work) < self._num_at_once:
            return True
        return bool(self._key(first) < max(map(self._key, self._at_work)))

    def _key(self, seat: Seat) -> Any:
        return self._order.key(seat, self._num_at_once)


def num_threads(num_at_once: int) -> int:
    """Returns the number of threads needed: for num_at_once requests and for those that are outranked."""
    return num_at_once + max(1, num_at_once // 2)
