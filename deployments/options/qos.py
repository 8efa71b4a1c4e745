"""Quality of service of a request: its place among waiting requests. It does not affect the image."""

from dataclasses import dataclass, replace
from typing import Literal, Self

Priority = Literal["low", "normal", "high"]
OrderName = Literal["fair", "fifo"]
"""How waiting requests are ordered (`engine/order.py`)."""


@dataclass(frozen=True)
class Qos:
    """Quality of service of one request.

    Times are durations, because the clocks of nodes differ: each process that passes it on calls `after`.
    """

    priority: Priority = "normal"
    share: str = ""
    """The user whose share counts: the API key's name, or the user that the client names. Empty: all requests
    without either count as one user's."""
    deadline_s: float | None = None
    """Seconds after its acceptance when the request is given up; None: never."""
    waited_s: float = 0.0
    """Seconds since the request was accepted."""

    @property
    def left_s(self) -> float | None:
        """Seconds until the deadline; None without one."""
        return None if self.deadline_s is None else max(0.0, self.deadline_s - self.waited_s)

    def asked_by(self, key: str | None) -> Self:
        """Returns a copy for an API key's name, which overrides the user that the client names. None: no key."""
        return self if key is None else replace(self, share=key)

    def after(self, passed_s: float) -> Self:
        """Returns a copy as of `passed_s` seconds later."""
        return replace(self, waited_s=self.waited_s + passed_s)


DEFAULT_QOS = Qos()
