"""Counts the micro-batches that rank 0 has in flight, and detects when they are stuck."""

import threading
import time


class Traffic:
    """The number of rank 0's micro-batches in flight, for how long there have been any, and when one last came
    back."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_in_flight = 0
        self._occupied_s = 0.0
        self._occupied_since = 0.0  # valid while anything is in flight
        self._moved_at = 0.0
        self._has_stopped = False

    def sent(self) -> None:
        with self._changed:
            if self._num_in_flight == 0:
                self._occupied_since = self._moved_at = time.monotonic()
                self._changed.notify_all()
            self._num_in_flight += 1

    def received(self) -> None:
        with self._changed:
            self._moved_at = time.monotonic()
            self._num_in_flight -= 1
            if self._num_in_flight == 0:
                self._occupied_s += self._moved_at - self._occupied_since

    def stop(self) -> None:
        with self._changed:
            self._has_stopped = True
            self._changed.notify_all()

    def occupied_s(self) -> float:
        with self._changed:
            current_s = time.monotonic() - self._occupied_since if self._num_in_flight else 0.0
            return self._occupied_s + current_s

    def wait_until_stuck(self, stuck_after_s: float) -> int:
        """Blocks until no micro-batch has come back for `stuck_after_s` although some are in flight; returns their
        number. Returns 0 when stopped."""
        with self._changed:
            while not self._has_stopped:
                left_s = self._moved_at + stuck_after_s - time.monotonic() if self._num_in_flight else None
                if left_s is not None and left_s <= 0:
                    return self._num_in_flight
                self._changed.wait(left_s)
            return 0
