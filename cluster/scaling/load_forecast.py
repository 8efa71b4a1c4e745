"""Forecasts how many replicas a stage will need when a new one could serve, from the remaining work and the
arrival rate.

A replica that is added at this moment serves after its cold start. Until then the ready replicas continue, and
requests are assumed to arrive at the same rate. Work is counted in seconds of one replica's whole time, and the
arrival rate in the number of replicas that it keeps busy:

    left = max(0, waiting work + (arrival rate - ready replicas) x cold start)
    load = max(min(arrival rate, ready replicas), started work that is not done by then)
           + left / time that a load of 1 takes

So a queue that drains before a new replica could serve asks for none, and a growing queue asks for what it will
have grown to. The number of replicas wanted is the load divided by `target_load`.
"""

from collections import deque
from dataclasses import dataclass

WINDOW_S = 120.0
"""Seconds over which the arrival rate is measured; a shorter window takes chance for a trend (relay bench
simulate)."""


@dataclass(frozen=True)
class Backlog:
    """All requests of a stage at one moment, including those on the way to a replica."""

    load: float
    """Their load, divided by what one replica can do at once."""
    work_s: float
    """Work that is left to do."""
    fresh_s: float
    """Seconds that requests with a load of 1 take from their start."""


class LoadForecast:
    """The forecast of one stage, updated at each call of `load`."""

    def __init__(self) -> None:
        self._last: tuple[float, Backlog, int] | None = None
        self._come_s = 0.0
        """Work that has arrived since the first call."""
        self._seen: deque[tuple[float, float]] = deque()
        """Times, and the work that had arrived by then."""

    def load(self, now_s: float, backlog: Backlog, num_ready: int, cold_start_s: float) -> float:
        """Returns the load at the time when a new replica could serve.

        Args:
            num_ready: replicas that serve at this moment.
            cold_start_s: seconds until a new replica serves.
        """
        return forecast_load(backlog, self._coming(now_s, backlog, num_ready), num_ready, cold_start_s)

    def _coming(self, now_s: float, backlog: Backlog, num_ready: int) -> float:
        """Returns the work that arrives per second. Work done since the last call has arrived too."""
        if self._last is not None:
            last_s, before, were_ready = self._last
            done_s = min(before.load, were_ready) * (now_s - last_s)
            self._come_s += backlog.work_s - before.work_s + done_s
        self._last = now_s, backlog, num_ready
        self._seen.append((now_s, self._come_s))
        while len(self._seen) > 1 and self._seen[1][0] <= now_s - WINDOW_S:
            self._seen.popleft()
        return max(0.0, self._come_s - self._seen[0][1]) / WINDOW_S


def forecast_load(backlog: Backlog, coming: float, num_ready: int, cold_start_s: float) -> float:
    """Returns the load after `cold_start_s`, by the formula at the top of this file. coming: the arrival rate."""
    busy = min(backlog.load, num_ready)
    waiting_s = backlog.work_s * (1 - busy / backlog.load) if busy else backlog.work_s
    left_s = max(0.0, waiting_s + (coming - num_ready) * cold_start_s)
    still_busy = max(0.0, busy - busy**2 * cold_start_s / (backlog.work_s - waiting_s)) if busy else 0.0
    return max(min(coming, num_ready), still_busy) + left_s / backlog.fresh_s
