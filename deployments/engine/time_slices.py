"""Time slices: which model's forwards may run next if only one model at a time is on the device.

Changes are kept rare, because each moves all weights of a model.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence

from deployments.engine.seat import Forward, Seat

Groups = Mapping[Hashable, Sequence[Forward]]
"""Waiting forwards by signature, the oldest first."""

STEP_WAIT_S = 0.1
"""How long to wait for a request in its scheduler step, after its last forward."""


class TimeSlices:
    """Gives a model the device while it has work, for at most `time_slice_s` if another waits. 0: no slices."""

    def __init__(self, time_slice_s: float) -> None:
        self._time_slice_s = time_slice_s
        self._model: Hashable = None
        self._until = 0.0

    def start(self, model: Hashable, now: float) -> None:
        """Notes that a micro-batch of this model starts."""
        if model != self._model:
            self._model, self._until = model, now + self._time_slice_s

    def of(self, groups: Groups, seats: Iterable[Seat], now: float) -> tuple[Groups, float | None]:
        """Returns the groups that may go now, and when to ask again for the others (None: there are no others)."""
        own = {signature: group for signature, group in groups.items() if group[0].spec.model == self._model}
        if not self._time_slice_s or len(own) == len(groups) or now >= self._until:
            return groups, None
        if own:
            return own, self._until
        if any(seat.wants(self._model, since=now - STEP_WAIT_S) for seat in seats):
            return {}, min(self._until, now + STEP_WAIT_S)
        return groups, None
