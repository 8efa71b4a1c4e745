"""What replicas report to the autoscaling policy: the work that is left, and a request's duration. Torch-free."""

import time
from collections.abc import Callable
from typing import Any

from cluster.metrics import StageMetrics
from cluster.scaling.autoscaling import COLD_START_S, LEFT_S, LOAD, REQUEST_S
from deployments.replica.request_events import RequestEvents
from deployments.replica.serial_executor import BatchingExecutor


def executor_pace(
    executor: BatchingExecutor[Any, Any], metrics: StageMetrics, cold_start_s: float
) -> dict[str, float]:
    """Returns figures of a stage that runs one request after another; its load is what Serve itself counts."""
    num_done = metrics.num_requests - metrics.num_in_flight
    measured = {REQUEST_S: executor.busy_s / num_done} if num_done and executor.busy_s else {}
    return {COLD_START_S: cold_start_s, **measured}


class ReplicaPace:
    """Estimates remaining seconds from busy time per step over about the last minute.

    Busy time is min(load, 1) x elapsed time. Divided by the number of steps done meanwhile, merged or not, it is
    the time per step.
    """

    KEEPS_S = 60.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._under_way: set[RequestEvents] = set()
        self._told_s: float | None = None
        self._busy_s = 0.0
        self._num_steps = 0.0
        self._steps_of_left = 0
        """Steps, not yet counted, of requests that have left since the last `tell`."""
        self._asked_steps = 0.0
        """Moving average of the number of steps that a request asks for."""

    def join(self, events: RequestEvents) -> None:
        self._under_way.add(events)
        self._asked_steps += (events.num_steps - self._asked_steps) * (0.1 if self._asked_steps else 1.0)

    def leave(self, events: RequestEvents) -> None:
        self._under_way.discard(events)
        self._steps_of_left += events.take_unreported_steps()

    def tell(self, load: float, cold_start_s: float) -> dict[str, float]:
        """Returns the figures for the autoscaling policy. Called about once a second."""
        now = self._clock()
        if self._told_s is not None:
            self._add(min(load, 1.0) * (now - self._told_s))
        self._told_s = now
        told = {LOAD: load, COLD_START_S: cold_start_s}
        if self._num_steps:
            step_s = self._busy_s / self._num_steps
            told |= {LEFT_S: step_s * sum(events.steps_left for events in self._under_way)}
            told |= {REQUEST_S: step_s * self._asked_steps}
        return told

    def _add(self, busy_s: float) -> None:
        self._busy_s += busy_s
        self._num_steps += self._steps_of_left + sum(events.take_unreported_steps() for events in self._under_way)
        self._steps_of_left = 0
        if self._busy_s > self.KEEPS_S:
            kept = self.KEEPS_S / self._busy_s
            self._busy_s, self._num_steps = self._busy_s * kept, self._num_steps * kept
