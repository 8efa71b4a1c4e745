"""A process that imports what workers need and forks one worker per request of forked_worker.py.

Forked workers share the imported modules, so these cost neither time nor memory again. The server has one thread
and never initialises an accelerator, because neither threads nor accelerator contexts survive a fork. It ends with
its raylet, or after it has had no worker for `IDLE_S`.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from cluster.forked_worker import PRELOAD, is_own, tell
from cluster.machines import accelerator

RAY = ("ray._private.workers.default_worker", "ray.serve._private.replica")
"""Modules that turn a process into a Ray worker, and a worker into a Serve replica."""
IDLE_S = 60.0
"""How long the server outlives its last worker: longer than it takes to restart a replica that died."""
_RECEIVE_S = 5.0


@dataclass(frozen=True)
class Worker:
    """What a forked process is to run, and with which environment."""

    argv: list[str]
    environment: dict[str, str]
    folder: str
    files: list[int]
    """File descriptors of its standard input, output and error."""

    def run(self) -> None:
        os.setpgid(0, 0)  # Ray kills a worker's whole process group
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
    """The fork server of one raylet, for workers with the same environment."""

    def __init__(self, listener: socket.socket, raylet: int) -> None:
        self._listener = listener
        self._events = selectors.DefaultSelector()
        self._workers: set[int] = set()
        self._watch(listener, self._fork)
        self._watch(os.pidfd_open(raylet), self._end)

    def serve(self) -> Worker | None:
        """Returns the worker to run in each forked process, and None in the server when it ends."""
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
        except (OSError, ValueError) as error:  # the client then imports everything itself
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
        """Kills the worker because Ray has killed the client process that stands for it."""
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
        """Kills all workers and exits: without the raylet, nothing else would find and end these workers."""
        for pid in self._workers:
            tell(pid, signal.SIGKILL)
        sys.exit()

    def _close(self) -> None:
        """Closes the server's file descriptors in a forked worker. Left open, they would make the other ends look
        alive."""
        for key in list(self._events.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
            else:
                os.close(key.fd)
        self._events.close()


def _receive(asker: socket.socket) -> Worker:
    """Reads one request. Raises OSError or ValueError."""
    if not is_own(asker):
        raise PermissionError("the request is from another user")
    asker.settimeout(_RECEIVE_S)
    size, files, _flags, _address = socket.recv_fds(asker, 8, 3)
    with asker.makefile("rb") as asked:
        return Worker(**json.loads(asked.read(int.from_bytes(size))), files=files)


def preload(path: str, *arguments: str) -> None:
    """Imports Ray's modules and calls the function `path`, given as "module:name"."""
    gc.disable()  # none of the imported objects will be freed
    with _sparing_rays_generator():
        for name in RAY:
            importlib.import_module(name)
        module, _, function = path.partition(":")
        getattr(importlib.import_module(module), function)(*arguments)
    gc.freeze()  # a garbage collection in a worker would write to all shared pages, and so copy them


@contextmanager
def _sparing_rays_generator() -> Iterator[None]:
    """Keeps imports within the context from drawing numbers from Ray's own random generator. A fork copies that
    generator, so two workers would give the same IDs to different tasks and objects. `@ray.remote` draws one ID
    for each class."""
    actor: Any = importlib.import_module("ray.actor")
    drawn = actor.ActorClassID
    actor.ActorClassID = SimpleNamespace(from_random=lambda: drawn(os.urandom(drawn.size())))
    yield
    actor.ActorClassID = drawn


def draws_ids_of_its_own() -> bool:
    """Whether processes forked from this one draw different Ray IDs. May be called repeatedly."""
    return _forked_id() != _forked_id()


def _forked_id() -> bytes:
    """Forks a process and returns the first ID that it draws."""
    raylet = importlib.import_module("ray._raylet")
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(theirs, raylet.TaskID.for_fake_task(raylet.JobID.from_int(1)).binary())
        os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as told:
        drawn = told.read()
    os.waitpid(pid, 0)
    return drawn


def main() -> None:
    listener = socket.socket(fileno=int(sys.argv[1]))
    preload(*json.loads(os.environ[PRELOAD]))
    if not draws_ids_of_its_own():
        sys.exit(
            "the imports for workers use Ray's random generator, so no worker is forked: IDs would be given twice"
        )
    worker = ForkServer(listener, raylet=int(os.environ["RAY_RAYLET_PID"])).serve()
    if worker is not None:
        worker.run()


if __name__ == "__main__":
    main()
