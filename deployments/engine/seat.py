"""Seats of the step queue, and the forwards of the requests that have them."""

import math
from collections.abc import Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from deployments.engine.demand import UNKNOWN, Demand


class SeatState(Enum):
    NEW = auto()
    WAITING = auto()
    RUNNING = auto()
    STEPPING = auto()
    ENDED = auto()


@dataclass(frozen=True)
class ForwardSpec:
    """What the queue knows of a forward, for merging and timing."""

    signature: Hashable = None
    tokens: int = 0
    max_merged: int | None = None
    """Most forwards of this signature that may run as one, so that they fit into memory. None: any number."""
    model: Hashable = None
    """Which of several models runs the forward; equal for equal signatures."""


NO_FORWARD = ForwardSpec()


@dataclass(eq=False)
class Seat:
    """A request in the queue: its state, its latest forward, its progress. Guarded by the queue's lock."""

    state: SeatState = SeatState.NEW
    state_since_s: float = 0.0
    """When the seat entered this state, on the queue's clock. Not kept for NEW and ENDED."""
    latest: ForwardSpec = NO_FORWARD
    """The forward that waits or runs, or ran last. Has no tensors, so that it does not keep any alive."""
    successors: dict[Hashable, Hashable] = field(default_factory=dict)
    """The signature that last followed each signature: the two passes of true CFG may alternate between two text
    lengths."""
    extra_seats: list["Seat"] = field(default_factory=list)
    """Seats of the same request for forwards that it submits before it has used the result of the previous one."""
    owner: "Seat | None" = None
    """An extra seat's request; None: this is the request's own seat."""
    demand: Demand = UNKNOWN
    deadline: float = math.inf
    """When the request is given up, on the queue's clock."""
    due: float = 0.0
    """When the request should be done, on the queue's clock; `order.py` sorts by it."""
    estimated_s: float = 0.0
    """Time of the request's own steps if nothing else ran, as estimated on its arrival."""
    num_done: int = 0
    """Number of steps that are done."""
    step_s: float = 0.0
    """Time that the request's forwards have run since the last step was done."""
    fastest_step_s: float = math.inf
    retained_bytes: int = 0
    """Bytes that the request keeps on the device from step to step, in addition to its forwards."""

    @property
    def is_extra(self) -> bool:
        return self.owner is not None

    @property
    def request(self) -> "Seat":
        """The request's own seat, which has its demand and progress."""
        return self.owner or self

    @property
    def left_s(self) -> float:
        """What is left of `estimated_s`."""
        num_own, num_left = self.demand.num_own_steps, self.demand.num_steps - self.num_done
        return self.estimated_s * min(1.0, num_left / num_own) if num_own else 0.0

    def enter(self, state: SeatState, now: float) -> None:
        self.state, self.state_since_s = state, now

    def wait(self, forward: ForwardSpec, now: float) -> None:
        """Notes that the seat's next forward waits."""
        if self.state is SeatState.STEPPING:
            self.successors[self.latest.signature] = forward.signature
        self.latest = forward
        self.enter(SeatState.WAITING, now)

    def is_coming_to(self, signature: Hashable) -> bool:
        """Returns whether the next forward is about to come and, judging by earlier ones, has this signature."""
        next_signature = self.successors.get(self.latest.signature, self.latest.signature)
        return self.state is SeatState.STEPPING and next_signature == signature

    def wants(self, model: Hashable, since: float) -> bool:
        """Returns whether its forward runs on this model, or ended there after `since`, so another may follow."""
        is_coming = self.state is SeatState.STEPPING and self.state_since_s > since
        return self.latest.model == model and (is_coming or self.state is SeatState.RUNNING)


@dataclass(frozen=True, eq=False)
class Forward:
    """One call of a denoiser."""

    seat: Seat
    payload: Any
    spec: ForwardSpec
    result: Future[Any] = field(default_factory=Future)


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Payloads of one signature that run as one; their results are due in the same order.

    A micro-batch without payloads says that the last seat has left.
    """

    id: int
    payloads: tuple[Any, ...]
