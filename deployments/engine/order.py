"""The order in which requests start, and in which their forwards run.

Fair: by class, then by share (the user), then by due time.

Class: `priority`, by weighted fair queueing (fair_shares.py): while all classes wait, high gets 16/21 of the
    device, normal 4/21 and low 1/21. So no class starves: low always gets at least 1/21.
Share: the user, by fair queueing: the users of a class get equal parts of it. A user who has had less than that
    goes first, for up to `BURST_S` of work, so that a client with many requests hardly slows down one with few.
    For the same reason, others' forwards may lengthen a user's micro-batch by at most half of their part: with n
    equal users, by (n - 1) / 2 times the time of the user's own forwards. Where merging costs no time,
    micro-batches stay full.
Due: due time = min(deadline, accepted + `STRETCH` x time alone). The earliest goes first; of equal due times, the
    earlier deadline. So equal requests go earliest deadline first, and of two accepted together the shorter goes
    first. The bound: if one request runs at a time, no request A is overtaken by a request of its share that has
    no deadline and was accepted more than `STRETCH` x (A's time alone) after A. (Stretch, or slowdown: time in the
    system / time alone. Due times of equal stretch: Bender, Chakrabarti and Muthukrishnan, SODA 1998. Shortest
    remaining work first, SRPT, has no bound: long requests may wait without limit.)

Critical requests go before all others of their share. A request is critical if its remaining work >= its share's
remaining work / number of requests that run at once. Without this rule, the last of several requests that start
together would run alone while the other shards idle. (No preemptive schedule on m machines ends before the longest
request, or before all work / m; McNaughton, 1959, shows that this bound can be met.)
"""

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from deployments.engine.fair_shares import FairShares
from deployments.engine.seat import Forward, Seat
from deployments.options.qos import OrderName, Priority

WEIGHTS: Mapping[Priority, float] = {"high": 16.0, "normal": 4.0, "low": 1.0}
BURST_S = 30.0
"""Work that a user may do before others: about one request of a large model (FLUX.1-dev takes 7 s on an H100,
Qwen-Image 25 s)."""
STRETCH = 10.0
OTHERS_SHARE = 0.5
"""Others may lengthen a micro-batch by this fraction of (1/part - 1) x the time of the first user's own forwards,
where part is the first user's part of the device."""


@dataclass(frozen=True)
class BatchCandidate:
    """What is known of the next micro-batch if it is made of the waiting forwards of one signature."""

    max_size: int
    cost_s: float
    """Device time of one forward."""
    num_at_once: int
    """Number of similar requests that can run at once."""
    takes_s: Callable[[int], float | None]
    """Device time by micro-batch size; None: nothing is known."""


class Order(Protocol):
    """Decides which request goes first. Guarded by the step queue's lock."""

    def add(self, seat: Seat) -> None:
        """Notes that a request has arrived; it may have to wait."""

    def advance(self, seat: Seat, work_s: float) -> None:
        """Notes that the request has work_s less left."""

    def remove(self, seat: Seat) -> None:
        """Notes that the request has ended."""

    def key(self, seat: Seat, num_at_once: int) -> Any:
        """Returns the sort key: the least goes first; of equal keys, the seat that has waited longer.

        num_at_once: how many similar requests can run at once.
        """

    def pick(self, forwards: Sequence[Forward], candidate: BatchCandidate) -> list[Forward]:
        """Returns the waiting forwards that become one micro-batch."""


class FifoOrder:
    """First come, first served, for each forward: all requests advance in turn."""

    def add(self, seat: Seat) -> None:
        pass

    def advance(self, seat: Seat, work_s: float) -> None:
        pass

    def remove(self, seat: Seat) -> None:
        pass

    def key(self, seat: Seat, num_at_once: int) -> tuple[()]:
        return ()

    def pick(self, forwards: Sequence[Forward], candidate: BatchCandidate) -> list[Forward]:
        return list(forwards[: candidate.max_size])


