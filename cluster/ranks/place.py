"""Where the ranks of a shard group run and where they meet. Imports no torch, because a replica's Ray side uses
it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

SILENT_AFTER_S = 30.0
"""A rank that does not answer for this long hangs or is stopped; Serve waits as long for rank 0."""

Backend = Literal["nccl", "gloo", "object_store"]


@dataclass(frozen=True)
class Place:
    """A rank's node and GPU. Ray numbers the GPUs of every node from 0."""

    node_id: str
    gpu: str | None
    """The node's GPU, by its number or as CUDA_VISIBLE_DEVICES names it; None without a GPU."""


@dataclass(frozen=True)
class Rendezvous:
    """What a rank must know to join the others."""

    num_ranks: int
    backend: Backend
    host: str = ""
    """Rank 0's address, for nccl and gloo."""
    port: int = 0
    mailboxes: tuple[Any, ...] = ()
    """Ray queues, one per rank, for object_store."""
    degree: int = 1
    """How many ranks share each forward: ranks k * degree, k * degree + 1, … have the same blocks."""

    def ring_of(self, parallel_rank: int) -> tuple[int, ...]:
        """Returns the ranks of one ring, in order.

        Each of the ranks that share a forward has a ring of its own; rank 0 is on all rings and sends them the
        same work.
        """
        own = tuple(range(parallel_rank, self.num_ranks, self.degree))
        return own if parallel_rank == 0 else (0, *own)


def num_nodes(places: Sequence[Place]) -> int:
    """Returns the number of different nodes."""
    return len({place.node_id for place in places})


def plan_backend(places: Sequence[Place]) -> Backend:
    """Returns nccl if every rank has a GPU of its own, because NCCL refuses two ranks on one GPU; else gloo, by
    way of the CPU.

    NCCL treats two slices of one card (MIG) as one GPU, and a slice does not show which card it belongs to.
    """
    own_gpus = {place for place in places if place.gpu is not None and not place.gpu.startswith("MIG")}
    return "nccl" if len(own_gpus) == len(places) else "gloo"
