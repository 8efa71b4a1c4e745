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
        self._usage: dict[Hashable, float] = {}
        self._num_requests: Counter[Hashable] = Counter()
        self._now = 0.0

    def add(self, share: Hashable) -> None:
        """Notes that a request of this share has arrived."""
        if not self._num_requests:
            self._time()
            self._usage.clear()
        if share not in self._num_requests:
            starts_at = self._time() - self._burst_s
            self._usage[share] = max(self._usage.get(share, starts_at), starts_at)
        self._num_requests[share] += 1
        if self._num_requests[share] > FEW:
            others = (self._usage[each] for each in self._num_requests if each != share)
            self._usage[share] = max(self._usage[share], min(others, default=self._usage[share]))

    def remove(self, share: Hashable) -> None:
        """Notes that a request of this share has ended."""
        self._time()
        self._num_requests[share] -= 1
        if not self._num_requests[share]:
            del self._num_requests[share]
            gone = [each for each in self._usage if each not in self._num_requests]
            for each in gone:  # on return they would start there without an entry too
                if self._usage[each] <= self._now - self._burst_s:
                    del self._usage[each]

    def usage(self, share: Hashable) -> float:
        """Returns the work used, in virtual seconds; the share with the least goes first."""
        return self._usage.get(share, self._now)

    def charge(self, share: Hashable, work_s: float, weight: float = 1.0) -> None:
        self._usage[share] = self.usage(share) + work_s / weight

    def _time(self) -> float:
        """Returns the virtual time, which never decreases."""
        present = [self._usage[share] for share in self._num_requests]
        self._now = max(self._now, min(present, default=max(self._usage.values(), default=0.0)))
        return self._now
