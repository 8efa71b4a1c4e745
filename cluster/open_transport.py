"""Which transport a rank takes, by where it is to meet the others."""

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from cluster.object_store_transport import ObjectStoreTransport
from cluster.place import Rendezvous
from cluster.transport import GroupTransport, Transport, join_store


def open_transport(
    rank: int, rendezvous: Rendezvous, *, device: torch.device, store: TCPStore | None = None
) -> Transport:
    """Returns when the neighbours are connected. store: rank 0's own, for nccl and gloo; the others join it."""
    if rendezvous.backend == "object_store":
        return ObjectStoreTransport(rank, rendezvous.mailboxes, device=device)
    num_ranks = rendezvous.num_ranks
    if store is None:
        store = join_store(rendezvous.host, rendezvous.port, num_ranks)
    return GroupTransport(rank, num_ranks, store, backend=rendezvous.backend, device=device)
