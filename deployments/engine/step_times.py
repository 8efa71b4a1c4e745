"""Measures the times of steps and forwards, and derives when requests are due and which are too late."""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence

from deployments.engine.demand import Demand
from deployments.engine.order import STRETCH
from deployments.engine.seat import Forward, ForwardSpec, Seat
from deployments.engine.timings import MAX_KINDS, Timings
from deployments.errors import OutOfTime


class StepTimes:
    """A step queue's time measurements. Guarded by the queue's lock."""

    def __init__(self) -> None:
        self._steps = Timings(s_per_size=1.0)
        """Time that the forwards of one step take, by kind of request."""
        self._latencies = Timings(s_per_size=1e-6)
        """Time from start to end of a micro-batch, by signature."""
        self._batches = Timings(s_per_size=1e-6)
        """Device time of a micro-batch, by signature and size."""
        self._sizes: dict[Hashable, set[int]] = defaultdict(set)
        """Sizes of micro-batches that were seen, by signature."""
        self._costs = Timings(s_per_size=1e-6)
        """Device time of a micro-batch / its size, by signature."""
        self._last_end = -math.inf

    def seat(self, demand: Demand, now: float) -> Seat:
        """Returns a seat for a new request, with its deadline and due time."""
        qos = demand.qos
        deadline = math.inf if qos.left_s is None else now + qos.left_s
        estimated_s = demand.num_own_steps * self._steps.guess(demand.kind, size=demand.megapixels)
        due = min(deadline, now - qos.waited_s + STRETCH * estimated_s)
        return Seat(demand=demand, deadline=deadline, due=due, estimated_s=estimated_s)

    def advance(self, seat: Seat, num_done: int) -> None:
        """Notes that num_done of the request's steps are done."""
        took_s, seat.step_s = seat.step_s, 0.0
        if num_done == seat.num_done + 1 and took_s:
            seat.fastest_step_s = min(seat.fastest_step_s, took_s)
            if seat.demand.kind is not None:
                self._steps.note(seat.demand.kind, took_s, size=seat.demand.megapixels)
        seat.num_done = num_done

    def end(self, batch: Sequence[Forward], started_at: float, now: float) -> None:
        """Notes the times of a micro-batch that has ended."""
        if batch:
            first, latency_s = batch[0].spec, now - started_at
            self._latencies.note(first.signature, latency_s, size=first.tokens)
            device_s = now - max(started_at, self._last_end)
            self._batches.note((first.signature, len(batch)), device_s, size=0)
            if len(self._sizes) > MAX_KINDS:
                self._sizes.clear()
            self._sizes[first.signature].add(len(batch))
            self._costs.note(first.signature, device_s / len(batch), size=first.tokens)
            for forward in batch:
                if not forward.seat.is_extra:  # extra seats' forwards run at the same time as the request's own
                    forward.seat.step_s += latency_s
        self._last_end = now

    def latency_s(self, forward: ForwardSpec) -> float:
        """Returns the time from start to end of a micro-batch with this forward."""
        return self._latencies.guess(forward.signature, size=forward.tokens)

    def cost_s(self, forward: ForwardSpec) -> float:
        """Returns the device time of one such forward."""
        return self._costs.guess(forward.signature, size=forward.tokens)

    def batch_s(self, signature: Hashable, size: int) -> float | None:
        """Returns the device time of a micro-batch of this size; None: nothing is known.

        Interpolates linearly between the two nearest sizes that were measured, or extrapolates from them. If only
        one size was measured, the time is proportional to the size.
        """
        sizes = sorted(self._sizes.get(signature, ()))
        known = {n: took_s for n in sizes if (took_s := self._batches.known((signature, n))) is not None}
        if not known:
            return None
        smaller = {n: self._batches.fastest((signature, n)) for n in sizes if n < min(known)}
        seen = smaller | known
        near, *others = sorted(seen, key=lambda n: (abs(n - size), n))
        if near == size or not others:
            return seen[near] * size / near
        slope_s = max(0.0, (seen[others[0]] - seen[near]) / (others[0] - near))
        return max(0.0, seen[near] + slope_s * (size - near))

    def late(self, seat: Seat, now: float) -> OutOfTime | None:
        """Returns the error for a request that cannot be done in time, else None."""
        if seat.deadline == math.inf:
            return None
        left_s, takes_s = seat.deadline - now, self._takes_s(seat)
        if left_s > 0 and takes_s <= left_s:
            return None
        num_left = seat.demand.num_steps - seat.num_done
        return OutOfTime(
            f"the {num_left} steps that are left take at least {takes_s:.3g} s, but only {max(left_s, 0):.3g} s "
            "are left"
        )

    def _takes_s(self, seat: Seat) -> float:
        """Returns a lower bound of the time until the request's last step is done; 0 if nothing is known."""
        known_s = self._steps.known(seat.demand.kind)
        if not seat.num_done:
            return max(0.0, seat.demand.num_own_steps * (known_s or 0.0) - seat.step_s)
        step_s = min(seat.fastest_step_s, math.inf if known_s is None else known_s)
        if step_s == math.inf:
            return 0.0
        return max(0.0, (seat.demand.num_steps - seat.num_done) * step_s - seat.step_s)
