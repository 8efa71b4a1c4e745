"""What each key has used, and whether it may use more. Reads no clock: callers pass `now`, seconds since 1970."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from math import ceil

from serve_app.auth.keys import KeyLimits, Period
from serve_app.errors import OverBudget, OverLimit

MINUTE_S = 60.0
LEASE_S = 15.0
"""A request counts as in progress for this long after its last renewal, because its ingress may have died."""
TYPICAL_S = 5.0
"""Assumed duration of a key's requests until its first one has ended."""
COUNTED_S = 3600.0
"""A request that is not known to be answered may be repeated for this long; a repetition is not counted again."""
_NEWS = 0.2
"""Weight of the latest request in the moving average of durations."""
_ROUNDING = 1e-9


class RequestWindow:
    """Arrival times of the requests of the last minute."""

    def __init__(self) -> None:
        self._times: deque[float] = deque()

    def wait_s(self, limit: int, now: float) -> float:
        """Returns the seconds until one more request makes no more than `limit` in any minute."""
        while self._times and self._times[0] <= now - MINUTE_S:
            self._times.popleft()
        over = len(self._times) - limit
        return 0.0 if over < 0 else self._times[over] + MINUTE_S - now

    def note(self, now: float) -> None:
        self._times.append(now)


@dataclass
class Lease:
    """One request in progress."""

    began_s: float
    seen_s: float


class RequestLeases:
    """The requests of one key that are in progress."""

    def __init__(self) -> None:
        self._by_id: dict[str, Lease] = {}
        self._typical_s = TYPICAL_S

    def wait_s(self, limit: int, now: float) -> float:
        """Returns 0, or an estimate of the seconds until the oldest request ends, from how long others took."""
        self._by_id = {i: lease for i, lease in self._by_id.items() if lease.seen_s > now - LEASE_S}
        if len(self._by_id) < limit:
            return 0.0
        oldest = min(lease.began_s for lease in self._by_id.values())
        return max(1.0, self._typical_s - (now - oldest))

    def renew(self, lease_id: str, now: float) -> None:
        """Renews a lease. An unknown one is added: it is new, or was counted by a counter that has died."""
        self._by_id.setdefault(lease_id, Lease(now, now)).seen_s = now

    def release(self, lease_id: str, now: float) -> None:
        lease = self._by_id.pop(lease_id, None)
        if lease is not None:
            self._typical_s += _NEWS * (now - lease.began_s - self._typical_s)


@dataclass(frozen=True)
class Spent:
    """Megapixel-steps that a key has used in one calendar period."""

    began: str
    """Start of the period; ISO 8601, UTC."""
    megapixel_steps: float


@dataclass
class Counted:
    """What was counted for a request, which is repeated if its ingress dies before it has answered."""

    at: float
    megapixel_steps: float = 0.0


@dataclass
class Account:
    """Everything that is counted for one key."""

    window: RequestWindow = field(default_factory=RequestWindow)
    leases: RequestLeases = field(default_factory=RequestLeases)
    counted: dict[str, Counted] = field(default_factory=dict)
    """By request ID, until the request is answered; oldest first."""

    def count(self, request_id: str, now: float) -> Counted:
        while self.counted and (oldest := next(iter(self.counted.items())))[1].at <= now - COUNTED_S:
            del self.counted[oldest[0]]
        return self.counted.setdefault(request_id, Counted(now))


class Ledger:
    """The accounts of all keys, by key name."""

    def __init__(self, spent: Mapping[str, Spent] | None = None) -> None:
        self._accounts: dict[str, Account] = {}
        self.spent = dict(spent or {})

    def admit(self, name: str, limits: KeyLimits, request_id: str, now: float) -> OverLimit | None:
        """Counts one more request, or returns why it may not be made. A repeated request is not counted again."""
        account = self._account(name)
        per_minute, at_once = limits.requests_per_minute, limits.max_concurrent_requests
        if request_id in account.counted:
            if at_once is not None:
                account.leases.renew(request_id, now)
            return None
        if per_minute is not None and (wait_s := account.window.wait_s(per_minute, now)):
            return OverLimit(f"the key {name!r} may send {per_minute} requests a minute", ceil(wait_s))
        if at_once is not None and (wait_s := account.leases.wait_s(at_once, now)):
            return OverLimit(f"the key {name!r} may have {at_once} requests in progress at once", ceil(wait_s))
        if per_minute is not None:
            account.window.note(now)
        if at_once is not None:
            account.leases.renew(request_id, now)
        account.count(request_id, now)
        return None

    def renew(self, leases: Iterable[tuple[str, str]], now: float) -> None:
        """Renews the leases of requests that are still in progress. leases: (key's name, request ID) of each."""
        for name, request_id in leases:
            self._account(name).leases.renew(request_id, now)

    def release(self, name: str, request_id: str, now: float) -> None:
        """Notes that the request is answered, so that it will not be repeated."""
        account = self._account(name)
        account.leases.release(request_id, now)
        account.counted.pop(request_id, None)

    def charge(
        self, name: str, limits: KeyLimits, request_id: str, megapixel_steps: float, now: float
    ) -> OverBudget | float:
        """Takes a request's cost off the budget.

        Returns the megapixel-steps taken, 0 if the request was charged before; or why it cannot be charged.
        """
        budget, period = limits.budget_megapixel_steps, limits.budget_period
        counted = self._account(name).count(request_id, now)
        if budget is None or counted.megapixel_steps:
            return 0.0
        began, ends = bounds(period, now)
        used = self._used(name, began)
        if used + megapixel_steps > budget * (1 + _ROUNDING):
            asked = f"this request costs {megapixel_steps:g} megapixel-steps, but the key {name!r}"
            if megapixel_steps > budget:
                why = f"{asked} has {budget:g} for a whole {period}: ask for fewer pixels, frames, steps or images"
            else:
                why = f"{asked} has used {used:g} of its {budget:g} for this {period}"
            return OverBudget(
                f"{why}; the next {period} begins at {ends:%Y-%m-%dT%H:%MZ}", ceil(ends.timestamp() - now)
            )
        counted.megapixel_steps = megapixel_steps
        self.spent[name] = Spent(began.isoformat(), used + megapixel_steps)
        return megapixel_steps

    def give_back(
        self, name: str, limits: KeyLimits, megapixel_steps: float, charged_at: float, now: float
    ) -> None:
        """Returns a charge to the budget, unless the period in which it was made is over."""
        began, _ = bounds(limits.budget_period, now)
        if charged_at >= began.timestamp():
            self.spent[name] = Spent(began.isoformat(), max(0.0, self._used(name, began) - megapixel_steps))

    def _used(self, name: str, began: datetime) -> float:
        """Returns the megapixel-steps used in the period that started at `began`."""
        before = self.spent.get(name)
        return before.megapixel_steps if before is not None and before.began == began.isoformat() else 0.0

    def _account(self, name: str) -> Account:
        return self._accounts.setdefault(name, Account())


def bounds(period: Period, now: float) -> tuple[datetime, datetime]:
    """Returns the start of the current period and of the next, in UTC."""
    hour = datetime.fromtimestamp(now, UTC).replace(minute=0, second=0, microsecond=0)
    day = hour.replace(hour=0)
    if period == "hour":
        return hour, hour + timedelta(hours=1)
    if period == "day":
        return day, day + timedelta(days=1)
    if period == "week":
        monday = day - timedelta(days=day.weekday())
        return monday, monday + timedelta(weeks=1)
    first = day.replace(day=1)
    return first, (first + timedelta(days=31)).replace(day=1)
