"""Which model's forwards may go next where one at a time is on the device: a change moves all of its weights."""

from collections.abc import Hashable, Iterable, Mapping, Sequence

from deployments.engine.seat import Forward, Seat

Groups = Mapping[Hashable, Sequence[Forward]]
"""Waiting forwards by signature, the oldest first."""

BETWEEN_S = 0.1
"""For so long a request that has just landed is waited for, which is in its scheduler's step."""


class ModelTurns:
    """A model has the device while it has work, but for `turn_s` at most if another waits. 0: none takes turns."""

    def __init__(self, turn_s: float) -> None:
        self._turn_s = turn_s
        self._model: Hashable = None
        self._until = 0.0

    def take_off(self, model: Hashable, now: float) -> None:
        """Its forward takes off."""
        if model != self._model:
            self._model, self._until = model, now + self._turn_s

    def of(self, groups: Groups, seats: Iterable[Seat], now: float) -> tuple[Groups, float | None]:
        """(the groups that may go now, when to ask again for the others; None: they are all)"""
        own = {signature: group for signature, group in groups.items() if group[0].model == self._model}
        if not self._turn_s or len(own) == len(groups) or now >= self._until:
            return groups, None
        if own:
            return own, self._until
        if any(seat.wants(self._model, since=now - BETWEEN_S) for seat in seats):
            return {}, min(self._until, now + BETWEEN_S)
        return groups, None
