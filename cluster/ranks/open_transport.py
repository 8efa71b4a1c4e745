"""Opens the transport that a rank's `Rendezvous` asks for."""

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from cluster.ranks.object_store_transport import ObjectStoreTransport
from cluster.ranks.place import Rendezvous
from cluster.ranks.transport import GroupTransport, Transport, join_store


def open_transport(
    rank: int,
    rendezvous: Rendezvous,
    *,
    device: torch.device,
    store: TCPStore | None = None,
    parallel_rank: int | None = None,
) -> Transport:
    """Opens a transport of one rank. Returns when the neighbours are connected.

    Args:
        store: rank 0's own, for nccl and gloo; None on the other ranks, which join it.
        parallel_rank: which ring to open, for rank 0, which is on all of them; None: the rank's own.
    """
    if rendezvous.backend == "object_store":
        return ObjectStoreTransport(rank, rendezvous.mailboxes, device=device)
    if store is None:
        store = join_store(rendezvous.host, rendezvous.port, rendezvous.num_ranks)
    number = rank % rendezvous.degree if parallel_rank is None else parallel_rank
    ring = rendezvous.ring_of(number)
    return GroupTransport(
        ring.index(rank), len(ring), store, name=f"ring {number}", backend=rendezvous.backend, device=device
    )


def open_rings(
    rendezvous: Rendezvous | None, *, device: torch.device, store: TCPStore | None
) -> tuple[Transport | None, list[Transport]]:
    """Opens rank 0's transports: first that of its own ring, None if it is the ring's only rank; then those of the
    rings that it feeds for the ranks that share its forwards."""
    if rendezvous is None:
        return None, []
    first, *others = (
        open_transport(0, rendezvous, device=device, store=store, parallel_rank=i)
        if len(rendezvous.ring_of(i)) > 1
        else None
        for i in range(rendezvous.degree)
    )
    return first, [transport for transport in others if transport is not None]
