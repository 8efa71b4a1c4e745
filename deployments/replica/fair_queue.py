"""A queue that decides which of the calls waiting for a stage's only thread is next. Torch-free."""

import math
import time
from collections import defaultdict
from heapq import heappop, heappush
from itertools import count
from threading import Lock
from typing import Generic, TypeVar

from deployments.engine.fair_shares import FairShares
from deployments.engine.order import WEIGHTS
from deployments.options.qos import Priority, Qos

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Orders by priority and share like the denoise stage (engine/order.py), then by deadline, then by arrival.

    Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._classes = FairShares()
        self._shares: dict[Priority, FairShares] = defaultdict(FairShares)
        self._waiting: dict[tuple[Priority, str], list[tuple[float, int, float, Item]]] = defaultdict(list)
        self._arrivals = count()

    def put(self, item: Item, qos: Qos, work: float) -> None:
        """Adds an item. work: how much of its share the item uses, in any unit that is the same for all items."""
        deadline = math.inf if qos.left_s is None else time.monotonic() + qos.left_s
        with self._lock:
            self._classes.add(qos.priority)
            self._shares[qos.priority].add(qos.share)
            heappush(self._waiting[qos.priority, qos.share], (deadline, next(self._arrivals), work, item))

    def take(self) -> Item | None:
        """Removes and returns the next item; None: nothing waits."""
        with self._lock:
            if not self._waiting:
                return None
            whose = priority, share = min(self._waiting, key=self._had)
            _, _, work, item = heappop(self._waiting[whose])
            if not self._waiting[whose]:
                del self._waiting[whose]
            self._classes.charge(priority, work, WEIGHTS[priority])
            self._shares[priority].charge(share, work)
            self._classes.remove(priority)
            self._shares[priority].remove(share)
            return item

    def _had(self, whose: tuple[Priority, str]) -> tuple[float, float, int]:
        """Returns the sort key of a user: the least goes first; of equal usage, the earlier arrival."""
        priority, share = whose
        return self._classes.usage(priority), self._shares[priority].usage(share), self._waiting[whose][0][1]
