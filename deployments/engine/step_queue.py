"""The step queue: which of the waiting forwards of the transformer go next, and together.

A request runs diffusers' pipeline in a thread of its own and has one seat here, and one more for each forward that
it asks for before it uses the one before (`passes.py`). A seat is

    NEW ──▶ WAITING ──▶ FLYING ──▶ BETWEEN ──▶ ENDED      WAITING: its forward is in the queue
               ▲                      │                   FLYING:  its forward is on the shards
               └──────────────────────┘                   BETWEEN: its thread is in the scheduler step

That thread calls `submit` and waits for the result when it needs it. Rank 0's compute thread calls `take` when it
has nothing to do, so that the choice falls as late as possible. Who hears from the last rank calls `finish`,
`fail` or `part`. Payloads are opaque: nothing here knows tensors, shards or Ray.
"""

import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from deployments.engine.model_turns import ModelTurns
from deployments.engine.seat import Forward, MicroBatch, Seat, SeatState


class Cancelled(Exception):
    """The request was cancelled."""


@dataclass(frozen=True)
class StepQueueStats:
    """Seats and forwards at this moment; micro-batches and waiting since the start."""

    num_seats: int
    num_waiting: int
    num_flying: int
    load: float
    """The full micro-batches that all seats come to, over how many can fly: above 1, forwards wait their turn."""
    batch_sizes: Mapping[int, int]
    """How many micro-batches took off with so many forwards."""
    queue_wait_s: float
    """What all forwards together waited before they took off."""

    @property
    def num_micro_batches(self) -> int:
        return sum(self.batch_sizes.values())


