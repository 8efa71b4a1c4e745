"""Whether a server without keys may be listened for at an address: on the loopback interface alone."""

import socket
from collections.abc import Collection
from ipaddress import ip_address

from serve_app.auth.config import Access


def find_listening_fault(host: str | None, access: Collection[Access]) -> str | None:
    """One sentence, or None. host: of Serve's HTTP; None: there is none."""
    if host is None or is_loopback(host) or all(each.auth or each.is_open for each in access):
        return None
    return (
        f"http_options.host {host}: others would reach this server, and it asks for no key: under args, "
        "`auth: {}` makes it ask (`relay key create NAME` makes keys), `open: true` lets everybody in; host "
        "127.0.0.1 is for this machine alone"
    )


def is_loopback(host: str) -> bool:
    """Whether who listens there is reached from this machine alone; names are looked up."""
    try:
        found = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        return False
    return all(_is_loopback(str(address[0])) for *_, address in found)


def _is_loopback(address: str) -> bool:
    found = ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback
