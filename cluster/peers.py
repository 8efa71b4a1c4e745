"""The other replicas of a replica's own deployment, asked from its threads."""

from functools import cached_property
from typing import Any

from ray import serve


class Peers:
    """Whoever Serve finds least busy; this replica too may be asked."""

    def __init__(self, method: str, *, timeout_s: float) -> None:
        self._method, self._timeout_s = method, timeout_s

    def ask(self, *args: Any) -> Any:
        """Blocks; not for an event loop. Raises what the call raises, or TimeoutError."""
        answer = self._handle.remote(*args)
        try:
            return answer.result(timeout_s=self._timeout_s)
        except TimeoutError:
            answer.cancel()
            raise

    @cached_property
    def _handle(self) -> Any:
        """Serve knows this deployment once it has replicas."""
        own = serve.get_replica_context()
        return getattr(serve.get_deployment_handle(own.deployment, own.app_name), self._method)
