"""The port on which a Serve replica takes calls from other processes. Whoever can call it can run code."""

from collections.abc import Callable
from typing import Any

import ray
from ray._common.network_utils import build_address, is_localhost
from ray.serve._private import replica


def follow_ray_to_loopback() -> None:
    """Opens the port on the loopback interface if Ray itself uses only that. Call this in a replica's constructor.

    Serve (2.60) opens the port after the constructor, and on all addresses, whatever Ray does with its own ports.
    On a node that other nodes reach by its address this changes nothing: there Ray's token keeps out unauthorised
    clients.
    """
    if not ray.is_initialized():
        return
    host = ray.util.get_node_ip_address()
    if is_localhost(host):
        replica.add_port_to_grpc_server = _opened_at(host, replica.add_port_to_grpc_server)


def _opened_at(host: str, add_port: Callable[[Any, str], int]) -> Callable[[Any, str], int]:
    return lambda server, address: add_port(server, build_address(host, address.rpartition(":")[2]))
