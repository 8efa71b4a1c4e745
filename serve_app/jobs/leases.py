"""Whose runner is dead.

No clocks of two machines are compared: who watches a job sees its beat, and that it has not changed for as long as
a lease lasts, by its own clock.
"""

import time
from collections.abc import Callable, Iterable

from serve_app.jobs.job import Open


class Leases:
    """The beats of other runners' jobs, as one runner sees them."""

    def __init__(self, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease_s, self._clock = lease_s, clock
        self._seen: dict[str, tuple[int, float]] = {}
        """By job: its beat, and since when."""

    def lapsed(self, running: Iterable[Open]) -> list[Open]:
        """Those of all running jobs of others that nobody has spoken of for as long as a lease lasts."""
        now, seen, lapsed = self._clock(), {}, []
        for job in running:
            beat, since = self._seen.get(job.id, (job.beat, now))
            since = since if beat == job.beat else now
            seen[job.id] = job.beat, since
            if now - since >= self._lease_s:
                lapsed.append(job)
        self._seen = seen
        return lapsed
