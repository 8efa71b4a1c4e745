"""What Ray starts as a worker's Python, where workers are to be forked: `python -m cluster.forked_worker FILE ...`

It asks the fork server for a worker, and lives as long as that, for Ray waits for the process that it started and
may kill it. Where there is no server, it starts one. If anything fails, it becomes the worker itself. It imports
little: it is one process more for each worker.
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
SERVER_ENV = {
    "OMP_NUM_THREADS": "1",  # or numpy starts threads, and a fork has one; each stage says how many torch may use
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # who asks for a GPU while it is imported opens none
}
"""Of the server alone."""
PATIENCE_S = 40.0
"""With a server that still imports. Ray waits 60 s until a worker reports."""
_NUM_TRIES, _TRY_AGAIN_S = 50, 0.02


def main() -> None:
    worker = sys.argv[1:]
    try:
        server = _connect()
        reply = server.makefile().readline
        pid = _ask(server, reply, worker)
    except (OSError, ValueError, KeyError) as error:
        print(f"{os.getpid()}: no worker was forked, so it imports for itself: {error!r}", file=sys.stderr)
        os.execv(sys.executable, [sys.executable, *worker])
    signal.signal(signal.SIGTERM, lambda number, _frame: tell(pid, number))
    server.settimeout(None)
    status = reply()
    if not status:  # the server has ended, and the worker need not
        select.select([os.pidfd_open(pid)], [], [])
    os._exit(int(status or 1))


def _connect() -> socket.socket:
    """To the server; where there is none it is started. Raises OSError."""
    # An abstract address: whoever binds it first starts the server, and it is free again when that has ended.
    # Processes of containers may have equal numbers, and one network. Ray reads its job when it is imported.
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
        except ConnectionRefusedError:  # bound, and not yet listened to
            server.close()
            time.sleep(_TRY_AGAIN_S)
            continue
        if not is_own(server):
            raise PermissionError("another user has the fork server's address")
        return server
    raise ConnectionRefusedError("nobody listens at the fork server's address")


def is_own(peer: socket.socket) -> bool:
    """Whether a process of this user is at the other end."""
    _pid, user, _group = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return bool(user == os.getuid())


def tell(pid: int, number: int) -> None:
    """A signal, if it is still there."""
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
    """The worker's process. Raises OSError or ValueError."""
    asked = json.dumps({"argv": worker, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
    socket.send_fds(server, [len(asked).to_bytes(8)], [0, 1, 2])
    server.sendall(asked)
    return int(reply())


if __name__ == "__main__":
    main()
