"""The step queue: decides which of the waiting forwards run next on the denoisers, and which of them together.

A request runs diffusers' pipeline in a thread of its own. It has one seat in the queue, and an extra seat for each
forward that it submits before it has used the result of the previous one (`passes.py`). The states of a seat:

    NEW ──▶ WAITING ──▶ RUNNING ──▶ STEPPING ──▶ ENDED    WAITING:  its forward is in the queue
               ▲                       │                  RUNNING:  its forward is on the shards
               └───────────────────────┘                  STEPPING: its thread is in the scheduler step

The request's thread calls `submit`, and waits for the result when it needs it. Rank 0's compute thread calls
`take` when it is idle, so that the choice is made as late as possible. The thread that receives from the last rank
calls `finish`, `fail` or `retry_alone`. Payloads are opaque: the queue does not depend on tensors, shards or Ray.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from deployments.engine.admission_queue import AdmissionQueue
from deployments.engine.choice import BatchLimits, Choice, NextBatch
from deployments.engine.demand import UNKNOWN, Demand
from deployments.engine.in_flight import InFlight
from deployments.engine.order import FifoOrder, Order
from deployments.engine.queue_stats import StepQueueStats
from deployments.engine.seat import Forward, ForwardSpec, MicroBatch, Seat, SeatState
from deployments.engine.step_times import StepTimes
from deployments.engine.time_slices import TimeSlices
from deployments.errors import OutOfTime


class Cancelled(Exception):
    """The request was cancelled."""


class StepQueue:
    """Supplies the shards with micro-batches of merged forwards, as `choice.py` chooses them. Thread-safe.

    Depth: with S > 1 shards, S + 1 micro-batches are in flight, so that one is always ready for rank 0 (.98 of the
        ideal throughput, against .80 with S in flight). With one shard the depth is 1, because with two
        micro-batches each would be half as large.
    Deadline: the next forward of a request that can no longer meet its deadline raises `OutOfTime`.
    """

    def __init__(
        self,
        *,
        num_shards: int,
        max_batch_size: int,
        batch_wait_s: float | None,
        max_batch_tokens: int | None,
        tells_idle: bool = False,
        time_slice_s: float = 0.0,
        order: Order | None = None,
        max_at_work: int = 2**31,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            max_batch_tokens: most tokens of merged forwards (more does not pay); a larger forward runs alone.
            tells_idle: whether an empty micro-batch is sent when the last request has left.
            time_slice_s: how long one model's forwards go before others', if models take turns on the device.
            order: None: first come, first served.
            max_at_work: requests that may run at once; the others wait to start.
        """
        self.depth = 1 if num_shards == 1 else num_shards + 1
        self._tells_idle = tells_idle
        self._clock = clock
        self._slices = TimeSlices(time_slice_s)
        self._order = order or FifoOrder()

        self._changed = threading.Condition()  # guards all that follows; only `take` waits on it
        self._seats: set[Seat] = set()
        self._open: dict[Seat, Forward] = {}  # WAITING or RUNNING, the oldest first
        self._in_flight = InFlight()
        self._closing_error: BaseException | None = None
        self._has_idle_to_tell = False
        self._admission = AdmissionQueue(max_at_work, self._order)
        self._step_times = StepTimes()
        self._choice = Choice(
            self._seats,
            BatchLimits(self.depth, max_batch_size, max_batch_tokens, batch_wait_s),
            self._order,
            self._step_times,
            self._slices,
        )
        self._num_out_of_time = 0

    # A request's side.

    def join(self, demand: Demand = UNKNOWN) -> Seat:
        """Adds a request and returns its seat."""
        with self._changed:
            seat = self._step_times.seat(demand, self._clock())
            self._seats.add(seat)
            self._order.add(seat)
        return seat

    def enter(self, seat: Seat) -> Future[None]:
        """Returns a future that is done when the request may take a thread and start. It may raise OutOfTime."""
        with self._changed:
            if self._closing_error is not None:
                raise self._closing_error
            entered = self._admission.enter(seat)
            self._refuse_and_admit()
        return entered

    def advance(self, seat: Seat, num_done: int) -> None:
        """Notes that num_done of the request's steps are done. Deadlines are judged by how long these took."""
        with self._changed:
            left_s = seat.left_s
            self._step_times.advance(seat, num_done)
            self._order.advance(seat, left_s - seat.left_s)

    def seat_of(self, seat: Seat, slot: int) -> Seat:
        """Returns the request's own seat for slot 0, else an extra seat. Raises `Cancelled` if it has ended."""
        with self._changed:
            if seat.state is SeatState.ENDED:
                raise Cancelled("the request has ended")
            while len(seat.extra_seats) < slot:
                seat.extra_seats.append(Seat(owner=seat))
                self._seats.add(seat.extra_seats[-1])
            return (seat, *seat.extra_seats)[slot]

    def retain(self, seat: Seat, num_bytes: int) -> None:
        """Notes that the request keeps num_bytes more from step to step, until it leaves."""
        with self._changed:
            seat.retained_bytes += num_bytes

    def retained_bytes(self) -> int:
        """Returns how many bytes all requests together keep from step to step."""
        with self._changed:
            return sum(seat.retained_bytes for seat in self._seats)

    def submit(
        self,
        seat: Seat,
        payload: Any,
        *,
        signature: Hashable,
        tokens: int,
        max_merged: int | None = None,
        model: Hashable = None,
    ) -> Future[Any]:
        """Queues a forward and returns a future of its result.

        Args:
            signature: forwards of equal signature may run as one.
            tokens: what the forward costs.
            max_merged: most forwards of this signature that may run as one, so that they fit into memory.
            model: the model that runs the forward.

        Raises `Cancelled`, `OutOfTime` or the error of `close`; the future its micro-batch's error too.
        """
        forward = Forward(seat, payload, ForwardSpec(signature, tokens, max_merged, model))
        with self._changed:
            if self._closing_error is not None:
                raise self._closing_error
            if seat.state is SeatState.ENDED:
                raise Cancelled("the request has ended")
            if late := self._late(seat.request):
                raise late
            if seat in self._open:
                raise RuntimeError("a seat has one open forward at a time: wait for it, or join() once more")
            seat.wait(forward.spec, self._clock())
            self._open[seat] = forward
            self._changed.notify_all()
        return forward.result

    def cancel(self, seat: Seat) -> None:
        """Makes the request's open forwards and any later one raise `Cancelled`; drops results of running ones."""
        with self._changed:
            for one in (seat, *seat.extra_seats):
                one.state = SeatState.ENDED
                if forward := self._open.pop(one, None):
                    forward.result.set_exception(Cancelled("the request was cancelled"))
            self._changed.notify_all()

    def leave(self, seat: Seat) -> None:
        """Frees the seat and its extra seats, however the request ended."""
        with self._changed:
            self.cancel(seat)
            if seat in self._seats:
                self._order.remove(seat)
            self._seats.difference_update((seat, *seat.extra_seats))
            self._admission.leave(seat)
            self._refuse_and_admit()

    # Rank 0's side.

    def take(self) -> MicroBatch:
        """Blocks until a micro-batch should run. Raises the error that the queue was closed with."""
        with self._changed:
            while self._closing_error is None:
                batch, wait_s = self._next_batch()
                if batch or (self._has_idle_to_tell and not self._seats):
                    return self._start(batch)
                self._changed.wait(wait_s)
            raise self._closing_error

    def finish(self, batch_id: int, results: Sequence[Any]) -> None:
        """Gives each forward of the micro-batch its result; results are in the order of the payloads."""
        with self._changed:
            size = self._in_flight.size(batch_id)
            if len(results) != size:
                raise ValueError(f"micro-batch {batch_id}: got {len(results)} results for {size} payloads")
            for i, forward in self._end(batch_id):
                forward.result.set_result(results[i])

    def fail(self, batch_id: int, error: BaseException) -> None:
        """Makes the forwards of this micro-batch, and no others, raise the error."""
        with self._changed:
            for _, forward in self._end(batch_id):
                forward.result.set_exception(error)

    def retry_alone(self, batch_id: int) -> None:
        """Queues each forward of the micro-batch to run again alone, because together they exceeded the memory."""
        with self._changed:
            for forward in self._in_flight.end(batch_id)[0]:
                if self._open.get(forward.seat) is forward:
                    alone = replace(forward.spec, max_merged=1)
                    self._open[forward.seat] = replace(forward, spec=alone)  # keeps its place
                    forward.seat.wait(alone, self._clock())
            self._changed.notify_all()

    def close(self, error: BaseException) -> None:
        """Makes every open forward, any later one, and `take` raise the error. Only the first call counts."""
        with self._changed:
            self._closing_error = self._closing_error or error
            for forward in self._open.values():
                forward.result.set_exception(self._closing_error)
            for seat in self._admission.waiting:
                self._admission.refuse(seat, self._closing_error)
            self._open.clear()
            self._changed.notify_all()

    def stats(self) -> StepQueueStats:
        with self._changed:
            states = Counter(seat.state for seat in self._open)
            return StepQueueStats(
                num_seats=sum(not seat.is_extra for seat in self._seats),
                num_waiting=states[SeatState.WAITING],
                num_running=states[SeatState.RUNNING],
                load=sum(1 / self._choice.limits.size(seat.latest) for seat in self._seats) / self.depth,
                batch_sizes=dict(self._in_flight.sizes),
                queue_wait_s=self._in_flight.queue_wait_s,
                num_waiting_requests=len(self._admission.waiting),
                num_out_of_time=self._num_out_of_time,
            )

    # What happens to a forward, under the lock: choose, start, end.

    def _next_batch(self) -> NextBatch:
        if len(self._in_flight) >= self.depth:
            return NextBatch([])
        self._end_late()
        waiting = [forward for seat, forward in self._open.items() if seat.state is SeatState.WAITING]
        return self._choice.next_batch(waiting, self._clock())

    def _start(self, batch: list[Forward]) -> MicroBatch:
        now = self._clock()
        if batch:
            self._slices.start(batch[0].spec.model, now)
        self._has_idle_to_tell = self._tells_idle and bool(batch)
        batch_id = self._in_flight.start(batch, now)
        return MicroBatch(batch_id, tuple(forward.payload for forward in batch))

    def _end(self, batch_id: int) -> list[tuple[int, Forward]]:
        """Ends a micro-batch; returns its forwards that are still open, each with its index in the micro-batch."""
        now, (batch, started_at) = self._clock(), self._in_flight.end(batch_id)
        self._step_times.end(batch, started_at, now)
        ended = [(i, forward) for i, forward in enumerate(batch) if self._open.pop(forward.seat, None)]
        for _, forward in ended:
            forward.seat.enter(SeatState.STEPPING, now)
        self._admission.refuse_late(self._late)
        self._changed.notify_all()
        return ended

    # Deadlines, and requests that wait to start; under the lock.

    def _refuse_and_admit(self) -> None:
        self._admission.refuse_late(self._late)
        self._admission.admit()

    def _end_late(self) -> None:
        """Ends late requests whose forwards wait."""
        for seat, forward in list(self._open.items()):
            if seat.state is SeatState.WAITING and (late := self._late(seat.request)):
                del self._open[seat]
                seat.state = seat.request.state = SeatState.ENDED
                forward.result.set_exception(late)

    def _late(self, seat: Seat) -> OutOfTime | None:
        """Returns the error for a request that cannot be done in time, else None."""
        late = self._step_times.late(seat, self._clock())
        self._num_out_of_time += late is not None
        return late
