"""Tests of a replica and its children as real actors: what the replica learns of a child that fails to connect or
dies."""

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import pytest
import ray
from ray.exceptions import ActorUnavailableError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.ranks.place import Place, Rendezvous
from cluster.ranks.shard_group import ShardGroup, this_place
from cluster.replicas.resources import ResourceConfig

RESOURCES = ResourceConfig(num_cpus=0.1)
SOON_S = 30.0
Fate = tuple[Callable[[], None], ...]
"""What the child's calls do, in order: `connect`, then each `alive`."""


class Child:
    """Rank 1."""

    def __init__(self, _rank: int, fate: Fate) -> None:
        self._fate = iter(fate)

    def place(self) -> Place:
        return this_place()

    def connect(self, _rendezvous: Rendezvous) -> None:
        next(self._fate)()

    def alive(self) -> None:
        next(self._fate)()


class Replica:
    """Rank 0, whose own connecting never ends."""

    def __init__(self, fate: Fate) -> None:
        self._group = ShardGroup(Child, 2, RESOURCES, fate)

    def loss(self, timeout_s: float) -> str:
        """Returns the first loss that is reported."""
        self._group.places()
        lost: SimpleQueue[BaseException] = SimpleQueue()

        def connect_here() -> Any:
            raise RuntimeError(repr(lost.get(timeout=SOON_S)))

        try:
            rendezvous = Rendezvous(2, "gloo", "127.0.0.1", 1)
            self._group.connect(rendezvous, connect_here, lost.put, timeout_s, silent_after_s=1.0)
        except RuntimeError as told:
            return str(told)


def go_on() -> None:
    pass


def wait() -> None:
    threading.Event().wait()


def die() -> None:
    os._exit(1)


def refuse() -> None:
    raise ValueError("there is no way there")


def be_cut_off() -> None:
    raise ActorUnavailableError("the network failed", None)


@pytest.mark.parametrize(
    ("fate", "timeout_s", "loss"),
    [
        pytest.param((refuse,), SOON_S, "there is no way there", id="fails to connect"),
        pytest.param((die,), SOON_S, "ActorDiedError", id="dies as it connects"),
        pytest.param((wait,), 0.5, "TimeoutError('the ranks have not met within 0.5 s')", id="never connects"),
        pytest.param((go_on, die), SOON_S, "ActorDiedError", id="dies once connected"),
        pytest.param(
            (go_on, wait), SOON_S, "a rank has not answered for 1 s", id="answers nothing once connected"
        ),
        pytest.param((go_on, be_cut_off, die), SOON_S, "ActorDiedError", id="cut off for a while, then dies"),
    ],
)
def test_a_replica_that_still_connects_learns_that_its_child(
    ray_cluster: None, fate: Fate, timeout_s: float, loss: str
) -> None:
    group = placement_group([{"CPU": RESOURCES.num_cpus}] * 2)
    here = PlacementGroupSchedulingStrategy(
        group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
    )
    replica = ray.remote(Replica).options(num_cpus=RESOURCES.num_cpus, scheduling_strategy=here).remote(fate)
    assert loss in ray.get(replica.loss.remote(timeout_s))
    ray.kill(replica)
    remove_placement_group(group)
