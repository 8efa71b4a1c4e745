"""The micro-batches that have started but not ended, and totals over all since the start."""

from collections import Counter
from itertools import count

from deployments.engine.seat import Forward, SeatState


class InFlight:
    """A step queue's micro-batches in flight. Guarded by the queue's lock."""

    def __init__(self) -> None:
        self._batches: dict[int, tuple[list[Forward], float]] = {}  # each with its start time
        self._ids = count()
        self.sizes: Counter[int] = Counter()
        """Number of micro-batches by their number of forwards."""
        self.queue_wait_s = 0.0
        """Total time that all forwards have waited before they ran."""

    def __len__(self) -> int:
        return len(self._batches)

    def start(self, batch: list[Forward], now: float) -> int:
        """Notes that a micro-batch starts; returns its id."""
        batch_id = next(self._ids)
        for forward in batch:
            self.queue_wait_s += now - forward.seat.state_since_s
            forward.seat.enter(SeatState.RUNNING, now)
        if batch:
            self.sizes[len(batch)] += 1
        self._batches[batch_id] = batch, now
        return batch_id

    def size(self, batch_id: int) -> int:
        return len(self._batches[batch_id][0])

    def end(self, batch_id: int) -> tuple[list[Forward], float]:
        """Removes a micro-batch; returns its forwards and its start time."""
        return self._batches.pop(batch_id)
