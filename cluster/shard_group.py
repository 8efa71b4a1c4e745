"""The child actors of a replica: ranks 1 to S - 1 of its shard group, placed, joined, watched, dismissed.

The replica itself is rank 0, in bundle 0 of its placement group; rank r lies in bundle r, and goes when the
replica goes. An actor class given here is plain, with the methods `place`, `join`, `alive`, `stats` and
`dismiss`, of which `alive` never answers: its error is the notice of death.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.resources import ResourceConfig
from cluster.serve_options import STAGE_ENV

DISMISS_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Place:
    """Where a rank lies: Ray numbers the GPUs of every node from 0, so the node belongs to it."""

    node_id: str
    gpu: str | None


def this_place() -> Place:
    """Of the calling actor."""
    gpus = ray.get_gpu_ids()
    return Place(ray.get_runtime_context().get_node_id(), str(gpus[0]) if gpus else None)


def this_address() -> str:
    """The IP address under which the other ranks reach this node."""
    return str(ray.util.get_node_ip_address())


class ShardGroup:
    """Ranks 1 to num_ranks - 1 of the calling replica."""

    def __init__(self, rank_class: type, num_ranks: int, resources: ResourceConfig, *args: Any) -> None:
        """Starts every child with `rank_class(rank, *args)`. Does not wait: they load while the caller does."""
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
        """Of all ranks, this replica's first. Blocks until the children have loaded; raises what they raise."""
        return [this_place(), *self._call("place")]

    def join(self, *rendezvous: Any) -> "Joining":
        """Lets the children join the process group; the caller joins meanwhile, then waits for them."""
        return Joining([rank.join.remote(*rendezvous) for rank in self._ranks])

    def watch(self, on_death: Callable[[BaseException], None]) -> None:
        """Calls on_death, in some thread, when a child is gone, idle or not."""

        def notice(done: "Future[Any]") -> None:
            error = done.exception()
            on_death(error or RuntimeError("a rank ended by itself"))

        for rank in self._ranks:
            rank.alive.remote().future().add_done_callback(notice)

    def stats(self) -> list[Any]:
        return self._call("stats")

    def pids(self) -> list[int]:
        """Process ids of the children."""
        return [int(pid) for pid in self._call("pid")]

    def dismiss(self) -> None:
        """Goodbye: the children close their side without taking it for a failure."""
        ray.wait(
            [rank.dismiss.remote() for rank in self._ranks],
            num_returns=len(self._ranks),
            timeout=DISMISS_TIMEOUT_S,
        )

    def _call(self, method: str) -> list[Any]:
        answers: list[Any] = ray.get([getattr(rank, method).remote() for rank in self._ranks])
        return answers


class Joining:
    """Children on their way into the process group."""

    def __init__(self, answers: list[Any]) -> None:
        self._answers = answers

    def wait(self) -> None:
        """Raises what the children raise."""
        ray.get(self._answers)
