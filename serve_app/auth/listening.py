"""Checks that a server without keys listens on the loopback interface only."""

import socket
from collections.abc import Collection
from ipaddress import ip_address

from serve_app.auth.config import Access


def find_listening_fault(host: str | None, access: Collection[Access]) -> str | None:
    """Returns the fault as one sentence, or None. host: where Serve's HTTP proxy listens; None: no proxy."""
    if host is None or is_loopback(host) or all(each.auth or each.is_open for each in access):
        return None
    return (
        f"http_options.host {host}: other machines would reach this server, and it requires no key: under args, "
        "set `auth: {}` to require one (`relay key create NAME` creates keys), or `open: true` to let everybody "
        "in; or use host 127.0.0.1, which only this machine can reach"
    )


def is_loopback(host: str) -> bool:
    """Whether a server that listens at `host` is reachable from this machine only; host names are resolved."""
    try:
        found = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        return False
    return all(_is_loopback(str(address[0])) for *_, address in found)


def _is_loopback(address: str) -> bool:
    found = ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback
