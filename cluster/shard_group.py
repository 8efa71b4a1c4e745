"""The child actors of a replica: ranks 1 to S - 1 of its shard group, placed, connected and watched.

The replica itself is rank 0, in bundle 0 of its placement group; rank r lies in bundle r, and goes when the
replica goes. The actor class given here is plain and has the methods `place`, `connect`, `stats`, and
`alive`, which never answers: its error is the notice of death.
"""

from collections.abc import Callable
from typing import Any

import ray
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.place import Place, Rendezvous
from cluster.resources import ResourceConfig
from cluster.serve_options import STAGE_ENV


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
                runtime_env={"env_vars": dict(STAGE_ENV)},
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

    def connect(self, rendezvous: Rendezvous) -> Callable[[], None]:
        """Tells the children to meet there, and returns at once; call what it returns to wait for them."""
        answers = [rank.connect.remote(rendezvous) for rank in self._ranks]
        return lambda: ray.get(answers)

    def watch(self, on_death: Callable[[BaseException], None]) -> None:
        """Calls on_death, in some thread, when a child is gone, whether it was at work or idle.

        A neighbour's socket tells sooner (0.05 s), but only of a process that it is connected to.
        """
        for rank in self._ranks:
            rank.alive.remote().future().add_done_callback(lambda done: on_death(done.exception()))

    def stats(self) -> list[Any]:
        """Of ranks 1 to num_ranks - 1; blocks."""
        return list(ray.get([rank.stats.remote() for rank in self._ranks]))
