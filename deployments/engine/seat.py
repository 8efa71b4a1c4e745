"""Seats of the step queue, and what sits there: requests and their forwards."""

from collections.abc import Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any


class SeatState(Enum):
    NEW = auto()
    WAITING = auto()
    FLYING = auto()
    BETWEEN = auto()
    ENDED = auto()


@dataclass(eq=False)
class Seat:
    """A request's place in the queue. Only the queue writes to it."""

    state: SeatState = SeatState.NEW
    since: float = 0.0
    """When it began to wait, or landed, on the queue's clock."""
    signature: Hashable = None
    """Of its latest forward."""
    tokens: int = 0
    """Of its latest forward; 0 before the first."""
    at_most: int | None = None
    """Of its latest forward."""
    model: Hashable = None
    """Of its latest forward."""
    successors: dict[Hashable, Hashable] = field(default_factory=dict)
    """Which signature came after which: the two passes of true CFG may alternate between two text lengths."""
    passes: list["Seat"] = field(default_factory=list)
    """Seats of the same request for forwards that it asks for before it needs the one before."""
    is_pass: bool = False
    kept_bytes: int = 0
    """What the request keeps on the device from step to step, beside its forwards."""

    def is_coming_to(self, signature: Hashable) -> bool:
        """Is its next forward on the way and, going by its habits, of this signature?"""
        next_signature = self.successors.get(self.signature, self.signature)
        return self.state is SeatState.BETWEEN and next_signature == signature

    def wants(self, model: Hashable, since: float) -> bool:
        """Is its forward at this model, or the next on its way to it, having landed after `since`?"""
        is_coming = self.state is SeatState.BETWEEN and self.since > since
        return self.model == model and (is_coming or self.state is SeatState.FLYING)


@dataclass(frozen=True, eq=False)
class Forward:
    """One call of the transformer."""

    seat: Seat
    payload: Any
    signature: Hashable
    tokens: int
    at_most: int | None
    """How many of this signature may fly as one: there is memory for no more. None: any number."""
    model: Hashable = None
    """Which of several models computes it; equal for equal signatures."""
    result: Future[Any] = field(default_factory=Future)


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Payloads of one signature that run as one; their results are due in the same order.

    One without payloads tells that the last seat has left.
    """

    id: int
    payloads: tuple[Any, ...]
