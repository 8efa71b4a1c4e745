"""Who may be what kills a stage is served alone: then it is known, and nobody is lost with it."""

from contextlib import AbstractAsyncContextManager

from serve_app.node_lock import NodeLock


class Suspects:
    """Requests that were there each time when a stage was lost: one at a time over a node's ingress replicas."""

    def __init__(self, name: str) -> None:
        """name: of what is served; the same for all ingress replicas of it."""
        self._lock = NodeLock(f"{name}.suspect")

    def alone(self) -> AbstractAsyncContextManager[None]:
        """While no other suspect is. They take turns in no order."""
        return self._lock.held()
