"""What each key has used, and whether it may have more. Pure: who asks tells the time, in seconds since 1970."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from math import ceil

from serve_app.auth.keys import KeyLimits, Period
from serve_app.errors import OverBudget, OverLimit

MINUTE_S = 60.0
LEASE_S = 15.0
"""A request in progress is one as long as somebody says so: whoever counted it may have died with it."""
TYPICAL_S = 5.0
"""Of a request, before a key's first has ended."""
_NEWS = 0.2
"""The share of the last request in what is typical."""
_ROUNDING = 1e-9


class RequestWindow:
    """When the requests of the last minute came."""

    def __init__(self) -> None:
        self._times: deque[float] = deque()

    def wait_s(self, limit: int, now: float) -> float:
        """Until one more makes no more than `limit` in any minute."""
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


class Leases:
    """The requests of one key that are in progress."""

    def __init__(self) -> None:
        self._by_id: dict[str, Lease] = {}
        self._typical_s = TYPICAL_S

    def wait_s(self, limit: int, now: float) -> float:
        """0, or a guess at when the oldest will have ended, by how long others took."""
        self._by_id = {i: lease for i, lease in self._by_id.items() if lease.seen_s > now - LEASE_S}
        if len(self._by_id) < limit:
            return 0.0
        oldest = min(lease.began_s for lease in self._by_id.values())
        return max(1.0, self._typical_s - (now - oldest))

    def renew(self, lease_id: str, now: float) -> None:
        """One that is not known is new, or was counted by who has died."""
        self._by_id.setdefault(lease_id, Lease(now, now)).seen_s = now

    def release(self, lease_id: str, now: float) -> None:
        lease = self._by_id.pop(lease_id, None)
        if lease is not None:
            self._typical_s += _NEWS * (now - lease.began_s - self._typical_s)


@dataclass(frozen=True)
class Spent:
    """In one period of the calendar."""

    began: str
    """ISO 8601, UTC."""
    megapixel_steps: float


@dataclass
class Account:
    """All that is counted of one key."""

    window: RequestWindow = field(default_factory=RequestWindow)
    leases: Leases = field(default_factory=Leases)


class Ledger:
    """The accounts of all keys, by their names."""

    def __init__(self, spent: Mapping[str, Spent] | None = None) -> None:
        self._accounts: dict[str, Account] = {}
        self.spent = dict(spent or {})

    def admit(self, name: str, limits: KeyLimits, lease_id: str, now: float) -> OverLimit | None:
        """Counts one more request, or tells why not."""
        account = self._account(name)
        per_minute, at_once = limits.requests_per_minute, limits.max_concurrent_requests
        if per_minute is not None and (wait_s := account.window.wait_s(per_minute, now)):
            return OverLimit(f"the key {name!r} may ask {per_minute} times a minute", ceil(wait_s))
        if at_once is not None and (wait_s := account.leases.wait_s(at_once, now)):
            return OverLimit(f"the key {name!r} may have {at_once} requests in progress at once", ceil(wait_s))
        if per_minute is not None:
            account.window.note(now)
        if at_once is not None:
            account.leases.renew(lease_id, now)
        return None

    def renew(self, lease_ids: Iterable[tuple[str, str]], now: float) -> None:
        """lease_ids: of requests that are in progress still, each with its key's name."""
        for name, lease_id in lease_ids:
            self._account(name).leases.renew(lease_id, now)

    def release(self, name: str, lease_id: str, now: float) -> None:
        self._account(name).leases.release(lease_id, now)

    def charge(self, name: str, limits: KeyLimits, megapixel_steps: float, now: float) -> OverBudget | None:
        """Takes it off the budget, or tells why not. A negative one is given back."""
        budget, period = limits.budget_megapixel_steps, limits.budget_period
        if budget is None:
            return None
        began, ends = bounds(period, now)
        before = self.spent.get(name)
        used = before.megapixel_steps if before is not None and before.began == began.isoformat() else 0.0
        if megapixel_steps > 0 and used + megapixel_steps > budget * (1 + _ROUNDING):
            asked = f"this request costs {megapixel_steps:g} megapixel-steps, and the key {name!r}"
            if megapixel_steps > budget:
                why = (
                    f"{asked} has {budget:g} for a whole {period}: ask for fewer pixels, frames, steps or pictures"
                )
            else:
                why = f"{asked} has used {used:g} of its {budget:g} of this {period}"
            return OverBudget(
                f"{why}; the next {period} begins at {ends:%Y-%m-%dT%H:%MZ}", ceil(ends.timestamp() - now)
            )
        self.spent[name] = Spent(began.isoformat(), max(0.0, used + megapixel_steps))
        return None

    def _account(self, name: str) -> Account:
        return self._accounts.setdefault(name, Account())


def bounds(period: Period, now: float) -> tuple[datetime, datetime]:
    """When it began, and when the next will, in UTC."""
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
