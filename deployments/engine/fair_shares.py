"""Fair queueing: decides which share goes next, by the work that each share has used."""

from collections import Counter
from collections.abc import Hashable

FEW = 4
"""Most requests with which a share still gets a burst: as many images as the web page requests at once."""


class FairShares:
    """Start-time fair queueing (Goyal, Vin and Cheng, 1996).

    The share that has used the least work goes first. Virtual time is the least usage of any share present. A
    share that arrives or returns starts at virtual time minus `burst_s`, so that idle time is not saved up: of two
    shares of equal weight that are always present, neither is ever ahead by more than `burst_s` plus one piece of
    work of each.

    All usage is forgotten when the queue has been empty. A share with more than `FEW` requests gets no burst,
    because it would keep the others waiting.
    """

    def __init__(self, burst_s: float = 0.0) -> None:
        """burst_s: seconds of work that a share may do before the others after it was absent."""
        self._burst_s = burst_s
        self._had: dict[Hashable, float] = {}
        self._num_here: Counter[Hashable] = Counter()
        self._now = 0.0

    def come(self, share: Hashable) -> None:
        """Notes that a request of this share has arrived."""
        if not self._num_here:
            self._time()
            self._had.clear()
        if share not in self._num_here:
            begins_at = self._time() - self._burst_s
            self._had[share] = max(self._had.get(share, begins_at), begins_at)
        self._num_here[share] += 1
        if self._num_here[share] > FEW:
            others = (self._had[each] for each in self._num_here if each != share)
            self._had[share] = max(self._had[share], min(others, default=self._had[share]))

    def go(self, share: Hashable) -> None:
        """Notes that a request of this share has ended."""
        self._time()
        self._num_here[share] -= 1
        if not self._num_here[share]:
            del self._num_here[share]
            gone = [each for each in self._had if each not in self._num_here]
            for each in gone:  # on return they would start there without an entry too
                if self._had[each] <= self._now - self._burst_s:
                    del self._had[each]

    def had(self, share: Hashable) -> float:
        """Returns the work used, in virtual seconds; the share with the least goes first."""
        return self._had.get(share, self._now)

    def charge(self, share: Hashable, work_s: float, weight: float = 1.0) -> None:
        self._had[share] = self.had(share) + work_s / weight

    def _time(self) -> float:
        """Returns the virtual time, which never decreases."""
        here = [self._had[share] for share in self._num_here]
        self._now = max(self._now, min(here, default=max(self._had.values(), default=0.0)))
        return self._now
