"""The cluster's free resources, and the pending demand for which Ray's autoscaler would add nodes."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.core.generated.autoscaler_pb2 import ClusterResourceState, NodeStatus

from cluster.machines.nodes import Node

READ_EVERY_S = 0.5
LASTING_S = 1.0
"""A process that has waited this long finds no room; one that has waited for less may just be about to start."""
NODE_S = 300.0
"""How long a process may wait where nodes are added on demand: for a machine, its image and Ray."""
SCATTERED_S = 30.0
"""How long a process may wait although a node seems to have room: the process is starting, or the free share is
spread over several GPUs."""
NODE_GROUP = "ray.io/node-group"
"""Label that Ray's launcher and KubeRay give to their nodes."""
_PLACES = (NodeStatus.RUNNING, NodeStatus.IDLE)
_EPSILON = 1e-4
"""Ray counts resources in ten thousandths."""


@dataclass(frozen=True)
class Claim:
    """The resources that one replica of a stage takes."""

    resources: Mapping[str, float]
    """Resources of each rank."""
    num_ranks: int = 1
    labels: Mapping[str, str] | None = None
    """Labels required of its nodes, as Ray's selectors."""


class FreeResources:
    """The free resources of nodes, from which replicas are subtracted to see whether they would fit."""

    def __init__(self, nodes: Sequence[tuple[Node, Mapping[str, float]]]) -> None:
        self._nodes = [(node, dict(free)) for node, free in nodes]

    def take(self, claim: Claim) -> bool:
        """Subtracts the claim of one replica: from a single node if one has enough, else from several. Returns
        whether there was room."""
        nodes = [free for node, free in self._nodes if node.has_labels(claim.labels or {})]
        for candidates in [*([free] for free in nodes), nodes]:
            left = [dict(free) for free in candidates]
            if all(_take_rank(claim.resources, left) for _ in range(claim.num_ranks)):
                for free, rest in zip(candidates, left, strict=True):
                    free.update(rest)
                return True
        return False


def _take_rank(resources: Mapping[str, float], nodes: Sequence[dict[str, float]]) -> bool:
    for free in nodes:
        if all(free.get(name, 0.0) >= amount - _EPSILON for name, amount in resources.items()):
            free.update({name: free[name] - amount for name, amount in resources.items()})
            return True
    return False


@dataclass(frozen=True)
class ClusterSnapshot:
    """The state of the cluster at one moment."""

    nodes: tuple[tuple[Node, Mapping[str, float]], ...] = ()
    """Each node with its free resources."""
    unplaced: tuple[Mapping[str, float], ...] = ()
    """Resources of each process that no node has room for."""
    has_autoscaler: bool = False
    """Whether nodes may be added on demand."""


@cache
def _client(address: str) -> GcsClient:
    return GcsClient(address=address)


def read_snapshot() -> ClusterSnapshot:
    """Reads the cluster's state. Blocks for some milliseconds."""
    state = get_cluster_resource_state(_client(ray.get_runtime_context().gcs_address))
    nodes = tuple(
        (Node(node.total_resources["CPU"], dict(node.labels)), dict(node.available_resources))
        for node in state.node_states
        if node.status in _PLACES
    )
    has_autoscaler = any(NODE_GROUP in node.labels for node, _ in nodes)
    return ClusterSnapshot(nodes, tuple(_find_unplaced(state)), has_autoscaler)


def _find_unplaced(state: ClusterResourceState) -> list[Mapping[str, float]]:
    alone = [request for each in state.pending_resource_requests for request in [each.request] * each.count]
    together = [
        request
        for gang in state.pending_gang_resource_requests
        for selector in gang.bundle_selectors
        for request in selector.resource_requests
    ]
    asked = [request.resources_bundle.items() for request in (*alone, *together)]
    return [{name: amount for name, amount in each if amount} for each in asked]


class Watch:
    """Reads a snapshot at most every `READ_EVERY_S`, and records since when each unplaced request has been
    waiting."""

    def __init__(self) -> None:
        self._read_at = 0.0
        self._snapshot = ClusterSnapshot()
        self._since: dict[frozenset[tuple[str, float]], float] = {}
        """When each set of requested resources was first seen waiting."""

    def snapshot(self) -> ClusterSnapshot:
        now = time.monotonic()
        if now - self._read_at >= READ_EVERY_S:
            self._read_at, self._snapshot = now, read_snapshot()
            wanted = {frozenset(each.items()) for each in self._snapshot.unplaced}
            self._since = {each: self._since.get(each, now) for each in wanted}
        return self._snapshot

    def lasting(self, for_s: float = LASTING_S) -> list[Mapping[str, float]]:
        """Returns the requested resources that have found no room for at least `for_s`."""
        self.snapshot()
        return [dict(each) for each, since in self._since.items() if time.monotonic() - since >= for_s]

    def stuck(self) -> list[Mapping[str, float]]:
        """Returns the requests that have waited so long that a stage in use should give way to them; idle models
        give way earlier."""
        snapshot = self.snapshot()
        limit_s = NODE_S if snapshot.has_autoscaler else 2 * LASTING_S
        long = self.lasting(max(limit_s, SCATTERED_S))
        return [
            each
            for each in self.lasting(limit_s)
            if each in long or not FreeResources(snapshot.nodes).take(Claim(each))
        ]

    def lacking(self) -> frozenset[str]:
        """Returns the names of the resources that processes wait for."""
        return frozenset(name for each in self.lasting() for name in each)


watch = Watch()
"""The watch of Serve's controller, shared by all policies."""