_Party = tuple[Priority, str]
"""A priority class and a share of it, which is a user."""


@dataclass
class _Share:
    """Requests and remaining work of one share of a class."""

    num_requests: int = 0
    left_s: float = 0.0


class FairOrder:
    """The fair order, as described at the top of this file."""

    def __init__(self) -> None:
        self._classes = FairShares()
        self._shares: dict[Priority, FairShares] = defaultdict(lambda: FairShares(BURST_S))
        self._shares_present: dict[_Party, _Share] = defaultdict(_Share)

    def add(self, seat: Seat) -> None:
        qos = seat.demand.qos
        self._classes.add(qos.priority)
        self._shares[qos.priority].add(qos.share)
        share = self._shares_present[qos.priority, qos.share]
        share.num_requests += 1
        share.left_s += seat.left_s

    def advance(self, seat: Seat, work_s: float) -> None:
        qos = seat.demand.qos
        self._shares_present[qos.priority, qos.share].left_s -= work_s

    def remove(self, seat: Seat) -> None:
        qos = seat.demand.qos
        self._classes.remove(qos.priority)
        self._shares[qos.priority].remove(qos.share)
        share = self._shares_present[qos.priority, qos.share]
        share.num_requests -= 1
        share.left_s -= seat.left_s
        if not share.num_requests:
            del self._shares_present[qos.priority, qos.share]

    def key(self, seat: Seat, num_at_once: int) -> tuple[float, float, bool, float, float]:
        request = seat.request
        priority, share = request.demand.qos.priority, request.demand.qos.share
        is_critical = num_at_once * request.left_s >= self._shares_present[priority, share].left_s
        usage = self._classes.usage(priority), self._shares[priority].usage(share)
        return *usage, not is_critical, request.due, request.deadline

    def pick(self, forwards: Sequence[Forward], candidate: BatchCandidate) -> list[Forward]:
        """Picks forwards one by one: each time the first, by due time, of the share that goes first by then."""
        queues: dict[_Party, deque[Forward]] = defaultdict(deque)
        for forward in sorted(forwards, key=lambda each: self.key(each.seat, candidate.num_at_once)[2:]):
            queues[_party(forward.seat)].append(forward)
        picked: list[Forward] = []
        while queues and len(picked) < candidate.max_size:
            party = min(queues, key=lambda each: self.key(queues[each][0].seat, candidate.num_at_once))
            if picked and self._holds_up(_party(picked[0].seat), party, picked, candidate):
                break
            picked.append(queues[party].popleft())
            if not queues[party]:
                del queues[party]
            priority, share = party
            self._classes.charge(priority, candidate.cost_s, WEIGHTS[priority])
            self._shares[priority].charge(share, candidate.cost_s)
        return picked

    def _holds_up(
        self, first: _Party, other: _Party, picked: Sequence[Forward], candidate: BatchCandidate
    ) -> bool:
        """Returns whether a forward of another user would make the micro-batch too long for the first user."""
        if first == other:
            return False
        own_s = candidate.takes_s(sum(_party(each.seat) == first for each in picked))
        together_s = candidate.takes_s(len(picked) + 1)
        if own_s is None or together_s is None:
            return False
        return together_s - own_s > OTHERS_SHARE * own_s * (1 / self._part(first) - 1)

    def _part(self, party: _Party) -> float:
        """Returns the party's part of the device, from 0 to 1, while all present parties wait."""
        priority, _ = party
        classes = {other for other, _ in self._shares_present}
        num_shares = sum(other == priority for other, _ in self._shares_present)
        return WEIGHTS[priority] / sum(WEIGHTS[other] for other in classes) / num_shares


def _party(seat: Seat) -> _Party:
    qos = seat.request.demand.qos
    return qos.priority, qos.share


ORDERS: Mapping[OrderName, Callable[[], Order]] = {"fair": FairOrder, "fifo": FifoOrder}
