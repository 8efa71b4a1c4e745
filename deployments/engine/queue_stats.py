"""A step queue's figures."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class StepQueueStats:
    """Seats and forwards at this moment; micro-batches and waiting since the start."""

    num_seats: int
    num_waiting: int
    num_running: int
    """Forwards that run; the name is that of the field in `/v1/status`."""
    load: float
    """Full micro-batches needed for all requests / micro-batches allowed in flight; above 1, forwards wait."""
    batch_sizes: Mapping[int, int]
    """Number of micro-batches by their number of forwards."""
    queue_wait_s: float
    """Total time that all forwards have waited before they ran."""
    num_waiting_requests: int = 0
    """Requests that have not begun."""
    num_out_of_time: int = 0
    """Requests that were ended since the start because they could not meet their deadlines."""

    @property
    def num_micro_batches(self) -> int:
        return sum(self.batch_sizes.values())
