"""Routes a long request to the replica with the fewest requests, by asking the replicas each time.

Serve's own router caches for ten seconds how many requests a replica has, and does not learn of requests that
other ingresses send there. Of two requests that come through two ingresses, both would go to one replica every
other time, and the other replica's device would be idle for as long as they take.
"""

import random
import time
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

from ray.serve._private.request_router import PowerOfTwoChoicesRequestRouter

MAX_ASKED = 8
"""Number of replicas asked per request; if there are more, this many are chosen at random."""
UNDER_WAY_S = 10.0
"""A request that a replica has not confirmed for this long was not sent, or is lost."""


@dataclass
class ReplicaLoad:
    """What this router knows of one replica's requests: its own exactly, others' from the replica's replies."""

    confirmed: int = 0
    """This router's requests that the replica has accepted and not ended."""
    sent_at: deque[float] = field(default_factory=deque)
    """When this router's unconfirmed requests were sent. The replica may or may not count them yet."""
    others: int = 0
    """Other routers' requests, as far as known."""

    def update(self, num_ongoing: int, now: float) -> int:
        """Returns how many requests the replica has, given a reply with the number that it counts.

        What the reply counts beyond `confirmed` are others' requests and some of the unconfirmed. Of what this
        allows, `others` becomes the number nearest to the one known before.
        """
        while self.sent_at and self.sent_at[0] < now - UNDER_WAY_S:
            self.sent_at.popleft()
        own = self.confirmed + len(self.sent_at)
        self.others = max(min(self.others, num_ongoing - self.confirmed), num_ongoing - own, 0)
        return self.others + own


class LeastLoadedRouter(PowerOfTwoChoicesRequestRouter):  # type: ignore[misc]
    """Sends a request to the replica with the fewest requests. Asking takes some milliseconds, which is little for
    requests of seconds. Everything else is Serve's."""

    queue_len_response_deadline_s = 1.0
    """Above Serve's 0.1 s, because skipping a slow replica costs more than waiting for it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loads: dict[Any, ReplicaLoad] = defaultdict(ReplicaLoad)
        """By replica ID."""

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any | None = None
    ) -> list[list[Any]]:
        candidates = list(candidate_replicas)
        return [random.sample(candidates, min(MAX_ASKED, len(candidates)))] if candidates else []

    async def _select_from_candidate_replicas(self, candidates: list[Any], backoff_index: int) -> Any | None:
        if len(candidates) == 1:  # nothing to compare: Serve's cache suffices
            return await super()._select_from_candidate_replicas(candidates, backoff_index)
        loads = {
            replica.replica_id: self._loads[replica.replica_id].update(length, time.monotonic())
            for replica, length in await self._probe_queue_lens(candidates, backoff_index)
            if length is not None and length < replica.max_ongoing_requests
        }
        present = loads.keys() & self._replicas.keys()
        if not present:
            return None
        least = min(present, key=lambda replica_id: (loads[replica_id], random.random()))
        self._loads[least].sent_at.append(time.monotonic())
        return self._replicas[least]

    def on_new_queue_len_info(self, replica_id: Any, num_ongoing_requests: int) -> None:
        """Called when a replica has confirmed or rejected a request."""
        super().on_new_queue_len_info(replica_id, num_ongoing_requests)
        if sent_at := self._loads[replica_id].sent_at:
            sent_at.popleft()

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        """Called when a replica has accepted a request."""
        super().on_request_routed(pending_request, replica_id, result)
        self._loads[replica_id].confirmed += 1

    def decrement_queue_len_cache(self, replica_id: Any) -> None:
        """Called when a request that a replica has accepted has ended, in whatever way."""
        super().decrement_queue_len_cache(replica_id)
        self._loads[replica_id].confirmed -= 1

    def update_replicas(self, replicas: list[Any]) -> None:
        super().update_replicas(replicas)
        for gone in self._loads.keys() - self._replicas.keys():
            del self._loads[gone]
