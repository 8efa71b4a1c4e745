"""The unfinished work of one model, how long it will take, and which requests are refused because of it.

Requests share the time of the stages that serve them, step by step, so a new request waits for at most as much of
each other request as it takes itself. A user with many requests waits mostly for these: the queue gives every user
an equal part (`deployments/engine/order.py`), so a user waits for no more of any other user's work than the user's
own work there amounts to. A request is refused for its time only if its size was measured recently.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from deployments.engine.order import WEIGHTS
from deployments.options.qos import DEFAULT_QOS, Priority, Qos
from deployments.request import GenerationRequest
from serve_app.errors import DeadlineUnmeetable, Overloaded
from serve_app.flow.events import Picture
from serve_app.load.picture_times import FORGET_S, PictureTimes

HEADROOM = 0.8
"""Share of its deadline that a request may be expected to take: forecasts are inexact."""


Party = tuple[Priority, str]
"""Priority and user: requests of one party share a part of the device."""


@dataclass(frozen=True)
class Load:
    """Unfinished images, and the seconds of work that they take of the stages that serve them."""

    num_pictures: int = 0
    work_s: float = 0.0
    num_ingresses: int = 1
    """Number of ingresses that these images belong to."""
    by_party: Mapping[Party, float] = field(default_factory=dict, compare=False)
    """Parts of work_s by party."""

    def __add__(self, other: "Load") -> "Load":
        return Load(
            self.num_pictures + other.num_pictures,
            self.work_s + other.work_s,
            self.num_ingresses + other.num_ingresses,
            Counter(self.by_party) + Counter(other.by_party),
        )


NO_LOAD = Load(num_ingresses=0)


@dataclass(eq=False)
class Taken:
    """One request in progress, with its unfinished images by index."""

    pictures: dict[int, GenerationRequest]
    began_s: float
    expected_s: float | None
    """Expected seconds from its start to its end; None if unknown."""
    shared_before: float
    """Image-seconds that `Backlog` had counted when the request started."""
    party: Party
    _backlog: "Backlog" = field(repr=False)

    def done(self, index: int, picture: Picture) -> None:
        self._backlog.note_done(self, index, picture)


class Backlog:
    """The backlog of one model at one ingress."""

    def __init__(
        self, others: Callable[[], Load] = lambda: NO_LOAD, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """others: returns the load of the other ingresses, as last reported."""
        self._others, self._clock = others, clock
        self._picture_times = PictureTimes()
        self._taken: set[Taken] = set()
        self._shared = 0.0
        self._counted_at = clock()

    @property
    def load(self) -> Load:
        """The load of this ingress."""
        by_party: dict[Party, float] = defaultdict(float)
        for taken in self._taken:
            by_party[taken.party] += sum(map(self._picture_times.guess_s, taken.pictures.values()))
        num_pictures = sum(len(taken.pictures) for taken in self._taken)
        return Load(num_pictures, sum(by_party.values()), 1, by_party)

    @property
    def queue_s(self) -> float:
        """Seconds of work at all ingresses."""
        return self.load.work_s + self._likely_others().work_s

    def place_free_s(self) -> float | None:
        """Returns the seconds until the first request in progress here should end; None if unknown."""
        now = self._clock()
        ends = [each.began_s + each.expected_s for each in self._taken if each.expected_s is not None]
        return max(0.0, min(ends) - now) if ends else None

    def check(
        self,
        requests: Sequence[GenerationRequest],
        timeout_s: float,
        max_queue_s: float | None = None,
        qos: Qos = DEFAULT_QOS,
    ) -> None:
        """Raises Overloaded if more than max_queue_s of work is ahead, and DeadlineUnmeetable if the images would
        not be done within timeout_s."""
        ahead_s = self._ahead_s(sum(map(self._picture_times.guess_s, requests)), _party(qos))
        if max_queue_s is not None and ahead_s > max_queue_s:
            raise Overloaded(
                f"{ahead_s:.3g} s of work are ahead; the limit (limits.max_queue_s) is {max_queue_s:g} s",
                ahead_s - max_queue_s,
            )
        if timeout_s <= 0:  # the deadline has passed, which is reported as such elsewhere
            return
        alone_s, expected_s = self._alone_s(requests), self._expected_s(requests, _party(qos))
        if alone_s is None or expected_s is None:
            return
        is_behind = expected_s > alone_s and expected_s > timeout_s * HEADROOM
        if alone_s <= timeout_s and not is_behind:
            return
        if alone_s > timeout_s:
            raise DeadlineUnmeetable(
                f"this request alone takes about {alone_s:.3g} s; its deadline is {timeout_s:g} s: ask for fewer "
                "steps, pixels, frames or images, or for a later deadline",
                FORGET_S,
            )
        raise DeadlineUnmeetable(
            f"this request would take about {expected_s:.3g} s, because {ahead_s:.3g} s of work are ahead; its "
            f"deadline is {timeout_s:g} s: try again later, or with a later deadline",
            expected_s - timeout_s * HEADROOM,
        )

    @contextmanager
    def taken(self, requests: Sequence[GenerationRequest], qos: Qos = DEFAULT_QOS) -> Iterator[Taken]:
        """Context around an admitted request."""
        self._count()
        pictures, party = dict(enumerate(requests)), _party(qos)
        expected_s = self._expected_s(requests, party)
        taken = Taken(pictures, self._clock(), expected_s, self._shared, party, self)
        self._taken.add(taken)
        try:
            yield taken
        finally:
            self._count()
            self._taken.discard(taken)
            self._note_undone(taken)

    def note_done(self, taken: Taken, index: int, picture: Picture) -> None:
        self._count()
        request = taken.pictures.pop(index, None)
        now = self._clock()
        life_s = now - taken.began_s
        if request is None or life_s <= 0:
            return
        self._picture_times.note(
            request,
            took_s=max(0.0, life_s - picture.wake_ms / 1e3),
            denoise_s=picture.denoised.denoise_ms / 1e3,
            num_sharing=(self._shared - taken.shared_before) / life_s,
            now=now,
        )

    def _note_undone(self, taken: Taken) -> None:
        """Records that the unfinished images take at least the time so far, so that missed deadlines are learned
        from too."""
        life_s = self._clock() - taken.began_s
        for request in taken.pictures.values() if life_s > 0 else ():
            sharing = (self._shared - taken.shared_before) / life_s
            self._picture_times.note_undone(request, life_s, num_sharing=sharing, now=self._clock())

    def _likely_others(self) -> Load:
        """Returns the likely load of the other ingresses. The last report may be a second old, so each is assumed
        to have at least this ingress's load, because Serve spreads requests evenly."""
        heard, own = self._others(), self.load
        num = heard.num_ingresses
        by_party = Counter(heard.by_party) | Counter({party: num * s for party, s in own.by_party.items()})
        return Load(
            max(heard.num_pictures, num * own.num_pictures), max(heard.work_s, num * own.work_s), num, by_party
        )

    def _alone_s(self, requests: Sequence[GenerationRequest]) -> float | None:
        known = [self._picture_times.known_s(each, self._clock()) for each in requests]
        return None if None in known else sum(each for each in known if each is not None)

    def _expected_s(self, requests: Sequence[GenerationRequest], party: Party) -> float | None:
        """Returns the seconds until the last of these requests would be done if they came now; None if unknown."""
        own_s = self._alone_s(requests)
        if own_s is None:
            return None
        each_s = own_s / len(requests)
        ahead = [
            min(self._picture_times.guess_s(other), each_s)
            for taken in self._taken
            if taken.party == party
            for other in taken.pictures.values()
        ]
        elsewhere = self._likely_others()
        typical_s = elsewhere.work_s / elsewhere.num_pictures if elsewhere.num_pictures else 0.0
        passed = min(1.0, each_s / typical_s) if typical_s else 0.0
        own_s += sum(ahead) + passed * (elsewhere.work_s - _sum_of_rivals(elsewhere, party))
        return own_s + self._rivals_s(own_s, party)

    def _ahead_s(self, own_s: float, party: Party) -> float:
        """Returns the work that is done before all of the party's present work and this new work is done."""
        total = self.load + self._likely_others()
        mine_s = total.work_s - _sum_of_rivals(total, party)
        return mine_s + self._rivals_s(mine_s + own_s, party)

    def _rivals_s(self, own_s: float, party: Party) -> float:
        """Returns the work of other parties that is done while this party gets own_s."""
        total = self.load + self._likely_others()
        return sum(
            min(work_s, own_s * WEIGHTS[rival[0]] / WEIGHTS[party[0]])
            for rival, work_s in total.by_party.items()
            if rival != party
        )

    def _count(self) -> None:
        """Adds up images times seconds, at all ingresses, up to now."""
        now = self._clock()
        num = sum(len(taken.pictures) for taken in self._taken) + self._others().num_pictures
        self._shared += num * (now - self._counted_at)
        self._counted_at = now


def _party(qos: Qos) -> Party:
    return qos.priority, qos.share


def _sum_of_rivals(load: Load, party: Party) -> float:
    return sum(work_s for rival, work_s in load.by_party.items() if rival != party)
