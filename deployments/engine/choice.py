"""Chooses which waiting forwards run next as one micro-batch. Called under the step queue's lock."""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from deployments.engine.order import BatchCandidate, Order
from deployments.engine.seat import Forward, ForwardSpec, Seat, SeatState
from deployments.engine.step_times import StepTimes
from deployments.engine.time_slices import Groups, TimeSlices

HOLD_SHARE, MAX_HOLD_S = 0.25, 0.1
"""How long a micro-batch is held for a request that is in its scheduler step, because the request ranks higher or
would make the micro-batch full: HOLD_SHARE of the micro-batch's time, at most MAX_HOLD_S seconds."""
MIN_WAIT_S = 0.003
"""Least that a micro-batch is held to become full, also while its time is unknown."""


@dataclass(frozen=True)
class BatchLimits:
    """Limits of a step queue's micro-batches."""

    depth: int
    """Most micro-batches that may be in flight at once."""
    max_size: int
    max_tokens: int | None
    """Most tokens of a merged micro-batch, because merging more does not pay. None: no limit."""
    wait_s: float | None = None
    """How long a micro-batch is held to become full. None: HOLD_SHARE of its time."""

    def size(self, forward: ForwardSpec) -> int:
        """Returns how many forwards like this one may run as one."""
        limit = self.max_size if forward.max_merged is None else min(self.max_size, forward.max_merged)
        if self.max_tokens is None or not forward.tokens:
            return limit
        return max(min(limit, self.max_tokens // forward.tokens), 1)


class NextBatch(NamedTuple):
    """The forwards that run next; if none, how long to wait for another forward (None: without limit)."""

    forwards: list[Forward]
    wait_s: float | None = None


class Choice:
    """Forms micro-batches from a step queue's waiting forwards; each has forwards of one signature only.

    Size: live seats / depth, so that all requests together fill the shards, whatever their signatures.
    Order: order.py decides which forward is next; others of its signature that fit run with it. With fifo, the
        signature with the oldest forward is next, and a seat's next forward joins at the tail (round robin).
    Wait: a micro-batch below its size waits for seats that are about to submit a forward of its signature, at most
        `wait_s` after each seat's last forward. Meanwhile the next signature may go first, until the first forward
        of this one has waited `wait_s`. A micro-batch also waits for a higher-ranked request in its scheduler
        step (anticipation: Iyer and Druschel, SOSP 2001).
    """

    def __init__(
        self, seats: Collection[Seat], limits: BatchLimits, order: Order, step_times: StepTimes, slices: TimeSlices
    ) -> None:
        """seats: all occupied seats; the queue keeps this collection up to date."""
        self.limits = limits
        self._seats, self._order, self._step_times, self._slices = seats, order, step_times, slices
        self._num_alike: Counter[Hashable] = Counter()

    def next_batch(self, waiting: Sequence[Forward], now: float) -> NextBatch:
        """Returns the forwards to run next, if any. waiting: oldest first."""
        self._num_alike = Counter(
            seat.latest.signature for seat in self._seats if seat.state is not SeatState.ENDED
        )
        groups: dict[Hashable, list[Forward]] = defaultdict(list)
        for forward in waiting:
            groups[forward.spec.signature].append(forward)
        runnable, ask_again_at = self._slices.of(groups, self._seats, now)
        deadlines = [] if ask_again_at is None else [ask_again_at]
        for first, signature in self._in_order(runnable):
            group = runnable[signature]
            size = self._batch_size(group)
            wait_s = self._wait_s(signature, size)
            deadline = self._last_step_began(signature) + wait_s
            if len(group) >= size or deadline <= now:
                if (held_until := self._held_until(first)) <= now:
                    return NextBatch(self._pick(group, size))
                deadlines.append(held_until)
                break
            deadlines.append(deadline)
            if first.seat.state_since_s + wait_s <= now:
                break  # it has waited `wait_s`: later groups may not go before it
        return NextBatch([], min(deadlines) - now if deadlines else None)

    def _in_order(self, groups: Groups) -> list[tuple[Forward, Hashable]]:
        """Returns the first forward of each group with its signature, in the order in which they go."""
        firsts = [
            (min(group, key=lambda each: self._key(each.seat)), signature) for signature, group in groups.items()
        ]
        return sorted(firsts, key=lambda each: self._key(each[0].seat))

    def _pick(self, group: Sequence[Forward], size: int) -> list[Forward]:
        first = group[0]
        takes_s = partial(self._step_times.batch_s, first.spec.signature)
        cost_s, num_at_once = self._step_times.cost_s(first.spec), self._num_at_once(first.seat)
        return self._order.pick(group, BatchCandidate(size, cost_s, num_at_once, takes_s))

    def _key(self, seat: Seat) -> Any:
        return self._order.key(seat, self._num_at_once(seat))

    def _num_at_once(self, seat: Seat) -> int:
        """Returns how many requests like this one can run at once, over all micro-batches in flight."""
        return self.limits.depth * max(
            1, min(self.limits.size(seat.latest), self._num_alike[seat.latest.signature])
        )

    def _held_until(self, first: Forward) -> float:
        """Returns when to stop holding this forward for higher-ranked requests in their scheduler steps."""
        takes_s = self._step_times.latency_s(first.seat.latest)
        steps_began = (
            seat.state_since_s for seat in self._seats if self._should_wait_for(seat, first.seat, takes_s)
        )
        return max(steps_began, default=-math.inf) + min(HOLD_SHARE * takes_s, MAX_HOLD_S)

    def _should_wait_for(self, seat: Seat, other: Seat, takes_s: float) -> bool:
        """Returns whether `other` is held for `seat`, which is in its scheduler step and ranks higher.

        Similar requests of one user never wait for each other, because that would only idle the device.
        """
        if seat.state is not SeatState.STEPPING:
            return False
        own, others = self._key(seat), self._key(other)
        is_alike = own[:2] == others[:2] and 2 * self._step_times.latency_s(seat.latest) > takes_s
        return own < others and not is_alike

    def _batch_size(self, group: Sequence[Forward]) -> int:
        num_live = sum(seat.state not in (SeatState.NEW, SeatState.ENDED) for seat in self._seats)
        size_limit = min(self.limits.size(forward.spec) for forward in group)
        return max(min(math.ceil(num_live / self.limits.depth), size_limit), 1)

    def _wait_s(self, signature: Hashable, size: int) -> float:
        """Returns how long a micro-batch of this size is held to become full.

        A merged forward costs little more than a forward alone, so holding pays for much of a forward's time.
        Measured with eight tiny FLUX requests of 50 steps on two cores: 78 micro-batches if each is held for 3 ms,
        53 to 60 if it is held for this long.
        """
        if self.limits.wait_s is not None:
            return self.limits.wait_s
        takes_s = self._step_times.batch_s(signature, size) or 0.0
        return max(MIN_WAIT_S, min(HOLD_SHARE * takes_s, MAX_HOLD_S))

    def _last_step_began(self, signature: Hashable) -> float:
        """Returns when the last scheduler step began after which a forward of this signature may come; else
        -inf."""
        steps_began = (seat.state_since_s for seat in self._seats if seat.is_coming_to(signature))
        return max(steps_began, default=-math.inf)
