"""The child actors of a replica: ranks 1 to S - 1 of its shard group, placed, connected and watched.

The replica itself is rank 0, in bundle 0 of its placement group; rank r is in bundle r, and ends with the replica.
The actor class passed in is a plain class with the methods `place`, `connect` and `stats`, those that `ask` is
called with, and `alive`, which never returns: its error reports the actor's death.
"""

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.ranks.place import SILENT_AFTER_S, Place, Rendezvous
from cluster.replicas.resources import ResourceConfig
from cluster.replicas.serve_options import stage_environment

CONNECT_TIMEOUT_S = 600.0
"""Longer than any part of connecting waits; NCCL alone would wait indefinitely."""
_ASK_AGAIN_S = 1.0

Connected = TypeVar("Connected")


def this_place() -> Place:
    """Returns where the calling actor runs."""
    gpus = ray.get_gpu_ids()
    return Place(ray.get_runtime_context().get_node_id(), str(gpus[0]) if gpus else None)


def this_address() -> str:
    """Returns the IP address at which other nodes reach this one."""
    return str(ray.util.get_node_ip_address())


class ShardGroup:
    """Ranks 1 to num_ranks - 1 of the calling replica."""

    def __init__(self, rank_class: type, num_ranks: int, resources: ResourceConfig, *args: Any) -> None:
        """Starts every child with `rank_class(rank, *args)`, without waiting: the children load while the caller
        does."""
        self._ranks = [
            ray.remote(rank_class)
            .options(
                num_cpus=resources.num_cpus,
                num_gpus=resources.num_gpus,
                max_restarts=0,
                runtime_env=stage_environment(resources),
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    get_current_placement_group(), placement_group_bundle_index=rank
                ),
            )
            .remote(rank, *args)
            for rank in range(1, num_ranks)
        ]

    def places(self) -> list[Place]:
        """Returns the places of all ranks, the caller's first. Blocks until the children have loaded; raises their
        errors."""
        return [this_place(), *ray.get([rank.place.remote() for rank in self._ranks])]

    def connect(
        self,
        rendezvous: Rendezvous,
        connect_here: Callable[[], Connected],
        on_lost: Callable[[BaseException], None],
        timeout_s: float = CONNECT_TIMEOUT_S,
        silent_after_s: float = SILENT_AFTER_S,
    ) -> Connected:
        """Connects all ranks at once, this one by `connect_here`, and returns what that returns.

        on_lost: runs in some thread when a child fails to connect, dies or stops answering, during or any time
        after connecting, or when the timeout has passed. It must end the process, because connect_here may be
        waiting indefinitely.
        """
        answers = [rank.connect.remote(rendezvous) for rank in self._ranks]
        for rank, answer in zip(self._ranks, answers, strict=True):
            threading.Thread(
                target=_watch, args=(rank, answer, on_lost, silent_after_s), name="watch", daemon=True
            ).start()
        too_late = TimeoutError(f"the ranks have not met within {timeout_s:g} s")
        timer = threading.Timer(timeout_s, on_lost, [too_late])
        timer.daemon = True
        timer.start()
        try:
            connected = connect_here()
            ray.get(answers)
        finally:
            timer.cancel()
        return connected

    def stats(self) -> list[Any]:
        """Returns the statistics of ranks 1 to num_ranks - 1; blocks."""
        return self.ask("stats")

    def ask(self, method: str, *args: Any) -> list[Any]:
        """Calls the method on each child and returns their answers; blocks."""
        shared = [ray.put(arg) for arg in args]
        return list(ray.get([getattr(rank, method).remote(*shared) for rank in self._ranks]))


def _watch(rank: Any, connecting: Any, on_lost: Callable[[BaseException], None], silent_after_s: float) -> None:
    """Calls on_lost when the child dies or stops answering. A neighbour's socket reports a death sooner (0.05 s),
    but each rank is connected only to its neighbours."""
    try:
        ray.get(connecting)
        while True:
            try:
                _wait_for_death(rank, silent_after_s)
            except ActorUnavailableError:  # the network has failed, but perhaps not the child
                time.sleep(_ASK_AGAIN_S)
    except GetTimeoutError:
        on_lost(TimeoutError(f"a rank has not answered for {silent_after_s:g} s"))
    except RayError as error:
        on_lost(error)


def _wait_for_death(rank: Any, silent_after_s: float) -> None:
    """Raises the child's error when it dies, or GetTimeoutError when it stops answering."""
    alive = rank.alive.remote()
    while not ray.wait([alive], timeout=_ASK_AGAIN_S)[0]:
        ray.get(rank.place.remote(), timeout=silent_after_s)
    ray.get(alive)
