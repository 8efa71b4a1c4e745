"""The port on which Serve lets a replica take calls from others. Whoever may call it may run code."""

from collections.abc import Callable
from typing import Any

import ray
from ray._common.network_utils import build_address, is_localhost
from ray.serve._private import replica


def follow_ray_to_loopback() -> None:
    """Open it on the loopback interface, where Ray keeps to that. Call this in a replica's constructor.

    Serve (2.60) opens it afterwards, and on all addresses, whatever Ray does with its own ports. On a node that
    others reach by its address this changes nothing: there Ray's token keeps strangers out.
    """
    if not ray.is_initialized():
        return
    host = ray.util.get_node_ip_address()
    if is_localhost(host):
        replica.add_port_to_grpc_server = _opened_at(host, replica.add_port_to_grpc_server)


def _opened_at(host: str, add_port: Callable[[Any, str], int]) -> Callable[[Any, str], int]:
    return lambda server, address: add_port(server, build_address(host, address.rpartition(":")[2]))
