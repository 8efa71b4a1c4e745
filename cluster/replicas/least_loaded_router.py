"""Routes a long request to the replica with the fewest requests, by asking the replicas each time.

Serve's own router caches for ten seconds how many requests a replica has, and does not learn of requests that
other ingresses send there. Of two requests that come through two ingresses, both would go to one replica every
other time, and the other replica's device would be idle for as long as they take.
"""

import random
import time
from collections import defaultdict, deque
from typing import Any

from ray.serve._private.request_router import PowerOfTwoChoicesRequestRouter

MAX_ASKED = 8
"""Number of replicas asked per request; if there are more, this many are chosen at random."""
UNDER_WAY_S = 10.0
"""A request that a replica has not confirmed for this long was not sent, or is lost."""


class LeastLoadedRouter(PowerOfTwoChoicesRequestRouter):  # type: ignore[misc]
    """Sends a request to the replica with the fewest requests. Asking takes some milliseconds, which is little for
    requests of seconds. Everything else is Serve's."""

    queue_len_response_deadline_s = 1.0
    """Above Serve's 0.1 s, because skipping a slow replica costs more than waiting for it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._chosen_at: dict[Any, deque[float]] = defaultdict(deque)
        """Times at which unconfirmed requests were sent, by replica: the replica may not count them yet."""

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any | None = None
    ) -> list[list[Any]]:
        candidates = list(candidate_replicas)
        return [random.sample(candidates, min(MAX_ASKED, len(candidates)))] if candidates else []

    async def _select_from_candidate_replicas(self, candidates: list[Any], backoff_index: int) -> Any | None:
        if len(candidates) == 1:  # nothing to compare: Serve's cache suffices
            return await super()._select_from_candidate_replicas(candidates, backoff_index)
        loads = {
            replica.replica_id: length + self._num_under_way(replica.replica_id)
            for replica, length in await self._probe_queue_lens(candidates, backoff_index)
            if length is not None and length < replica.max_ongoing_requests
        }
        present = loads.keys() & self._replicas.keys()
        if not present:
            return None
        least = min(present, key=lambda replica_id: (loads[replica_id], random.random()))
        self._chosen_at[least].append(time.monotonic())
        return self._replicas[least]

    def on_new_queue_len_info(self, replica_id: Any, num_ongoing_requests: int) -> None:
        """Called when a replica has confirmed or rejected a request."""
        super().on_new_queue_len_info(replica_id, num_ongoing_requests)
        if chosen_at := self._chosen_at.get(replica_id):
            chosen_at.popleft()

    def _num_under_way(self, replica_id: Any) -> int:
        chosen_at, since = self._chosen_at[replica_id], time.monotonic() - UNDER_WAY_S
        while chosen_at and chosen_at[0] < since:
            chosen_at.popleft()
        return len(chosen_at)

    def update_replicas(self, replicas: list[Any]) -> None:
        super().update_replicas(replicas)
        for gone in self._chosen_at.keys() - self._replicas.keys():
            del self._chosen_at[gone]
