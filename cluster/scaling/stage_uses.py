"""The stages that autoscale, as Serve's controller sees them: which may grow, and which gives way to which."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from cluster.scaling.balance import balance, rate
from cluster.scaling.free_resources import Claim, ClusterSnapshot, FreeResources

Key = tuple[str | None, str]
"""Application and deployment."""

HEARD_S = 5.0
"""Serve calls a stage's policy several times a second, unless the stage has no replica or is gone."""
RELEASE_S = 5.0
"""After one stage has given way, no other does for this long: a replica takes a moment to end, and the waiting
process to be placed."""
ASKED_S = 2.0
"""Time until the replicas that a stage has asked for appear in the cluster's free or pending resources."""
REFUSED_S = 60.0
"""How long a stage asks for nothing after its last replica found no room although there seemed to be some."""


@dataclass
class StageUse:
    """The latest state of one stage, as its policy reported it."""

    claim: Claim
    request_s: float
    """Seconds that a request takes one replica."""
    is_auto: bool
    """Whether the cluster's resources are the only bound on its replicas."""
    fewest: int = 1
    num_ready: int = 0
    num_wanted: int = 0
    target: int = 0
    """Number of replicas that Serve keeps at present."""
    is_starved: bool = False
    """Whether it wants more replicas and there is no room."""
    heard_s: float = -math.inf
    asked: list[tuple[float, int]] = field(default_factory=list)
    """When it grew, and by how many replicas."""
    refused_until_s: float = -math.inf

    @property
    def rate(self) -> float:
        return rate(self.target, self.request_s)

    def note(self, now_s: float, target: int, num_ready: int, fewest: int) -> None:
        """Records what Serve reports about the stage."""
        self.asked = [(at_s, number) for at_s, number in self.asked if now_s - at_s < ASKED_S]
        if target > self.target:
            self.asked.append((now_s, target - self.target))
        self.target, self.num_ready, self.fewest, self.heard_s = target, num_ready, fewest, now_s


class StageUses:
    """The stages of all applications, which share the cluster."""

    def __init__(self) -> None:
        self._stages: dict[Key, StageUse] = {}
        self._shapes: set[frozenset[tuple[str, float]]] = set()
        self.released_s = -math.inf
        """When a stage last gave way."""

    def join(self, key: Key, use: StageUse, shapes: Collection[Mapping[str, float]]) -> StageUse:
        """Adds or replaces a stage: Serve recreates its policy now and then.

        shapes: resources of a process, for each stage of the app, including stages that never scale.
        """
        self._stages[key] = use
        self._shapes |= {_shape(each) for each in shapes}
        return use

    def grant(self, key: Key, snapshot: ClusterSnapshot, now_s: float) -> int:
        """Returns how many of the replicas that it wants the stage may have. The answer does not depend on which
        stage asks first.

        Where nodes are added on demand, it gets all of them, because replicas without room make Ray add nodes.
        """
        use = self._stages[key]
        use.is_starved = False
        if not use.is_auto or use.num_wanted <= use.target:
            return use.num_wanted
        if now_s < use.refused_until_s:
            return use.target
        if snapshot.has_autoscaler:
            return use.num_wanted
        granted = self._share_out(snapshot, now_s)[key]
        use.is_starved = granted == use.target
        return granted

    def _share_out(self, snapshot: ClusterSnapshot, now_s: float) -> dict[Key, int]:
        """Shares the free resources among all stages that want more, after subtracting what waits and what was
        just asked for."""
        free = FreeResources(snapshot.nodes)
        current = self._current(now_s)
        for claim in [
            *(Claim(each) for each in snapshot.unplaced),
            *(of.claim for of in current.values() for _, number in of.asked for _ in range(number)),
        ]:
            free.take(claim)
        growing = {k: of for k, of in current.items() if of.is_auto and now_s >= of.refused_until_s}
        return balance(
            {k: of.target for k, of in growing.items()},
            {k: of.request_s for k, of in growing.items()},
            {k: of.num_wanted for k, of in growing.items()},
            lambda k: free.take(growing[k].claim),
        )

    def gives_way(self, key: Key, waiting: Collection[Mapping[str, float]], now_s: float) -> bool:
        """Whether this stage must give up one replica at once, for a waiting process of these applications or for
        a slower stage.

        waiting: resources of each process that has waited long enough.
        """
        if now_s - self.released_s < RELEASE_S:
            return False
        current = self._current(now_s)
        can_give = {k: of for k, of in current.items() if of.is_auto and of.target > max(1, of.fewest)}
        names = {name for each in waiting if _shape(each) in self._shapes for name in each}
        giving = [k for k, of in can_give.items() if not names.isdisjoint(of.claim.resources)]
        giver = max(giving, key=lambda k: can_give[k].rate, default=None) or _too_fast(can_give, current)
        if giver != key:
            return False
        self.released_s = now_s
        use = can_give[key]
        if use.target > use.num_ready:
            use.refused_until_s = now_s + REFUSED_S
        return True

    def _current(self, now_s: float) -> dict[Key, StageUse]:
        """Returns the stages that still exist."""
        return {k: of for k, of in self._stages.items() if now_s - of.heard_s < HEARD_S}


shared = StageUses()
"""The stages of this process, Serve's controller."""


def _too_fast(can_give: Mapping[Key, StageUse], current: Mapping[Key, StageUse]) -> Key | None:
    """Returns the fastest stage, if with one replica less it does more than the slowest starved stage with one
    more."""
    slowest = min((of for of in current.values() if of.is_starved), key=lambda of: of.rate, default=None)
    if slowest is None or not can_give:
        return None
    fastest = max(can_give, key=lambda k: can_give[k].rate)
    giver = can_give[fastest]
    is_worth_it = rate(giver.target - 1, giver.request_s) >= rate(slowest.target + 1, slowest.request_s)
    takes_same = not slowest.claim.resources.keys().isdisjoint(giver.claim.resources)
    return fastest if is_worth_it and takes_same else None


def _shape(resources: Mapping[str, float]) -> frozenset[tuple[str, float]]:
    return frozenset((name, round(amount, 4)) for name, amount in resources.items() if amount)
