"""What Ray starts as a worker's Python, where workers are to be forked: `python -m cluster.forked_worker FILE ...`

It asks the fork server for a worker, and lives as long as that, for Ray waits for the process that it started and
may kill it. If anything fails, it becomes the worker itself. It imports little: it is one process more for each
worker.
"""

import json
import os
import select
import shlex
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

FORK_SERVER, PRELOAD = "RELAY_FORK_SERVER", "RELAY_PRELOAD"
"""Variables by which preload.py tells the server's name, and what it is to import."""
SERVER_ENV = {
    "OMP_NUM_THREADS": "1",  # or numpy starts threads, and a fork has one; each stage says how many torch may use
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # who asks for a GPU while it is imported opens none
}
"""Of the server alone."""
PATIENCE_S = 40.0
"""With a server that had to be started anew. Ray waits 60 s until a worker reports."""
_NUM_TRIES, _TRY_AGAIN_S = 50, 0.02


def main() -> None:
    worker = sys.argv[1:]
    try:
        server = connect(f"exec {shlex.quote(sys.executable)}", os.environ, PATIENCE_S)
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


def connect(command: str, environment: Mapping[str, str], timeout_s: float) -> socket.socket:
    """To the server that the environment names. Where there is none it is started.

    Args:
        command: a shell's, which its arguments follow.
        timeout_s: of each operation on the socket.

    Raises OSError.
    """
    # An abstract address: whoever binds it first starts the server, and it is free again when that has ended.
    # Processes of containers may have equal numbers, and one network.
    node = f"{os.stat('/proc/self/ns/pid').st_ino} {environment['RAY_RAYLET_PID']}"
    address = f"\0latent-relay {node} {environment[FORK_SERVER]}"
    for _ in range(_NUM_TRIES):
        with socket.socket(socket.AF_UNIX) as listener, suppress(OSError):
            listener.bind(address)
            listener.listen(128)
            _start(command, environment, listener)
        server = socket.socket(socket.AF_UNIX)
        server.settimeout(timeout_s)
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


def _start(command: str, environment: Mapping[str, str], listener: socket.socket) -> None:
    number = listener.fileno()
    subprocess.Popen(
        ["bash", "-c", f"{command} -P -m cluster.fork_server {number}"],
        env=dict(environment) | SERVER_ENV,
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