class StepQueue:
    """Merges forwards of one signature into micro-batches and keeps the shards supplied; thread-safe.

    Depth: S + 1 micro-batches fly over S > 1 shards: one is always ready in front of rank 0 (.98 of the ideal
        throughput, against .80 with S of them). With one shard 1 flies: a second would halve the first.
    Size: live seats / depth, so that all requests together fill the shards, whatever their signatures.
    Order: by the oldest forward of a signature. A seat's next forward joins at the tail: that is round robin.
    Wait: a smaller batch waits for the seats coming to it, for each at most `batch_wait_s` after it landed.
        Meanwhile a younger signature may go first, until the oldest forward has waited `batch_wait_s`.
    """

    def __init__(
        self,
        *,
        num_shards: int,
        max_batch_size: int,
        batch_wait_s: float,
        max_batch_tokens: int | None,
        tells_idle: bool = False,
        turn_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            max_batch_tokens: where larger batches stop paying. A forward with more than that flies alone.
            tells_idle: whether an empty micro-batch follows the last of those that are there.
            turn_s: for so long a model's forwards go before those of others, where they take turns at the device.
        """
        self.depth = 1 if num_shards == 1 else num_shards + 1
        self._max_batch_size = max_batch_size
        self._max_batch_tokens = max_batch_tokens
        self._batch_wait_s = batch_wait_s
        self._tells_idle = tells_idle
        self._clock = clock
        self._turns = ModelTurns(turn_s)

        self._changed = threading.Condition()  # guards all that follows; only `take` waits on it
        self._seats: set[Seat] = set()
        self._open: dict[Seat, Forward] = {}  # WAITING or FLYING, the oldest first
        self._flights: dict[int, list[Forward]] = {}
        self._closing_error: BaseException | None = None
        self._has_idle_to_tell = False
        self._batch_ids = count()
        self._batch_sizes: Counter[int] = Counter()
        self._queue_wait_s = 0.0

    # A request's side.

    def join(self) -> Seat:
        """Take a seat, one for each request."""
        seat = Seat()
        with self._changed:
            self._seats.add(seat)
        return seat

    def seat_of(self, seat: Seat, place: int) -> Seat:
        """The request's seat for its forward at this place: at 0 its own, else one of its `passes`.

        Raises `Cancelled`.
        """
        with self._changed:
            if seat.state is SeatState.ENDED:
                raise Cancelled("the request has ended")
            while len(seat.passes) < place:
                seat.passes.append(Seat(is_pass=True))
                self._seats.add(seat.passes[-1])
            return (seat, *seat.passes)[place]

    def keep(self, seat: Seat, num_bytes: int) -> None:
        """The request keeps so many more from step to step, until its seat is free."""
        with self._changed:
            seat.kept_bytes += num_bytes

    def kept_bytes(self) -> int:
        """By all that have a seat."""
        with self._changed:
            return sum(seat.kept_bytes for seat in self._seats)

    def submit(
        self,
        seat: Seat,
        payload: Any,
        *,
        signature: Hashable,
        tokens: int,
        at_most: int | None = None,
        model: Hashable = None,
    ) -> Future[Any]:
        """Its result, to come. Forwards of equal signature may run as one; `tokens` is the cost.

        at_most: so many of them, for memory's sake; what does not fit now waits.

        Raises `Cancelled`, or the error that the queue was closed with; so does the future, or that of its
        micro-batch.
        """
        return self._submit(Forward(seat, payload, signature, tokens, at_most, model))

    def cancel(self, seat: Seat) -> None:
        """Let its open forwards, and any later one, raise `Cancelled`. What flies lands, and is dropped."""
        with self._changed:
            for one in (seat, *seat.passes):
                one.state = SeatState.ENDED
                if forward := self._open.pop(one, None):
                    forward.result.set_exception(Cancelled("the request was cancelled"))
            self._changed.notify_all()

    def leave(self, seat: Seat) -> None:
        """Free the seat and its passes, however the request ended."""
        with self._changed:
            self.cancel(seat)
            self._seats.difference_update((seat, *seat.passes))

    # Rank 0's side.

    def take(self) -> MicroBatch:
        """Block until a micro-batch should take off. Raises the error that the queue was closed with."""
        with self._changed:
            while self._closing_error is None:
                batch, wait_s = self._choose()
                if batch or (self._has_idle_to_tell and not self._seats):
                    return self._take_off(batch)
                self._changed.wait(wait_s)
            raise self._closing_error

    def finish(self, batch_id: int, results: Sequence[Any]) -> None:
        """Give each forward its result, in the order of the payloads."""
        with self._changed:
            size = len(self._flights[batch_id])
            if len(results) != size:
                raise ValueError(f"micro-batch {batch_id}: got {len(results)} results for {size} payloads")
            for i, forward in self._land(batch_id):
                forward.result.set_result(results[i])

    def fail(self, batch_id: int, error: BaseException) -> None:
        """Let the forwards of this micro-batch, and no others, raise the error."""
        with self._changed:
            for _, forward in self._land(batch_id):
                forward.result.set_exception(error)

    def part(self, batch_id: int) -> None:
        """Together these forwards were too much: let each fly once more, alone."""
        with self._changed:
            for forward in self._flights.pop(batch_id):
                if self._open.get(forward.seat) is forward:
                    self._open[forward.seat] = replace(forward, at_most=1)  # in its place in the order
                    forward.seat.state, forward.seat.since = SeatState.WAITING, self._clock()
                    forward.seat.at_most = 1
            self._changed.notify_all()

    def close(self, error: BaseException) -> None:
        """Let every open forward, any later one, and `take` raise the error. Only the first call counts."""
        with self._changed:
            self._closing_error = self._closing_error or error
            for forward in self._open.values():
                forward.result.set_exception(self._closing_error)
            self._open.clear()
            self._changed.notify_all()

    def stats(self) -> StepQueueStats:
        with self._changed:
            states = Counter(seat.state for seat in self._open)
            return StepQueueStats(
                num_seats=sum(not seat.is_pass for seat in self._seats),
                num_waiting=states[SeatState.WAITING],
                num_flying=states[SeatState.FLYING],
                load=sum(1 / self._size_limit(seat.tokens, seat.at_most) for seat in self._seats) / self.depth,
                batch_sizes=dict(self._batch_sizes),
                queue_wait_s=self._queue_wait_s,
            )

    # What happens to a forward, under the lock: submit, choose, take off, land.

    def _submit(self, forward: Forward) -> Future[Any]:
        seat = forward.seat
        with self._changed:
            if self._closing_error is not None:
                raise self._closing_error
            if seat.state is SeatState.ENDED:
                raise Cancelled("the request has ended")
            if seat in self._open:
                raise RuntimeError("a seat has one open forward at a time: wait for it, or join() once more")
            if seat.state is SeatState.BETWEEN:
                seat.successors[seat.signature] = forward.signature
            seat.state, seat.since = SeatState.WAITING, self._clock()
            seat.signature, seat.tokens, seat.at_most = forward.signature, forward.tokens, forward.at_most
            seat.model = forward.model
            self._open[seat] = forward
            self._changed.notify_all()
        return forward.result

    def _choose(self) -> tuple[list[Forward], float | None]:
        """What takes off now; if nothing, for how long to wait for another forward (None: without limit)."""
        if len(self._flights) >= self.depth:
            return [], None
        groups: dict[Hashable, list[Forward]] = defaultdict(list)
        for seat, forward in self._open.items():
            if seat.state is SeatState.WAITING:
                groups[forward.signature].append(forward)
        now = self._clock()
        turn, ask_again_at = self._turns.of(groups, self._seats, now)
        deadlines = [] if ask_again_at is None else [ask_again_at]
        for signature, group in turn.items():
            size, deadline = self._batch_size(group), self._deadline(signature)
            if len(group) >= size or deadline <= now:
                return list(group[:size]), None
            deadlines.append(deadline)
            if group[0].seat.since + self._batch_wait_s <= now:
                break  # the younger ones may not go first any more
        return [], min(deadlines) - now if deadlines else None

    def _batch_size(self, group: Sequence[Forward]) -> int:
        num_live = sum(seat.state not in (SeatState.NEW, SeatState.ENDED) for seat in self._seats)
        at_most = min((forward.at_most for forward in group if forward.at_most is not None), default=None)
        size_limit = self._size_limit(max(forward.tokens for forward in group), at_most)
        return max(min(math.ceil(num_live / self.depth), size_limit), 1)

    def _size_limit(self, tokens: int, at_most: int | None) -> int:
        """How many forwards of so many tokens may fly as one."""
        limit = self._max_batch_size if at_most is None else min(self._max_batch_size, at_most)
        if self._max_batch_tokens is None or not tokens:
            return limit
        return max(min(limit, self._max_batch_tokens // tokens), 1)

    def _deadline(self, signature: Hashable) -> float:
        """Until when to wait for the seats that are coming to this signature; long ago if none is."""
        landings = (seat.since for seat in self._seats if seat.is_coming_to(signature))
        return max(landings, default=-math.inf) + self._batch_wait_s

    def _take_off(self, batch: list[Forward]) -> MicroBatch:
        now, batch_id = self._clock(), next(self._batch_ids)
        for forward in batch:
            forward.seat.state = SeatState.FLYING
            self._queue_wait_s += now - forward.seat.since
        if batch:
            self._turns.take_off(batch[0].model, now)
        self._batch_sizes.update([len(batch)] if batch else [])
        self._has_idle_to_tell = self._tells_idle and bool(batch)
        self._flights[batch_id] = batch
        return MicroBatch(batch_id, tuple(forward.payload for forward in batch))

    def _land(self, batch_id: int) -> list[tuple[int, Forward]]:
        """Its forwards that are still open, each with its place in the batch."""
        now, flight = self._clock(), self._flights.pop(batch_id)
        landed = [(i, forward) for i, forward in enumerate(flight) if self._open.pop(forward.seat, None)]
        for _, forward in landed:
            forward.seat.state, forward.seat.since = SeatState.BETWEEN, now
        self._changed.notify_all()
        return landed
