"""A process that imports what workers need, and forks a worker for each that asks (forked_worker.py).

What is forked shares what was imported: neither time nor memory is spent on it again. The server has one thread
and asks for no accelerator, for neither survives a fork. It ends with its raylet, or when it has had no worker for
a while.
"""

import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from cluster import accelerator
from cluster.forked_worker import PRELOAD, is_own, tell

RAY = ("ray._private.workers.default_worker", "ray.serve._private.replica")
"""What makes a worker of a process, and a replica of a worker."""
IDLE_S = 60.0
"""How long the server outlives its workers: a replica that died is started anew sooner."""
_RECEIVE_S = 5.0


@dataclass(frozen=True)
class Worker:
    """What a forked process is to become."""

    argv: list[str]
    environment: dict[str, str]
    folder: str
    files: list[int]
    """Its standard input, output and error."""

    def run(self) -> None:
        os.setpgid(0, 0)  # Ray ends a worker with its group
        for number, file in enumerate(self.files):
            os.dup2(file, number)
            os.close(file)
        os.chdir(self.folder)
        os.environ.clear()
        os.environ.update(self.environment)
        if accelerator.is_spoilt_by_fork():
            os.execv(sys.executable, [sys.executable, *self.argv])
        gc.enable()
        sys.argv = self.argv
        runpy.run_path(self.argv[0], run_name="__main__")


class ForkServer:
    """One raylet's, for workers whose environment is the same."""

    def __init__(self, listener: socket.socket, raylet: int) -> None:
        self._listener = listener
        self._events = selectors.DefaultSelector()
        self._workers: set[int] = set()
        self._watch(listener, self._fork)
        self._watch(os.pidfd_open(raylet), self._end)

    def serve(self) -> Worker | None:
        """Returns in each process that was forked, with what it is to become, and at the end with None."""
        while events := self._events.select(None if self._workers else IDLE_S):
            worker: Worker | None = events[0][0].data()
            if worker is not None:
                return worker
        return None

    def _watch(self, file: int | socket.socket, react: Callable[[], Worker | None]) -> None:
        self._events.register(file, selectors.EVENT_READ, react)

    def _fork(self) -> Worker | None:
        asker, _address = self._listener.accept()
        try:
            worker = _receive(asker)
            pid = os.fork()
        except (OSError, ValueError) as error:  # then it imports for itself
            print(f"no worker was forked: {error!r}", file=sys.stderr)
            asker.close()
            return None
        if pid == 0:
            asker.close()
            self._close()
            return worker
        for file in worker.files:
            os.close(file)
        self._workers.add(pid)
        ended = os.pidfd_open(pid)
        self._watch(ended, partial(self._reap, pid, ended, asker))
        self._watch(asker, partial(self._kill, pid, asker))
        with suppress(OSError):
            asker.sendall(f"{pid}\n".encode())
        return None

    def _kill(self, pid: int, asker: socket.socket) -> None:
        """Ray has killed who asked, in place of the worker."""
        self._events.unregister(asker)
        tell(pid, signal.SIGKILL)

    def _reap(self, pid: int, ended: int, asker: socket.socket) -> None:
        _pid, status = os.waitpid(pid, 0)
        with suppress(OSError):
            asker.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        with suppress(KeyError):
            self._events.unregister(asker)
        self._events.unregister(ended)
        asker.close()
        os.close(ended)
        self._workers.remove(pid)

    def _end(self) -> None:
        """The raylet is gone, and nobody who looks for what came of it finds these workers."""
        for pid in self._workers:
            tell(pid, signal.SIGKILL)
        sys.exit()

    def _close(self) -> None:
        """What a worker has no use for, and the other ends should not take for open."""
        for key in list(self._events.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
            else:
                os.close(key.fd)
        self._events.close()


def _receive(asker: socket.socket) -> Worker:
    """Raises OSError or ValueError."""
    if not is_own(asker):
        raise PermissionError("another user asks")
    asker.settimeout(_RECEIVE_S)
    size, files, _flags, _address = socket.recv_fds(asker, 8, 3)
    with asker.makefile("rb") as asked:
        return Worker(**json.loads(asked.read(int.from_bytes(size))), files=files)


def preload(path: str, *arguments: str) -> None:
    """Calls that function, as "module:name", and imports Ray's part."""
    gc.disable()  # nothing of it will be freed
    for name in RAY:
        importlib.import_module(name)
    module, _, function = path.partition(":")
    getattr(importlib.import_module(module), function)(*arguments)
    gc.freeze()  # a collection in a worker would write to, and so copy, all of it


def main() -> None:
    listener = socket.socket(fileno=int(sys.argv[1]))
    preload(*json.loads(os.environ[PRELOAD]))
    worker = ForkServer(listener, raylet=int(os.environ["RAY_RAYLET_PID"])).serve()
    if worker is not None:
        worker.run()


if __name__ == "__main__":
    main()
