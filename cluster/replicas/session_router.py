"""Routes the calls of one session to the same replica, while that has room."""

import hashlib
from typing import Any

from cluster.replicas.least_loaded_router import LeastLoadedRouter


class SessionRouter(LeastLoadedRouter):
    """Ranks a session's own replica, chosen by rendezvous hashing, first, and then the replica with the fewest
    requests.

    So a replica that is full, silent or dead is skipped, and one that is added or removed moves only its own
    sessions. Every process chooses the same replica. Everything else is Serve's.

    Serve's experimental ConsistentHashRouter (Ray 2.60) loses calls: it identifies waiting calls by the ID of the
    HTTP request behind them, and of several calls that one request makes at once (one per prompt) it answers only
    the first. Here all waiting calls stay in Serve's own queue, and each routing round gives a replica to one of
    them.
    """

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any | None = None
    ) -> list[list[Any]]:
        ranks = await super().choose_replicas(candidate_replicas, pending_request)
        session_id = pending_request and pending_request.metadata.session_id
        if not session_id or not candidate_replicas:
            return ranks
        own = max(candidate_replicas, key=lambda replica: _weight(session_id, replica.replica_id.unique_id))
        return [[own], *ranks]

    def _get_pending_request_matching_metadata(self, request_metadata: Any | None = None) -> Any | None:
        """Returns the call that the replica was chosen for. Serve would give the replica to the call that has
        waited longest, whose own replica is a different one."""
        waiting = (call for call in self._pending_requests_to_fulfill if not call.future.done())
        return next((call for call in waiting if call.metadata is request_metadata), None)


def _weight(session_id: str, replica: str) -> bytes:
    return hashlib.sha256(f"{session_id} {replica}".encode()).digest()
