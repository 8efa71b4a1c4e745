"""Isolation of poison requests: a request that may be what kills a stage is served alone, so that no other request
is lost with it."""

from contextlib import AbstractAsyncContextManager

from serve_app.flow.node_lock import NodeLock


class PoisonIsolation:
    """Isolates requests that were present each time a stage was lost: one at a time across a node's ingress
    replicas."""

    def __init__(self, name: str) -> None:
        """name: of the served model; the same for all its ingress replicas."""
        self._lock = NodeLock(f"{name}.isolation")

    def held(self) -> AbstractAsyncContextManager[None]:
        """Context in which no other request of the model is isolated. Waiting requests enter in no particular
        order."""
        return self._lock.held()
