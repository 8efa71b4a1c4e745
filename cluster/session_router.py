"""Which replica calls of one session go to: the same for all, while it has room."""

import hashlib
from typing import Any

from ray.serve._private.request_router import PowerOfTwoChoicesRequestRouter


class SessionRouter(PowerOfTwoChoicesRequestRouter):  # type: ignore[misc]
    """Ranks a session's own replica first, by rendezvous hashing, and then those that Serve would try.

    So a replica that is full, silent or dead is passed over, and one that comes or goes moves its own sessions
    alone. Every process finds the same one. All else is Serve's.

    Serve's experimental ConsistentHashRouter, in Ray 2.60, loses calls: it knows those that wait by the id of the
    HTTP request behind them, and of several that one request makes at once (its prompts) answers the first alone.
    Here whatever waits stays in Serve's own queue, of which each round gives a replica to somebody.
    """

    queue_len_response_deadline_s = 0.5
    """For a replica of which nothing was heard for a while. Serve's 0.1 s are less than what it costs to pass one
    over that is slow to tell: another does its work anew."""

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any | None = None
    ) -> list[list[Any]]:
        ranks: list[list[Any]] = await super().choose_replicas(candidate_replicas, pending_request)
        session_id = pending_request and pending_request.metadata.session_id
        if not session_id or not candidate_replicas:
            return ranks
        own = max(candidate_replicas, key=lambda replica: _weight(session_id, replica.replica_id.unique_id))
        return [[own], *ranks]

    def _get_pending_request_matching_metadata(self, request_metadata: Any | None = None) -> Any | None:
        """The call that a replica was found for. Serve would give it to the one that has waited longest, whose own
        is another."""
        waiting = (call for call in self._pending_requests_to_fulfill if not call.future.done())
        return next((call for call in waiting if call.metadata is request_metadata), None)


def _weight(session_id: str, replica: str) -> bytes:
    return hashlib.sha256(f"{session_id} {replica}".encode()).digest()
