"""What Ray starts as a worker's Python, where workers are to be forked: `python -m cluster.forked_worker FILE ...`

It asks the fork server for a worker, and lives as long as that, for Ray waits for the process that it started and may
kill it. Where there is no server, it starts one. If anything fails, it becomes the worker itself. It imports little:
it is one process more for each worker.
"""

import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

FORK_SERVER, PRELOAD = "RELAY_FORK_SERVER", "RELAY_PRELOAD"
"""Variables by which preload.py tells the server's name, and what it is to import."""
PATIENCE_S = 40.0
"""With a server that still imports. Ray waits 60 s until a worker reports."""
_NUM_TRIES, _TRY_AGAIN_S = 50, 0.02


def main() -> None:
    worker = sys.argv[1:]
    try:
        server = _connect()
        reply = server.makefile().readline
        pid = _ask(server, reply, worker)
    except (OSError, ValueError) as error:
        print(f"{os.getpid()}: no worker was forked, so it imports for itself: {error!r}", file=sys.stderr)
        os.execv(sys.executable, [sys.executable, *worker])
    signal.signal(signal.SIGTERM, lambda number, _frame: tell(pid, number))
    server.settimeout(None)
    status = reply()
    if not status:  # the server has ended, and the worker need not
        select.select([os.pidfd_open(pid)], [], [])
    os._exit(int(status or 1))


def tell(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def is_own(peer: socket.socket) -> bool:
    """Whether a process of this user is at the other end."""
    _pid, user, _group = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return bool(user == os.getuid())


def _connect() -> socket.socket:
    """To the server, which may be about to begin. Raises OSError."""
    # An abstract address: whoever binds it first starts the server, and it is free again when the server has ended.
    address = f"\0latent-relay {os.environ['RAY_RAYLET_PID']} {os.environ[FORK_SERVER]}"
    for _ in range(_NUM_TRIES):
        with socket.socket(socket.AF_UNIX) as listener, suppress(OSError):
            listener.bind(address)
            listener.listen(128)
            _start(listener)
        server = socket.socket(socket.AF_UNIX)
        server.settimeout(PATIENCE_S)
        with suppress(ConnectionRefusedError):  # bound, and not yet listened to
            server.connect(address)
            break
        time.sleep(_TRY_AGAIN_S)
    if not is_own(server):
        raise PermissionError("another user has the fork server's address")
    return server


def _start(listener: socket.socket) -> None:
    subprocess.Popen(
        [sys.executable, "-P", "-m", "cluster.fork_server", str(listener.fileno())],
        stdin=subprocess.DEVNULL,
        pass_fds=[listener.fileno()],
        start_new_session=True,
    )


def _ask(server: socket.socket, reply: Callable[[], str], worker: list[str]) -> int:
    """The worker's process. Raises OSError or ValueError."""
    asked = json.dumps({"argv": worker, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
    socket.send_fds(server, [len(asked).to_bytes(8)], [0, 1, 2])
    server.sendall(asked)
    return int(reply())


if __name__ == "__main__":
    main()
