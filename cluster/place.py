"""Where the ranks of a shard group lie, and where they meet. Imports no torch: a replica's Ray side needs it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Backend = Literal["nccl", "gloo", "object_store"]


@dataclass(frozen=True)
class Place:
    """Where a rank runs. Ray numbers the GPUs of every node from 0, so the node belongs to it."""

    node_id: str
    gpu: str | None
    """Which of the node's GPUs, by its number, or as CUDA_VISIBLE_DEVICES names it; None without one."""


@dataclass(frozen=True)
class Rendezvous:
    """What a rank must know to join the others."""

    num_ranks: int
    backend: Backend
    host: str = ""
    """Rank 0's address; of nccl and gloo."""
    port: int = 0
    mailboxes: tuple[Any, ...] = ()
    """Ray's queues; of object_store."""
    degree: int = 1
    """How many ranks share each forward: ranks k * degree, k * degree + 1, … have the same blocks."""

    def ring_of(self, parallel_rank: int) -> tuple[int, ...]:
        """The ranks of one ring, in order. Of those that share a forward each is on a ring of its own, which it
        hands its part of the tensors on by; rank 0 is on every ring, and gives all of them the same work."""
        own = tuple(range(parallel_rank, self.num_ranks, self.degree))
        return own if parallel_rank == 0 else (0, *own)


def num_nodes(places: Sequence[Place]) -> int:
    """On how many nodes they lie."""
    return len({place.node_id for place in places})


def plan_backend(places: Sequence[Place]) -> Backend:
    """NCCL if every rank has a GPU of its own, for it refuses two ranks on one; else gloo, by way of the CPU.

    Two slices of one card (MIG) are one GPU to NCCL, and a slice does not tell its card.
    """
    own_gpus = {place for place in places if place.gpu is not None and not place.gpu.startswith("MIG")}
    return "nccl" if len(own_gpus) == len(places) else "gloo"
