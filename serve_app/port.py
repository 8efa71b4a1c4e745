"""Whether a port can be listened on, asked before anything starts.

Serve's proxies set SO_REUSEPORT, so two servers would share a port without an error, and the requests too.
"""

import errno
import socket
from pathlib import Path

_CONNECT_S = 1.0
_LISTEN = "0A"
"""State of a socket in /proc/net/tcp."""
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


def reachable_host(host: str) -> str:
    """An address at which a browser on this machine reaches who listens on `host`."""
    return _WILDCARDS.get(host, host)


def url_of(host: str, port: int, scheme: str = "http") -> str:
    """That a browser on this machine can open."""
    name = reachable_host(host)
    return f"{scheme}://[{name}]:{port}" if ":" in name else f"{scheme}://{name}:{port}"


def find_port_fault(host: str, port: int) -> str | None:
    """One sentence, or None if the port is free."""
    if not 1 <= port <= 65535:
        return f"http_options.port must be between 1 and 65535, got {port}"
    try:
        found = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        return f"host {host!r} is no address of this machine: {getattr(error, 'strerror', None) or error}"
    family, _, _, _, address = found[0]
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not held by what ended a minute ago
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
        return f"host {host} is no address of this machine: 127.0.0.1 is for this machine alone, 0.0.0.0 for all"
    if error.errno == errno.EACCES:
        return f"port {port} is for root alone: choose one from 1024"
    return f"{host}:{port} cannot be listened on: {error.strerror}"


def _taken(host: str, port: int) -> str:
    holder = find_listener(port)
    return (
        f"port {port} of {host} is taken{f' by {holder}' if holder else ''}: end that, or choose another by --port"
    )


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), _CONNECT_S).close()
    except OSError:
        return False
    return True


def find_listener(port: int) -> str | None:
    """`ray::ProxyActor (pid 4711)`; None where the kernel does not tell whose it is."""
    inodes = {
        fields[9]
        for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
        if table.exists()
        for fields in map(str.split, table.read_text().splitlines()[1:])
        if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port
    }
    links = {f"socket:[{inode}]" for inode in inodes}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(str(file.readlink()) in links for file in (process / "fd").iterdir()):
                words = (process / "cmdline").read_bytes().split(b"\0")
                return f"{b' '.join(words).decode(errors='replace').strip()[:80]} (pid {process.name})"
        except OSError:  # it has ended, or is somebody else's
            continue
    return None
