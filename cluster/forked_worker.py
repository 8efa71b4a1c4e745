"""Stands in for a worker's Python where workers are forked: Ray runs `python -m cluster.forked_worker FILE ...`.

The process asks the fork server for a worker and lives as long as that worker, because Ray waits for the process
that it started and may kill it. If there is no server, the process starts one. If anything fails, it becomes the
worker itself. It imports little, because one such process runs beside each worker.
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
"""Environment variables in which preload.py passes the server's name and what the server must import."""
SERVER_ENV = {
    "OMP_NUM_THREADS": "1",  # else numpy starts threads, which a fork loses; each stage sets torch's own number
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # availability checks during imports create no CUDA context
}
"""Additional environment of the server; workers do not get it."""
PATIENCE_S = 40.0
"""How long to wait for a server that is still importing. Ray waits 60 s for a worker to register."""
_NUM_TRIES, _TRY_AGAIN_S = 50, 0.02


def main() -> None:
    worker = sys.argv[1:]
    try:
        server = _connect()
        reply = server.makefile().readline
        pid = _ask(server, reply, worker)
    except (OSError, ValueError, KeyError) as error:
        print(
            f"{os.getpid()}: no worker was forked, so this one imports everything itself: {error!r}",
            file=sys.stderr,
        )
        os.execv(sys.executable, [sys.executable, *worker])
    signal.signal(signal.SIGTERM, lambda number, _frame: tell(pid, number))
    server.settimeout(None)
    status = reply()
    if not status:  # the server has ended; the worker may live on
        select.select([os.pidfd_open(pid)], [], [])
    os._exit(int(status or 1))


def _connect() -> socket.socket:
    """Connects to the server, and starts it if there is none. Raises OSError."""
    # An abstract socket address: the process that binds it first starts the server, and it is free again when the
    # server has ended. It names the PID namespace, because containers may share a network and have equal PIDs, and
    # the job, because Ray reads its job when it is imported.
    names = [str(os.stat("/proc/self/ns/pid").st_ino)]
    names += [os.environ[name] for name in ("RAY_RAYLET_PID", "RAY_JOB_ID", FORK_SERVER)]
    address = f"\0latent-relay {' '.join(names)}"
    for _ in range(_NUM_TRIES):
        with socket.socket(socket.AF_UNIX) as listener, suppress(OSError):
            listener.bind(address)
            listener.listen(128)
            _start(listener)
        server = socket.socket(socket.AF_UNIX)
        server.settimeout(PATIENCE_S)
        try:
            server.connect(address)
        except ConnectionRefusedError:  # bound, but not listening yet
            server.close()
            time.sleep(_TRY_AGAIN_S)
            continue
        if not is_own(server):
            raise PermissionError("another user has the fork server's address")
        return server
    raise ConnectionRefusedError("nothing listens at the fork server's address")


def is_own(peer: socket.socket) -> bool:
    """Whether the process at the other end belongs to this user."""
    _pid, user, _group = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return bool(user == os.getuid())


def tell(pid: int, number: int) -> None:
    """Sends a signal to the process if it still exists."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _start(listener: socket.socket) -> None:
    number = listener.fileno()
    subprocess.Popen(
        [sys.executable, "-P", "-m", "cluster.fork_server", str(number)],
        env=os.environ | SERVER_ENV,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[number],
        start_new_session=True,
    )


def _ask(server: socket.socket, reply: Callable[[], str], worker: list[str]) -> int:
    """Requests a worker and returns its PID. Raises OSError or ValueError."""
    asked = json.dumps({"argv": worker, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
    socket.send_fds(server, [len(asked).to_bytes(8)], [0, 1, 2])
    server.sendall(asked)
    return int(reply())


if __name__ == "__main__":
    main()
