"""The child actors of a replica: ranks 1 to S - 1 of its shard group, placed, connected and watched.

The replica itself is rank 0, in bundle 0 of its placement group; rank r lies in bundle r, and goes when the
replica goes. The actor class given here is plain and has the methods `place`, `connect`, `stats`, what
`ask` is asked for, and `alive`, which never answers: its error is the notice of death.
"""

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.place import Place, Rendezvous
from cluster.resources import ResourceConfig
from cluster.serve_options import stage_environment

CONNECT_TIMEOUT_S = 600.0
"""Longer than any of its parts waits; NCCL's would wait for ever."""
SILENT_AFTER_S = 30.0
"""A child that answers nothing for longer hangs or is stopped; of rank 0, Serve waits as long."""
_ASK_AGAIN_S = 1.0

Connected = TypeVar("Connected")


def this_place() -> Place:
    """Of the calling actor."""
    gpus = ray.get_gpu_ids()
    return Place(ray.get_runtime_context().get_node_id(), str(gpus[0]) if gpus else None)


def this_address() -> str:
    """The IP address at which other nodes reach this one."""
    return str(ray.util.get_node_ip_address())


class ShardGroup:
    """Ranks 1 to num_ranks - 1 of the calling replica."""

    def __init__(self, rank_class: type, num_ranks: int, resources: ResourceConfig, *args: Any) -> None:
        """Starts every child with `rank_class(rank, *args)`, and does not wait: they load as the caller does."""
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
        """Of all ranks, the caller's first. Blocks until the children have loaded; raises what they raise."""
        return [this_place(), *ray.get([rank.place.remote() for rank in self._ranks])]

    def connect(
        self,
        rendezvous: Rendezvous,
        connect_here: Callable[[], Connected],
        on_lost: Callable[[BaseException], None],
        timeout_s: float = CONNECT_TIMEOUT_S,
        silent_after_s: float = SILENT_AFTER_S,
    ) -> Connected:
        """Meet there, all ranks at once; what connect_here, the caller's part in it, returns.

        on_lost: runs in some thread when a child fails to connect, is gone or falls silent, then or ever after, at
            work or idle, or when the time is up. It must end the process: connect_here may wait for what never
            comes.
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
        """Of ranks 1 to num_ranks - 1; blocks."""
        return self.ask("stats")

    def ask(self, method: str, *args: Any) -> list[Any]:
        """What that method of each of them answers; blocks."""
        shared = [ray.put(arg) for arg in args]
        return list(ray.get([getattr(rank, method).remote(*shared) for rank in self._ranks]))


def _watch(rank: Any, connecting: Any, on_lost: Callable[[BaseException], None], silent_after_s: float) -> None:
    """A neighbour's socket tells of a death sooner (0.05 s), but only of one that it is connected to."""
    try:
        ray.get(connecting)
        while True:
            try:
                _wait_for_death(rank, silent_after_s)
            except ActorUnavailableError:  # the network failed, not yet the child
                time.sleep(_ASK_AGAIN_S)
    except GetTimeoutError:
        on_lost(TimeoutError(f"a rank has not answered for {silent_after_s:g} s"))
    except RayError as error:
        on_lost(error)


def _wait_for_death(rank: Any, silent_after_s: float) -> None:
    """Raises its error, or GetTimeoutError."""
    alive = rank.alive.remote()
    while not ray.wait([alive], timeout=_ASK_AGAIN_S)[0]:
        ray.get(rank.place.remote(), timeout=silent_after_s)
    ray.get(alive)
