"""The deadline of one request: the client's own, or the server's limit."""

import time
from dataclasses import replace

from deployments.options.qos import Qos
from serve_app.errors import DeadlineExceeded


class RequestDeadline:
    """The deadline of one request, counted from the creation of this object."""

    def __init__(self, qos: Qos, timeout_s: float) -> None:
        """timeout_s: the server's limit; the client's own deadline may be sooner."""
        left_s = qos.left_s
        self._is_asked = left_s is not None and left_s <= timeout_s
        self.limit_s = timeout_s if left_s is None else min(left_s, timeout_s)
        self._asked, self._since = qos, time.monotonic()

    def qos(self) -> Qos:
        """Returns the request's Qos with the time that is left at this moment."""
        deadline_s = self._asked.waited_s + self.limit_s
        return replace(self._asked, deadline_s=deadline_s).after(time.monotonic() - self._since)

    def exceeded(self, why: str = "") -> DeadlineExceeded:
        """Returns the error that ends the request. why: the reason for ending it before the deadline."""
        ending = f": {why}" if why else ""
        if self._is_asked:
            asked = f"deadline_s ({self._asked.deadline_s:g} s)"
            return DeadlineExceeded(f"not done within {asked}{ending}", "deadline_s")
        return DeadlineExceeded(f"not done within request_timeout_s ({self.limit_s:g} s){ending}")
