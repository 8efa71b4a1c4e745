"""What waits for room on the cluster: the demand that Ray's own autoscaler would add nodes for."""

import time
from collections.abc import Mapping
from functools import cache

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.autoscaler.v2.sdk import get_cluster_resource_state

LOOK_EVERY_S = 0.5
LASTING_S = 1.0
"""So long a process waits that finds no room; one that finds some is a moment on its way."""


@cache
def _client(address: str) -> GcsClient:
    return GcsClient(address=address)


def find_unplaced() -> list[Mapping[str, float]]:
    """Resources of each process that no node has room for now. Takes some milliseconds, and blocks."""
    state = get_cluster_resource_state(_client(ray.get_runtime_context().gcs_address))
    alone = [each.request for each in state.pending_resource_requests]
    together = [
        request
        for gang in state.pending_gang_resource_requests
        for selector in gang.bundle_selectors
        for request in selector.resource_requests
    ]
    return [dict(request.resources_bundle) for request in (*alone, *together)]


class Unplaced:
    """What has found no room for LASTING_S, looked for now and then, however often it is asked."""

    def __init__(self) -> None:
        self._looked_at = 0.0
        self._since: dict[str, float] = {}
        """By the names of resources."""

    def lasting(self) -> frozenset[str]:
        """Names of the resources that something waits for."""
        now = time.monotonic()
        if now - self._looked_at >= LOOK_EVERY_S:
            self._looked_at = now
            wanted = {name for resources in find_unplaced() for name, amount in resources.items() if amount}
            self._since = {name: self._since.get(name, now) for name in wanted}
        return frozenset(name for name, since in self._since.items() if now - since >= LASTING_S)
