"""Calls from a replica's threads to the replicas of its own deployment."""

from functools import cached_property
from typing import Any

from ray import serve


class SiblingReplicas:
    """Calls to the least busy replica of this deployment, which may be this one, or to all of them."""

    def __init__(self, method: str, *, timeout_s: float) -> None:
        self._method, self._timeout_s = method, timeout_s

    def ask(self, *args: Any) -> Any:
        """Calls one replica. Blocks, so must not run in an event loop. Raises what the call raises, or
        TimeoutError."""
        answer = getattr(self._handle, self._method).remote(*args)
        try:
            return answer.result(timeout_s=self._timeout_s)
        except TimeoutError:
            answer.cancel()
            raise

    def ask_each(self, *args: Any) -> list[Any]:
        """Returns the answers of all replicas, including this one, without those that fail to answer; blocks."""
        answers = self._handle.broadcast(self._method, *args)
        each = answers.results(timeout_s=self._timeout_s, return_exceptions=True)
        return [answer for answer in each if not isinstance(answer, BaseException)]

    @cached_property
    def _handle(self) -> Any:
        """Handle of this deployment; cached on first use, because Serve knows a deployment only once it has
        replicas."""
        own = serve.get_replica_context()
        return serve.get_deployment_handle(own.deployment, own.app_name)
