"""The address of the TCPStore where the ranks of a shard group meet before they load. Rank 0 listens on it before
it imports torch. A `Rendezvous` later tells them how to connect to their rings."""

import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class StoreAddress:
    """The store's address, as passed to every rank but 0."""

    host: str
    port: int


def listen(host: str) -> socket.socket:
    """Listens on a free port. host: an address of this machine that the other ranks can reach."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, 0), family=family)  # a socket opened by torch would listen on all addresses


def store_address(listening: socket.socket) -> StoreAddress:
    host, port, *_ = listening.getsockname()
    return StoreAddress(host, port)
