"""Finds the jobs whose runner is dead.

No clocks of two machines are compared: a watching runner measures by its own clock how long a job's beat has not
changed. Time in which it could not read the database hardly counts, since the job's runner could not write then
either.
"""

import time
from collections.abc import Callable, Iterable

from serve_app.jobs.job import Open

MOST_AT_ONCE = 0.25
"""Share of a lease that counts as passed between two looks at most, however long apart they were."""


class LeaseMonitor:
    """The beats of other runners' jobs, as one runner sees them."""

    def __init__(self, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease_s, self._clock = lease_s, clock
        self._looked_at = clock()
        self._silent: dict[str, tuple[int, float]] = {}
        """By job ID: the last beat, and for how many seconds it has been seen unchanged."""

    def lapsed(self, running: Iterable[Open]) -> list[Open]:
        """Returns the jobs whose beat has not changed for as long as a lease lasts.

        running: all running jobs of other runners.
        """
        now, silent, lapsed = self._clock(), {}, []
        watched_s = min(now - self._looked_at, self._lease_s * MOST_AT_ONCE)
        for job in running:
            beat, silent_s = self._silent.get(job.id, (None, 0.0))
            silent_s = silent_s + watched_s if beat == job.beat else 0.0
            silent[job.id] = job.beat, silent_s
            if silent_s >= self._lease_s:
                lapsed.append(job)
        self._silent, self._looked_at = silent, now
        return lapsed
