"""Where the ranks of a shard group meet before they load: rank 0 listens before it imports torch."""

import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class MeetingPoint:
    """What every rank but 0 is told."""

    host: str
    port: int


def listen(host: str) -> socket.socket:
    """On a free port. host: an address of this machine that the other ranks can reach."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, 0), family=family)  # torch's own would listen on all addresses


def meeting_point(listening: socket.socket) -> MeetingPoint:
    host, port, *_ = listening.getsockname()
    return MeetingPoint(host, port)
