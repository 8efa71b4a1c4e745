"""Recent durations by kind."""

from collections import OrderedDict, deque
from collections.abc import Hashable

NUM_LATEST = 16
"""Measurements kept per kind. The fastest of them estimates the undisturbed duration; runs slowed by compilation
or contention soon drop out."""
NUM_KNOWN = 4
"""Measurements that a kind needs before its duration counts as known."""
MAX_KINDS = 1024


class Timings:
    """Latest durations by kind, in seconds. Not thread-safe."""

    def __init__(self, s_per_size: float) -> None:
        """s_per_size: initial guess of the seconds per unit of size."""
        self._latest: OrderedDict[Hashable, deque[float]] = OrderedDict()
        self._s_per_size = deque([s_per_size], maxlen=NUM_LATEST)

    def note(self, kind: Hashable, took_s: float, *, size: float) -> None:
        self._latest.setdefault(kind, deque(maxlen=NUM_LATEST)).append(took_s)
        self._latest.move_to_end(kind)
        if len(self._latest) > MAX_KINDS:
            self._latest.popitem(last=False)
        if size > 0:
            self._s_per_size.append(took_s / size)

    def known(self, kind: Hashable) -> float | None:
        """Returns the fastest of the kind's latest durations; None: too few were measured."""
        latest = self._latest.get(kind, ())
        return min(latest) if len(latest) >= NUM_KNOWN else None

    def fastest(self, kind: Hashable) -> float:
        """Returns the fastest of the kind's latest durations, of which there must be at least one."""
        return min(self._latest[kind])

    def guess(self, kind: Hashable, *, size: float) -> float:
        """Like `known`, but an unknown kind gets its size x the fastest time per size of all kinds."""
        known_s = self.known(kind)
        return min(self._s_per_size) * size if known_s is None else known_s
