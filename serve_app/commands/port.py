"""Checks, before anything starts, that a port can be listened on.

Serve's proxies set SO_REUSEPORT, so two servers would share a port, and its requests, without an error.
"""

import contextlib
import errno
import socket
from collections.abc import Iterator
from pathlib import Path

_CONNECT_S = 1.0
_LISTEN = "0A"
"""The state of a listening socket in /proc/net/tcp."""
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


def reachable_host(host: str) -> str:
    """Returns an address at which a browser on this machine reaches a server that listens on `host`."""
    return _WILDCARDS.get(host, host)


def url_of(host: str, port: int, scheme: str = "http") -> str:
    """Returns a URL that a browser on this machine can open."""
    name = reachable_host(host)
    return f"{scheme}://[{name}]:{port}" if ":" in name else f"{scheme}://{name}:{port}"


def find_port_fault(host: str, port: int) -> str | None:
    """Returns the fault as one sentence, or None if the port is free."""
    if not 1 <= port <= 65535:
        return f"http_options.port must be between 1 and 65535, got {port}"
    try:
        found = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        return f"host {host!r} is not an address of this machine: {getattr(error, 'strerror', None) or error}"
    family, _, _, _, address = found[0]
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignores sockets in TIME_WAIT
            probe.bind(address)
    except OSError as error:
        return _describe(error, host, port)
    if _answers(reachable_host(host), port):
        return _taken(host, port)
    return None


def _describe(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return _taken(host, port)
    if error.errno == errno.EADDRNOTAVAIL:
        return f"host {host} is not an address of this machine: 127.0.0.1 serves this machine only, 0.0.0.0 all"
    if error.errno == errno.EACCES:
        return f"only root may use port {port}: choose one from 1024"
    return f"cannot listen on {host}:{port}: {error.strerror}"


def _taken(host: str, port: int) -> str:
    holder = find_listener(port)
    return (
        f"port {port} of {host} is taken{f' by {holder}' if holder else ''}: stop that process, or choose another "
        "with --port"
    )


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), _CONNECT_S).close()
    except OSError:
        return False
    return True


def find_listener(port: int) -> str | None:
    """Returns the listening process, such as `ray::ProxyActor (pid 4711)`; None if the kernel does not tell it."""
    inodes = {
        fields[9]
        for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
        if table.exists()
        for fields in map(str.split, table.read_text().splitlines()[1:])
        if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port
    }
    links = {f"socket:[{inode}]" for inode in inodes}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
            if not links.isdisjoint(_open_files(process)):
                words = (process / "cmdline").read_bytes().split(b"\0")
                return f"{b' '.join(words).decode(errors='replace').strip()[:80]} (pid {process.name})"
    return None


def _open_files(process: Path) -> Iterator[str]:
    for file in (process / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            yield str(file.readlink())
